#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the tests that need a GPU: those of tests/gpu/bin, or of the archive beside
# it, which are built first if they are not there (tests/gpu/pack.sh). cuBLAS and
# NCCL: tests/gpu/libraries.sh.
#
#   tests/gpu/run.sh                      the tests, then under each tool
#   tests/gpu/run.sh tests [FILTER]       the tests alone
#   tests/gpu/run.sh memcheck [FILTER]    under a tool of compute-sanitizer
#   tests/gpu/run.sh racecheck [FILTER]
#   tests/gpu/run.sh synccheck [FILTER]
#
# FILTER is GoogleTest's. What a run prints goes to $LOGS (tests/gpu/logs), and
# here its end, if it fails. GRADWIRE_GPU_SECONDS: all ends after so many seconds,
# and what was cut or left out is named.
#
# The last line is "N passed, N failed"; without a GPU it is "0 passed, 0 failed".
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly bin=tests/gpu/bin what=${1:-all} filter=${2:-*}
readonly logs=${LOGS:-tests/gpu/logs} seconds=${GRADWIRE_GPU_SECONDS:-100000}
readonly tools=(memcheck racecheck synccheck)
passed=0
failed=0

if [[ " all tests ${tools[*]} " != *" $what "* ]]; then
  echo "run.sh: unknown argument '$what'; use tests, ${tools[*]} or nothing" >&2
  exit 2
fi

finish() {
  echo "$passed passed, $failed failed"
  [[ $failed -eq 0 ]]
  exit
}

if [[ ! $(nvidia-smi -L 2>/dev/null) ]]; then
  echo "run.sh: this machine has no GPU (nvidia-smi -L lists none)"
  finish
fi
nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader
source tests/gpu/programs.sh
if ! need_programs tests "$bin/*_test"; then
  failed=1
  finish
fi
mkdir -p "$logs"

source tests/gpu/libraries.sh
export GRADWIRE_NEEDS_GPU=1

run() { # run NAME COMMAND...
  local name=$1 log=$logs/${1// /_}.txt start=$SECONDS status
  local left=$((seconds - SECONDS)) limit=${GRADWIRE_GPU_TIMEOUT:-300}
  shift
  if [[ $left -le 0 ]]; then
    echo "left out: $name"
    return
  fi
  timeout -k 10 "$((left < limit ? left : limit))" \
    env LD_LIBRARY_PATH="$gpu_libraries" "$@" >"$log" 2>&1
  status=$?
  if [[ $status -eq 0 ]]; then
    passed=$((passed + 1))
    echo "ok $name ($((SECONDS - start)) s): $(tail -1 "$log")"
  elif grep -q 'Device not supported' "$log"; then
    echo "left out: $name: compute-sanitizer does not support this device"
  elif [[ ($status -eq 124 || $status -eq 137) && $left -lt $limit ]]; then
    echo "cut off: $name ($((SECONDS - start)) s)"
  else
    failed=$((failed + 1))
    echo "FAILED: $name (status $status, $((SECONDS - start)) s)"
    grep -E '^\[  FAILED|Failure$|=========' "$log" | head -20
    tail -25 "$log"
  fi
}

# The programs that have a test of the filter; a tool takes one that uses no GPU
# for broken. One that does not even start is run, to fail.
programs() {
  local test names
  for test in "$bin"/*_test; do
    if names=$(LD_LIBRARY_PATH=$gpu_libraries "$test" --gtest_list_tests \
      --gtest_filter="$filter") && [[ $names != *.* ]]; then
      echo "run.sh: nothing of '$filter' in ${test##*/}" >&2
    else
      echo "$test"
    fi
  done
}

# Our own kernels: cuBLAS's would take most of the time. The option has had
# other names.
only_ours() {
  local option help
  help=$("$sanitizer" --help 2>&1)
  for option in --kernel-name --kernel-regex --filter; do
    if [[ $help == *"$option"* ]]; then
      echo "$option=kns=gradwire"
      return
    fi
  done
}

under() { # under TOOL
  local tool=$1 test
  local options=(--tool="$tool" --error-exitcode=1 --print-limit=20)
  mapfile -O "${#options[@]}" -t options < <(only_ours)
  # Tests ask for more memory than there is, NCCL for what a driver may not have:
  # neither is an error of ours.
  if [[ $tool == memcheck ]]; then options+=(--report-api-errors=no); fi
  for test in $tests; do
    # Without thousands of launches that say no more than the others.
    run "${test##*/} under $tool" "$sanitizer" "${options[@]}" "$test" \
      --gtest_brief=1 --gtest_filter="$filter:-*EveryBitAndEveryPlace*"
  done
}

tests=$(programs)
if [[ $what == all || $what == tests ]]; then
  for test in $tests; do
    run "${test##*/}" "$test" --gtest_brief=1 --gtest_filter="$filter"
  done
fi
if [[ $what != tests ]]; then
  sanitizer=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin \
    type -P compute-sanitizer)
  if [[ $sanitizer ]]; then
    for tool in "${tools[@]}"; do
      if [[ $what == all || $what == "$tool" ]]; then under "$tool"; fi
    done
  else
    echo "run.sh: compute-sanitizer was not found; its runs are left out"
  fi
fi
finish
