# Sourced by scripts that compile kernels one at a time, in the folder of a checkout: how build.rs compiles them.

# kernel_files: all that are compiled.
kernel_files() {
  find kernels -name '*.cu' | sort
}

# kernel_archs FILE: the architectures that it is checked for; a file named after one is for that one alone.
kernel_archs() {
  case $1 in *_sm90.cu) echo 90a ;; *) echo "80 90a" ;; esac
}

# kernel_flags ARCH: what nvcc is told, but for the kind of output: one flag a word, the tile numbers of src/tiles.rs among them.
kernel_flags() {
  echo "-O3 -std=c++17 -Ikernels -gencode=arch=compute_$1,code=sm_$1" \
    "$(sed -nE 's/^pub const (\w+): usize = ([0-9_]+);.*/-D\1=\2/p' src/tiles.rs | sed -E ':a;s/(=[0-9]*)_/\1/;ta' | tr '\n' ' ')"
}
