#!/usr/bin/env bash
# Runs test binaries on a GPU under compute-sanitizer.
#
#   sanitize.sh FOLDER [TOOL...]     (default: memcheck racecheck synccheck initcheck)
#
# FOLDER holds what `scripts/bundle.py OUT.tar.xz -- test --release --workspace --features cuda --no-run` packed. Prints a line for
# each binary and tool, keeps what a tool said in FOLDER/sanitize/, and fails if any found something. SANITIZE_SECONDS (default
# 1800) limits each run; the first GPU is used.
#
# racecheck follows only writers that arrive at an mbarrier themselves, and so reports what a search of assign_sm90.cu leaves to
# the finishing warps, whose writers lane 0 arrives for behind __syncwarp (tests/record/h200-2026-11-22.txt).
set -uo pipefail
[ $# -ge 1 ] && [ -d "$1" ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
folder=$(cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- memcheck racecheck synccheck initcheck
command -v compute-sanitizer > /dev/null || { echo "sanitize: compute-sanitizer is not on PATH; it is part of the CUDA toolkit" >&2; exit 2; }

# Under a tool a kernel takes tens of times longer. Skipped are tests that
SLOW=(
  # run the same kernels again and again, which other tests run once,
  a_hundred_times_on_every_path twenty_times from_many_threads_at_once cuvs_2657_run_to_run
  # have sizes past 32 bits (large.rs, whose tests are ignored unless asked for),
  past_32_bits
  # compare the CPU with itself,
  for_any_number_of_threads
  # or measure memory, of which the tool takes some itself.
  peak_is_within_the_plan
)
skipped=()
for name in "${SLOW[@]}"; do skipped+=(--skip "$name"); done

export FLASH_KMEANS_TEST_DEVICE="${FLASH_KMEANS_TEST_DEVICE:-cuda}"
mkdir -p "$folder/sanitize"
failed=0 binaries=0
for binary in "$folder"/*; do
  # Of the executables only those of libtest list tests.
  [ -f "$binary" ] && [ -x "$binary" ] && "$binary" --list 2> /dev/null < /dev/null | grep -q ': test$' || continue
  binaries=$((binaries + 1)) name=$(basename "$binary")
  for tool in "$@"; do
    log="$folder/sanitize/$name-$tool.txt"
    # Refusals and a full memory are tested on purpose: the driver's own errors are not findings.
    timeout "${SANITIZE_SECONDS:-1800}" compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 99 \
      "$binary" --test-threads 1 "${skipped[@]}" > "$log" 2>&1
    case $? in
      0) said=clean ;;
      99) said="found something: $log" ;;
      124) said="did not end in ${SANITIZE_SECONDS:-1800} s: $log" ;;
      *) said="failed: $log" ;;
    esac
    [ "$said" = clean ] || failed=1
    printf '%-10s %-28s %s\n' "$tool" "$name" "$said"
  done
done
[ "$binaries" -gt 0 ] || { echo "sanitize: no test binaries in $folder" >&2; exit 2; }
exit "$failed"
