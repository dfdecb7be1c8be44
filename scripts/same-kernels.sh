#!/usr/bin/env bash
# Compares the machine code of kernels as they are here with that of another revision, without a GPU: names of functions,
# types and variables, comments and layout leave no trace in a cubin, so a rename is proven by equal bytes. (The name of a function
# that is not inlined does, as a symbol.)
#
#   same-kernels.sh REV [FILE...]     (default: all of kernels/)
#
# Files are matched by their names, so one that has moved is compared with what it was. Prints a line for each file and architecture
# and fails if any is not the same. Needs nvcc on PATH (scripts/cuda-env.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/kernel-flags.sh
[ $# -ge 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }

if [ "$1" = --one ]; then
  kernel=$2 arch=$3 before=$4
  was=$(cd "$before" && find kernels -name "$(basename "$kernel")")
  if [ -z "$was" ]; then
    echo "new        sm_$arch  $kernel"
    exit
  fi
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
  # nvcc marks what is local to a file with that file's path, so both are included in one of the same path.
  compile() { # FOLDER FILE OUT: the file of a folder's kernels
    local flags
    flags=$(cd "$1" && kernel_flags "$arch" | sed "s|-Ikernels|-I$1/kernels|")
    # shellcheck disable=SC2086 # one flag per word
    (cd "$out" && echo "#include \"$1/$2\"" > both.cu && nvcc -cubin $flags -o "$3" both.cu)
  }
  compile "$before" "$was" before
  compile "$PWD" "$kernel" now
  if cmp -s "$out/before" "$out/now"; then
    echo "same       sm_$arch  $kernel"
  else
    echo "different  sm_$arch  $kernel"
    exit 1
  fi
  exit
fi

rev=$(git rev-parse --verify --quiet "$1^{commit}") || { echo "same-kernels: $1 is no revision" >&2; exit 2; }
shift
before=$(mktemp -d)
trap 'rm -rf "$before"' EXIT
git archive "$rev" kernels src/tiles.rs | tar -x -C "$before"
# shellcheck disable=SC2046 # no name has a blank
[ $# -gt 0 ] || set -- $(kernel_files)
for kernel in "$@"; do
  for arch in $(kernel_archs "$kernel"); do echo "$kernel $arch $before"; done
done | xargs -n 3 -P "$(nproc)" scripts/same-kernels.sh --one
