#!/usr/bin/env bash
# Lints the CUDA half of the crate without building anything for the GPU: an `nvcc` that only touches the files it is asked
# for stands in for the compiler (candle's own kernels take it eight minutes). scripts/check-kernels.sh compiles ours.
set -euo pipefail
shim=$(mktemp -d)
trap 'rm -rf "$shim"' EXIT
cat > "$shim/nvcc" <<'SHIM'
#!/usr/bin/env bash
case " $* " in
*" --version "* | *" -V "*)
  printf 'nvcc: NVIDIA (R) Cuda compiler driver\nCopyright (c) NVIDIA Corporation\nBuilt on 2025\nCuda compilation tools, release 13.0, V13.0.88\n'
  exit ;;
*" --list-gpu-code "*) printf 'sm_80\nsm_90\n'; exit ;;
esac
out= dir= sources=() ptx=
while [ $# -gt 0 ]; do
  case $1 in
  -o) out=$2; shift ;;
  --output-directory) dir=$2; shift ;;
  --ptx) ptx=1 ;;
  *.cu) sources+=("$1") ;;
  esac
  shift
done
[ -z "$ptx" ] || [ -z "$dir" ] || for s in "${sources[@]}"; do touch "$dir/$(basename "${s%.cu}").ptx"; done
case $out in '') ;; *.a) ar rcs "$out" ;; *) touch "$out" ;; esac
SHIM
chmod +x "$shim/nvcc"
export PATH="$shim:$PATH" NVCC="$shim/nvcc" CUDA_COMPUTE_CAP=90
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/lint-cuda"
# NCCL is in what `cuda` leaves out, and the other way round.
for features in cuda nccl; do
  cargo clippy --workspace --all-targets --features "$features" -- -D warnings
done
