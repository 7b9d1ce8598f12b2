#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the tests that need a GPU: those in tests/gpu/bin, which are packed first
# if they are not there (tests/gpu/pack.sh). Then again under compute-sanitizer,
# where there is one.
#
# cuBLAS and NCCL: $NCCL_HOME, what tools/setup.sh has installed, the toolkit's,
# or PyTorch's.
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
if [[ ! -d $bin ]] && ! tests/gpu/pack.sh; then
  failed=1
  finish
fi

# python_package NAME: where it lies, if it is there.
python_package() {
  python3 -c "import $1; print(list($1.__path__)[0])" 2>/dev/null
}

libraries=
# find_library FILE PLACE...: in the first of the places that has it.
find_library() {
  local file=$1 place
  shift
  for place in "$@"; do
    if [[ -n $place && -e $place/$file ]]; then
      libraries+=:$place
      return
    fi
  done
  echo "run.sh: $file was not found; tests that need it will fail"
}
find_library libnccl.so.2 "${NCCL_HOME:+$NCCL_HOME/lib}" \
  .cache/cuda/nvidia/nccl/lib "$(python_package nvidia.nccl)/lib"
find_library libcublasLt.so.13 .cache/cuda/nvidia/cu13/lib \
  "${CUDA_HOME:-/usr/local/cuda}/lib64" "$(python_package nvidia.cu13)/lib" \
  "$(python_package nvidia.cublas)/lib"
export LD_LIBRARY_PATH=$PWD/$bin/lib$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

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
