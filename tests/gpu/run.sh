#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the tests that need a GPU: those in tests/gpu/bin, which are packed first
# if they are not there (tests/gpu/pack.sh). Then again under compute-sanitizer,
# where there is one. cuBLAS and NCCL: tests/gpu/libraries.sh.
#
# The last line is "N passed, N failed"; without a GPU it is "0 passed, 0 failed".
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly bin=tests/gpu/bin
passed=0
failed=0

finish() {
  echo "$passed passed, $failed failed"
  [[ $failed -eq 0 ]]
  exit
}

if ! nvidia-smi -L 2>/dev/null | grep -q .; then
  echo "run.sh: this machine has no GPU (nvidia-smi -L lists none)"
  finish
fi
nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader
if ! compgen -G "$bin/*_test" >/dev/null && ! tests/gpu/pack.sh; then
  failed=1
  finish
fi

source tests/gpu/libraries.sh
export LD_LIBRARY_PATH=$gpu_libraries

export GRADWIRE_NEEDS_GPU=1
run() { # run NAME COMMAND...
  local name=$1
  shift
  echo "=== $name"
  if timeout 300 "$@"; then
    passed=$((passed + 1))
  else
    echo "FAILED: $name"
    failed=$((failed + 1))
  fi
}

for test in "$bin"/*_test; do
  run "$(basename "$test")" "$test" --gtest_brief=1
done
if command -v compute-sanitizer >/dev/null; then
  for test in "$bin"/*_test; do
    for tool in memcheck racecheck; do
      run "$(basename "$test") under $tool" \
        compute-sanitizer --tool="$tool" --error-exitcode=1 "$test" \
        --gtest_brief=1
    done
  done
else
  echo "run.sh: compute-sanitizer was not found; its runs are left out"
fi
finish
