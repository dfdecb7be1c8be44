#!/bin/sh
# Compiles every kernel for sm_80 and sm_90a and prints the registers of each; fails if any spills to memory, or has
# more shared memory of its own than src/plan/arch.rs allows for.
# Needs nvcc on PATH (scripts/cuda-env.sh brings one).
set -eu
cd "$(dirname "$0")/.."
. scripts/kernel-flags.sh
if [ $# = 0 ]; then
  # A job to each file and architecture, as many at once as there are processors.
  for kernel in $(kernel_files); do
    for arch in $(kernel_archs "$kernel"); do echo "$kernel $arch"; done
  done | xargs -n 2 -P "$(nproc)" sh scripts/check-kernels.sh
  exit
fi

kernel=$1 arch=$2
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
# shellcheck disable=SC2046 # one flag per word
nvcc -fatbin $(kernel_flags "$arch") -Xptxas -v -o "$out/fatbin" "$kernel" 2> "$out/log" || { cat "$out/log" >&2; exit 1; }
most_shared=$(sed -nE 's/^pub const STATIC_SHARED: usize = ([0-9]+);/\1/p' src/tiles.rs)
awk -v arch="sm_$arch" -v most_shared="$most_shared" '
  /Compiling entry function/ { split($0, quoted, "\x27"); name = quoted[2] }
  /bytes spill stores/ { spill = $0; sub(/ bytes spill stores.*/, "", spill); sub(/.* /, "", spill) }
  /Used [0-9]+ registers/ {
    registers = $0; sub(/ registers.*/, "", registers); sub(/.* /, "", registers)
    printf "%-8s %-32s %4d registers %4d bytes spilled\n", arch, name, registers, spill
    # With 14 steps and more the registers are all taken: a few words of a row tile, and of what proves rows, lie in memory,
    # which no timing shows.
    # So are those of the f32 recheck, where two words wait for the end of a sweep, and of the update, where what a
    # cluster needs at its end does: more warps hide more latency than that costs (update-versions.md).
    most = name ~ /^assign_sm90_1[46]_/ ? 120 : name ~ /^assign_sm90_[23]/ ? 52 : name ~ /^recheck_split_/ ? 8 : 0
    if (name ~ /^assign_sm90_2_/ || name ~ /^assign_sm90_3_/) most = 0
    if (name ~ /^(update|add_changes)_/) most = 48
    # A few words of kernels that fill all registers with rows on their way and accumulators.
    if (name ~ /^attend_coded_(80|96|112|128)_/) most = 16
    if (name ~ /^attend_coded_256_f32/) most = 32
    if (name ~ /^attend_(80|96)_b?f16/) most = 4
    if (name ~ /^route_attend_(96_2|112_2|256_1)_/) most = arch == "sm_80" ? 32 : 8
    # These keep where sums go that others add to as well, which costs nothing (blocks-h200-2026-11-28.csv).
    if (name == "update_f32" || name == "update_narrow_bf16") most = 60
    # And these whether they leave sums, at the end of a cluster too.
    if (name ~ /^update_kept_(f32|bf16|narrow_bf16)$/) most = 72
    if (name ~ /^prepare_origin_/) most = arch == "sm_80" ? 12 : 0
    # What the phases of an iteration need waits in memory while another phase has all registers; no inner loop loads it.
    if (name ~ /^fit_resident/) most = 400
    if (name ~ /^fit_narrow/) most = 104
    # What the end of a tile needs waits in memory while its columns are multiplied.
    if (name ~ /^pairwise_near_/) most = 72
    # What a lane knows of its row waits in memory while the columns of a tile are multiplied.
    if (name == "list_rounded_f32") most = arch == "sm_80" ? 16 : 0
    # Constants of a tile of rows, and what proves them, which no loop over centroids loads.
    if (name ~ /^assign_narrow/) most = 20
    # Its tile and counters take more shared memory than blocks of sm_80 have, so there it is not run.
    if (name == "order_deal_many") most = arch == "sm_80" ? 96 : 8
    if (spill + 0 > most) failed = 1
    # Kernels that ask for more at their launch may have so much of their own.
    shared = $0; if (!sub(/ bytes smem.*/, "", shared)) shared = 0; sub(/.* /, "", shared)
    asks = name ~ /^(attend_|order_|fit_|select_tokens|route_|assign_|search_|recheck_)/ && name !~ /^(order_scan|assign_simt)/
    if (asks && shared + 0 > most_shared) {
      print name " has " shared " bytes of static shared memory"; failed = 1
    }
  }
  /wgmma.mma_async instructions are serialized/ {
    print; failed = 1
  }
  END { exit failed }' "$out/log" > "$out/table" || { cat "$out/table"; echo "$kernel fails for sm_$arch" >&2; exit 1; }
cat "$out/table"
