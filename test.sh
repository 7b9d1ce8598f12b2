#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds and tests everything.
#
#   ./test.sh            all of it
#   ./test.sh --quick    without the sanitizers and the fuzzer
#
# GRADWIRE_FUZZ_RUNS says how many inputs each fuzz target gets (docs/fuzzing.md),
# and GRADWIRE_FUZZ_UNTIL after how many seconds from now they end anyway.
#
# What failed is told once more at the end, whatever was printed in between. The
# last line is "N passed, N failed"; the status is non-zero if any failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

sanitizers=(asan tsan)
fuzz_runs=${GRADWIRE_FUZZ_RUNS:-50000}
fuzz_until=${GRADWIRE_FUZZ_UNTIL:-0}
case "${1:-}" in
  '') ;;
  --quick)
    sanitizers=()
    fuzz_runs=0
    ;;
  *)
    echo "test.sh: unknown argument '$1'; use --quick or nothing" >&2
    exit 2
    ;;
esac

readonly results=.cache/test
# The longest that one run of Bazel or pytest may take, in seconds.
readonly limit=${GRADWIRE_TEST_LIMIT:-2400}
rm -rf "$results"
mkdir -p "$results"
passed=0
failed=0

stage() { echo "=== $* ($((SECONDS / 60)) min)"; }

add() { # add PASSED FAILED
  passed=$((passed + $1))
  failed=$((failed + $2))
}

# Counts a failure that no runner has counted.
fail() { # fail WHAT
  echo "FAILED $1" | tee -a "$results/failures.txt" >&2
  add 0 1
}

# Fuzzing runs beside the other stages, on what they leave idle of the cores. The
# group of its session is what the scheduler sees first; where that cannot give
# way, it would take half of the processor, and comes last.
fuzz=
can_give_way() {
  local groups=/proc/sys/kernel/sched_autogroup_enabled
  [[ ! -e $groups || $(<"$groups") == 0 ]] ||
    setsid bash -c 'echo 19 >/proc/self/autogroup' 2>/dev/null
}

start_fuzzing() {
  local budget=0
  if [[ $fuzz_until -gt 0 ]]; then
    budget=$((fuzz_until > SECONDS ? fuzz_until - SECONDS : 1))
  fi
  # It does not outlive this script, however that ends.
  GRADWIRE_FUZZ_TIMEOUT=600 setsid setpriv --pdeathsig TERM \
    bash -c '{ echo 19 >/proc/self/autogroup; } 2>/dev/null
      exec nice -n 9 tests/fuzz/run.sh "$@"' - \
    --runs "$fuzz_runs" --seconds "$budget" \
    >"$results/fuzz.txt" 2>"$results/fuzz.err" &
  fuzz=$!
}

end_fuzzing() {
  if [[ $fuzz ]]; then kill -TERM -- "-$fuzz" 2>/dev/null; fi
}
trap end_fuzzing EXIT

finish() {
  if [[ -s $results/failures.txt ]]; then
    stage "what failed"
    cat "$results/failures.txt"
  fi
  echo "$passed passed, $failed failed"
  [[ $failed -eq 0 && $passed -gt 0 ]]
  exit
}

# A runner that fails without a failed case (a build file that does not parse,
# a crash) is a failure all the same.
count() { # count STATUS count_tests.py-ARGUMENTS...
  local status=$1 p f
  shift
  read -r p f < <(python3 tools/count_tests.py "$@" 2>>"$results/failures.txt")
  if [[ -z $f ]]; then
    fail "tools/count_tests.py $*"
  elif [[ $status -ne 0 && $f -eq 0 ]]; then
    fail "$*: the runner ended with status $status"
  fi
  add "${p:-0}" "${f:-0}"
}

# bazel_test NAME ARGUMENTS...
bazel_test() {
  local events=$results/$1.json status
  shift
  timeout --signal=INT "$limit" bazel test --keep_going --noshow_progress \
    --build_event_json_file="$events" "$@"
  status=$?
  if [[ $status -eq 4 ]]; then status=0; fi # No test targets.
  count "$status" --bazel "$events"
}

# python_test NAME SUITES...
python_test() {
  local report=$results/$1.xml
  shift
  if [[ $# -eq 0 ]]; then return; fi
  # A test that hangs fails alone, with the stacks of all threads; one that hangs
  # outside of Python ends the run.
  timeout --signal=INT "$limit" .venv/bin/python -m pytest -q \
    --timeout=300 --timeout-method=signal \
    -o faulthandler_timeout=400 -o faulthandler_exit_on_timeout=true \
    -p no:cacheprovider --junitxml="$report" "$@"
  count $? --junit "$report"
}

# The packages of a list that exist and have tests.
unit() {
  local package
  for package in "$@"; do
    if grep -qs '_test' "$package"/BUILD.bazel; then echo "//$package/..."; fi
  done
}

stage "set-up"
if ! tools/setup.sh --dev; then
  fail "tools/setup.sh"
  finish
fi

stage "format"
if tools/format.sh --check; then add 1 0; else fail "tools/format.sh"; fi

stage "build and test"
bazel_test plain //...

# Compiled and linked with nvcc, cuBLAS and NCCL, where these are, programs and
# benchmarks, too; run on a GPU, and skipped with a word where there is none.
stage "CUDA"
bazel_test cuda --config=cuda --build_tag_filters=cuda --test_tag_filters=gpu \
  //...

if [[ $fuzz_runs -gt 0 ]]; then
  stage "fuzz: build"
  if ! tests/fuzz/run.sh --build; then
    fail "tests/fuzz/run.sh --build"
    fuzz_runs=0
  elif can_give_way; then
    start_fuzzing
  fi
fi

stage "Python"
mapfile -t suites < <(for suite in client/python/tests tests tools; do
  if [[ -n $(git ls-files "$suite/*test_*.py" "$suite/*_test.py") ]]; then
    echo "$suite"
  fi
done)
python_test pytest "${suites[@]}"

for config in "${sanitizers[@]}"; do
  packages=(base device model sharding checkpoint trainer server)
  # The libraries below the kernels bring OpenMP, which tsan cannot see through.
  if [[ $config != tsan ]]; then packages+=(kernels); fi
  mapfile -t targets < <(unit "${packages[@]}")
  if [[ ${#targets[@]} -eq 0 ]]; then continue; fi
  stage "$config"
  bazel_test "$config" --config="$config" --build_tests_only "${targets[@]}"
  # A whole server, too; gRPC is not built for tsan.
  if [[ $config == tsan ]]; then continue; fi
  if bazel build --config="$config" --noshow_progress \
    //server:gradwired //server:gradwire_rank; then
    GRADWIRE_SANITIZED=$config \
      GRADWIRE_BIN_DIR=$(bazel info --config="$config" bazel-bin)/server \
      python_test "$config-e2e" tests/e2e
  else
    fail "bazel build --config=$config //server:gradwired //server:gradwire_rank"
  fi
done

if [[ $fuzz_runs -gt 0 ]]; then
  stage "fuzz: what is left"
  if [[ ! $fuzz ]]; then start_fuzzing; fi
  wait "$fuzz"
  status=$?
  fuzz=
  cat "$results/fuzz.err" >&2
  cat "$results/fuzz.txt"
  count "$status" --fuzz "$results/fuzz.txt"
fi

finish
