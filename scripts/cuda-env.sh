# Sourced, not run: makes `cargo build --features cuda` work on a machine with neither a GPU nor a CUDA toolkit.
#
#   . scripts/cuda-env.sh
#
# The compiler comes from pip packages, once, into $CUDA13 (default ~/.cache/cuda-13.0, about 500 MB). The driver
# libraries that the linker asks for are replaced by empty ones with the same names and symbols, made from the function
# lists in cudarc's sources: what is built here runs only where the real ones are.
CUDA13="${CUDA13:-$HOME/.cache/cuda-13.0}"

_python=$(python3 -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
_toolkit="$CUDA13/venv/lib/$_python/site-packages/nvidia/cu13"
if [ ! -x "$_toolkit/bin/nvcc" ]; then
  python3 -m venv "$CUDA13/venv" || return 1
  "$CUDA13/venv/bin/pip" install --quiet \
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 || return 1
fi

# What nvcc users look for: Candle's kernels, cudarc and our build.rs.
export CUDA_HOME="$_toolkit" CUDA_PATH="$_toolkit" CUDA_ROOT="$_toolkit"
export CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-90}"
case ":$PATH:" in
  *":$_toolkit/bin:"*) ;;
  *) export PATH="$_toolkit/bin:$PATH" ;;
esac

# _stub NAME SONAME MODULE: an empty shared library with every function of a cudarc module.
_stub() {
  grep -ohE '^pub unsafe fn [A-Za-z0-9_]+' "$_cudarc/$3/sys/mod.rs" |
    awk '{ print "void " $4 "(void) {}" }' | sort -u > "$_stubs/$1.c" &&
    gcc -shared -fPIC -w "-Wl,-soname,$2" -o "$_stubs/lib$1.so" "$_stubs/$1.c"
}

_stubs="$CUDA13/stubs"
if [ ! -e "$_stubs/done" ]; then
  mkdir -p "$_stubs"
  [ ! -e Cargo.toml ] || cargo fetch --quiet || return 1
  _cudarc=$(ls -d "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/cudarc-0.19.*/src 2> /dev/null | sort -V | tail -n 1)
  if [ -z "$_cudarc" ]; then
    echo "cuda-env: the sources of cudarc 0.19 are not there yet; source this from the project's folder" >&2
    return 1
  fi
  _stub cuda libcuda.so.1 driver && _stub cublas libcublas.so.13 cublas &&
    _stub cublasLt libcublasLt.so.13 cublaslt && _stub curand libcurand.so.10 curand &&
    _stub nvrtc libnvrtc.so.13 nvrtc && _stub nccl libnccl.so.2 nccl &&
    ln -sf "$_toolkit/lib/libcudart.so.13" "$_stubs/libcudart.so" && touch "$_stubs/done" || return 1
fi
case ":${LIBRARY_PATH:-}:" in
  *":$_stubs:"*) ;;
  *) export LIBRARY_PATH="$_stubs${LIBRARY_PATH:+:$LIBRARY_PATH}" ;;
esac
unset _python _toolkit _stubs _cudarc
unset -f _stub
