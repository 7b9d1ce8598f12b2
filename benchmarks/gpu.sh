#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What one NVIDIA GPU makes of gradwire, beside PyTorch: JSON lines and tables.
#
#   benchmarks/gpu.sh                      step and ops, one after the other
#   benchmarks/gpu.sh step [ARGUMENTS]     a full step (benchmarks/gpu/step.py)
#   benchmarks/gpu.sh ops                  every op of a step
#   benchmarks/gpu.sh graphs               a small model, blocks as graphs or not
#
# Needs a GPU, and PyTorch with CUDA in $PYTHON (python3). The programs are those
# of tests/gpu/bin, or of the archive beside it, which tests/gpu/pack.sh makes if
# neither is there. Ends with a status other than 0 if a part has failed, or
# without a GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly bin=tests/gpu/bin part=${1:-all}
case "$part" in
  all | step | ops | graphs) ;;
  *)
    echo "gpu.sh: unknown part '$part'; use all, step, ops or graphs" >&2
    exit 2
    ;;
esac
shift $(($# > 0))

if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
  echo "gpu.sh: this machine has no GPU (nvidia-smi -L lists none)" >&2
  exit 1
fi
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm \
  --format=csv,noheader
source tests/gpu/programs.sh
need_programs benchmarks "$bin/gpu_step" "$bin/cuda_kernels" || exit 1
source tests/gpu/libraries.sh
export GRADWIRE_GPU_LIBRARIES=$gpu_libraries
if [[ -s $bin/commit ]]; then
  GRADWIRE_COMMIT=$(<"$bin/commit")
  export GRADWIRE_COMMIT
fi
readonly python=${PYTHON:-python3}

status=0
run() { # run COMMAND...
  echo "=== $*" >&2
  if ! "$@"; then
    echo "FAILED: $*" >&2
    status=1
  fi
}

step() { run "$python" benchmarks/gpu/step.py "$@"; }

# The same batch three times each way, in turns.
graphs() {
  local shape turn
  for shape in 1x256 1x1024 1x4096; do
    for turn in 1 2 3; do
      step --model=Qwen3-0.6B --shape="$shape" --way="master compile" --rounds=3
      run env GRADWIRE_CUDA_GRAPHS=1 "$python" benchmarks/gpu/step.py \
        --model=Qwen3-0.6B --shape="$shape" --way="master compile" --rounds=3
    done
  done
}

ops() { run "$python" benchmarks/gpu/torch_ops.py; }

case "$part" in
  step) step "$@" ;;
  ops) ops ;;
  graphs) graphs ;;
  all)
    for model in Qwen3-0.6B Qwen3-1.7B Qwen3-4B; do
      step --model="$model" --shape=1x4096
      step --model="$model" --shape=4x1024
    done
    ops
    ;;
esac
exit "$status"
