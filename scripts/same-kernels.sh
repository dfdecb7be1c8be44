#!/usr/bin/env bash
# Compares the machine code of kernels as they are here with that of another revision, without a GPU: names of functions,
# types and variables, comments and layout leave no trace in a cubin, so a rename is proven by equal bytes.
#
#   same-kernels.sh REV [FILE...]     (default: kernels/*.cu)
#
# Prints a line for each file and architecture and fails if any is not the same. Needs nvcc on PATH (scripts/cuda-env.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/kernel-flags.sh
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }

if [ "$1" = --one ]; then
  kernel=$2 arch=$3 before=$4
  if [ ! -e "$before/$kernel" ]; then
    echo "new        sm_$arch  $kernel"
    exit
  fi
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
  # Under one name and from a folder of its own, since nvcc marks what is local to a file with the file's name.
  # shellcheck disable=SC2046 # one flag per word
  for side in "$before" .; do
    (cd "$side" && nvcc -cubin $(kernel_flags "$arch") -o "$out/$([ "$side" = . ] && echo now || echo before)" "$kernel")
  done
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
[ $# -gt 0 ] || set -- kernels/*.cu
for kernel in "$@"; do
  for arch in $(kernel_archs "$kernel"); do echo "$kernel $arch $before"; done
done | xargs -n 3 -P "$(nproc)" scripts/same-kernels.sh --one
