#!/usr/bin/env bash
# Runs test binaries on a GPU under compute-sanitizer.
#
#   sanitize.sh FOLDER [TOOL...]     (default: memcheck racecheck synccheck initcheck)
#
# FOLDER holds what `scripts/bundle.py OUT.tar.xz -- test --release --workspace --features cuda --no-run` packed. Prints a line for
# each module of tests and tool, keeps what a tool said in FOLDER/sanitize/, and fails if any found something. SANITIZE_SECONDS
# (default 1800) limits each run; the first GPU is used.
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
slow=$(printf '%s\n' "${SLOW[@]}")

export FLASH_KMEANS_TEST_DEVICE="${FLASH_KMEANS_TEST_DEVICE:-cuda}"
mkdir -p "$folder/sanitize"
failed=0 runs=0
for binary in "$folder"/*; do
  # Of the executables only those of libtest list tests.
  [ -f "$binary" ] && [ -x "$binary" ] || continue
  tests=$("$binary" --list 2> /dev/null < /dev/null | sed -n 's/: test$//p' | grep -vF "$slow")
  [ -n "$tests" ] || continue
  # A module is a run of its own; tests beside the modules are one, too.
  for module in $(sed -n 's/::.*//p' <<< "$tests" | sort -u) ''; do
    mapfile -t names < <(if [ -n "$module" ]; then grep "^$module::" <<< "$tests"; else grep -v :: <<< "$tests"; fi)
    [ "${#names[@]}" -gt 0 ] || continue
    name=$(basename "$binary")${module:+-$module}
    for tool in "$@"; do
      runs=$((runs + 1)) log="$folder/sanitize/$name-$tool.txt"
      # Refusals and a full memory are tested on purpose: the driver's own errors are not findings.
      timeout "${SANITIZE_SECONDS:-1800}" compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 99 \
        "$binary" --test-threads 1 --exact "${names[@]}" > "$log" 2>&1
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
done
[ "$runs" -gt 0 ] || { echo "sanitize: no test binaries in $folder" >&2; exit 2; }
exit "$failed"
