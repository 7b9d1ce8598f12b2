#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the libFuzzer targets of this directory and runs them, all at once.
#
#   tests/fuzz/run.sh [--runs N] [TARGET...]     default: 2000000, all of them
#   tests/fuzz/run.sh --seconds N ...            ends then, whatever is done, but
#                                                not within its first minute
#   tests/fuzz/run.sh --repeat FILE TARGET       one input, as a finding left it
#   tests/fuzz/run.sh --build [TARGET...]        builds them only
#
# Prints a line for each target as it ends, and fails if one of them has found
# something. What it found, and the log, are in .cache/fuzz/TARGET.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

runs=2000000
seconds=0
repeat=
build_only=
targets=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    --runs) runs=$2 && shift ;;
    --seconds) seconds=$2 && shift ;;
    --repeat) repeat=$2 && shift ;;
    --build) build_only=1 ;;
    -*)
      echo "run.sh: unknown argument '$1'; use --runs, --seconds, --repeat, --build or targets" >&2
      exit 2
      ;;
    *) targets+=("$1") ;;
  esac
  shift
done
if [[ ${#targets[@]} -eq 0 ]]; then
  for source in tests/fuzz/*_fuzz.cc; do
    targets+=("$(basename "$source" _fuzz.cc)")
  done
fi

if ! command -v clang >/dev/null; then tools/setup.sh --fuzz >&2; fi

# All that is built here, so that a name that is none ends here, too.
bazel build --config=fuzz --noshow_progress --ui_event_filters=-info \
  "${targets[@]/#//\/tests/fuzz:}"
if [[ $build_only ]]; then exit; fi
bin=$(bazel info --config=fuzz bazel-bin 2>/dev/null)/tests/fuzz

# Where memory was allocated is of less use than speed: --repeat shows it. What
# an input frees is soon beyond this megabyte, but hardly before it ends; in the
# caches of the processor it costs a fifth of the time less than in more memory.
readonly fast=malloc_context_size=0:max_malloc_fill_size=0:quarantine_size_mb=1:thread_local_quarantine_size_kb=64
# An input takes milliseconds, and kilobytes; more of the clock where there is
# hardly any of the processor.
readonly limits=(-max_len=4096 "-timeout=${GRADWIRE_FUZZ_TIMEOUT:-20}" -rss_limit_mb=1024 -malloc_limit_mb=16)

if [[ $repeat ]]; then
  exec "$bin/${targets[0]}" "${limits[@]}" "$repeat"
fi

# What building has left of the time; 0: any.
if [[ $seconds -gt 0 ]]; then
  seconds=$((seconds > SECONDS + 60 ? seconds - SECONDS : 60))
fi

# How much a target gives way to others: those with most to do least, so that
# they do not end alone, with all other cores idle.
niceness() {
  case "$1" in
    delta) echo 4 ;;
    training_state | oplog) echo 7 ;;
    *) echo 10 ;;
  esac
}

# run TARGET: prints its line.
run() {
  local directory=.cache/fuzz/$1 status=0 begin=$EPOCHREALTIME
  rm -rf "$directory"
  mkdir -p "$directory"
  # Entropic scheduling costs a third of the time where inputs are this small.
  ASAN_OPTIONS=$fast nice -n "$(niceness "$1")" "$bin/$1" -runs="$runs" -max_total_time="$seconds" \
    "${limits[@]}" -entropic=0 -print_final_stats=1 \
    -artifact_prefix="$directory/" \
    >"$directory/log.txt" 2>&1 || status=$?
  local inputs edges
  inputs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$directory/log.txt")
  edges=$(sed -n 's/^#.* cov: \([0-9]*\).*/\1/p' "$directory/log.txt" | tail -n 1)
  # A run that ended in any other way than by its number of inputs, or by the
  # time that it was given, is one.
  local findings=0
  if [[ $status -ne 0 || (${inputs:-0} -lt $runs && $seconds -eq 0) ]]; then
    findings=1
  fi
  awk -v name="$1" -v inputs="${inputs:-0}" -v edges="${edges:-0}" \
    -v findings="$findings" -v begin="$begin" -v end="$EPOCHREALTIME" 'BEGIN {
      printf "fuzz: %-15s %8d inputs %6d/s %6d edges %d findings\n",
        name, inputs, inputs / (end - begin), edges, findings
    }'
  if [[ $findings -eq 0 ]]; then return; fi
  {
    tail -n 40 "$directory/log.txt"
    for input in "$directory"/{crash,leak,oom,timeout}-*; do
      if [[ -f $input ]]; then
        echo "fuzz: repeat it: tests/fuzz/run.sh --repeat $input $1"
      fi
    done
  } >&2
  return 1
}

# What runs in the background does not hear of Ctrl-C.
trap 'trap - TERM; kill -TERM 0' INT TERM
running=()
for target in "${targets[@]}"; do
  run "$target" &
  running+=($!)
done
status=0
for process in "${running[@]}"; do
  wait "$process" || status=1
done
exit "$status"
