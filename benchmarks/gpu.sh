#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What one NVIDIA GPU makes of gradwire, beside PyTorch: JSON lines and tables.
#
#   benchmarks/gpu.sh                      all of these, and the table of goals
#   benchmarks/gpu.sh step [ARGUMENTS]     a full step (benchmarks/gpu/step.py)
#   benchmarks/gpu.sh eager                beside PyTorch that is not compiled
#   benchmarks/gpu.sh small                few tokens, beside PyTorch's graphs
#   benchmarks/gpu.sh tight                what does not fit with all activations
#   benchmarks/gpu.sh ragged               lengths of all kinds
#   benchmarks/gpu.sh saves                checkpoints and snapshots
#   benchmarks/gpu.sh ops                  every op of a step
#   benchmarks/gpu.sh graphs               a small model, blocks as graphs or not
#   benchmarks/gpu.sh goals [FILE...]      the table, of lines that are there
#
# The lines also go to $LINES_FILE (tests/gpu/logs/lines.jsonl), after those of
# earlier runs; the table is made of it. Parts that take arguments hand them on.
#
# Needs a GPU, and PyTorch with CUDA in $PYTHON (python3). The programs are those
# of tests/gpu/bin, or of the archive beside it, which tests/gpu/pack.sh makes if
# neither is there. Ends with a status other than 0 if a part has failed, or
# without a GPU.
set -uo pipefail
readonly caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly bin=tests/gpu/bin what=${1:-all}
case "$what" in
  all | step | eager | small | tight | ragged | saves | ops | graphs | goals) ;;
  *)
    echo "gpu.sh: unknown part '$what'; use all, step, eager, small, tight," \
      "ragged, saves, ops, graphs or goals" >&2
    exit 2
    ;;
esac
shift $(($# > 0))
readonly python=${PYTHON:-python3}
in_caller() { [[ $1 == /* ]] && echo "$1" || echo "$caller/$1"; }
file=$PWD/tests/gpu/logs/lines.jsonl
if [[ ${LINES_FILE:-} ]]; then file=$(in_caller "$LINES_FILE"); fi

goals() { # goals [FILE...]
  local files=() given
  for given in "$@"; do files+=("$(in_caller "$given")"); done
  if [[ $# -eq 0 ]]; then files=("$file"); fi
  "$python" benchmarks/gpu/goals.py "${files[@]}"
}
if [[ $what == goals ]]; then
  goals "$@"
  exit
fi

if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
  echo "gpu.sh: this machine has no GPU (nvidia-smi -L lists none)" >&2
  exit 1
fi
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm \
  --format=csv,noheader
source tests/gpu/programs.sh
need_programs benchmarks "$bin/gpu_step" "$bin/cuda_kernels" \
  "$bin/gpu_checkpoint" || exit 1
source tests/gpu/libraries.sh
export GRADWIRE_GPU_LIBRARIES=$gpu_libraries
if [[ -s $bin/commit ]]; then
  GRADWIRE_COMMIT=$(<"$bin/commit")
  export GRADWIRE_COMMIT
fi
mkdir -p "$(dirname "$file")"

status=0
run() { # run COMMAND...
  echo "=== $*" >&2
  if ! "$@" | tee -a "$file"; then
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

eager() {
  local model
  for model in Qwen3-0.6B Qwen3-1.7B; do
    step --model="$model" --shape=1x4096 --way="master head=1024" "$@"
  done
}

small() {
  local shape
  for shape in 1x512 1x2048; do
    step --model=Qwen3-0.6B --shape="$shape" --way="master reduce-overhead" "$@"
  done
}

# PyTorch's ways, from the fastest; those that do not fit are left out.
tight() {
  step --tight --model=Qwen3-8B --shape=1x4096 --moments=bf16 \
    --way="bf16 compile head=1024" --way="bf16 compile ac head=1024" "$@"
  local shape
  for shape in 8x4096 1x32768; do
    step --tight --model=Qwen3-4B --shape="$shape" \
      --way="master compile ac=27 head=1024" \
      --way="master compile ac head=1024" "$@"
  done
}

ragged() { run "$python" benchmarks/gpu/lengths.py "$@"; }
saves() { run "$python" benchmarks/gpu/saves.py "$@"; }
ops() { run "$python" benchmarks/gpu/torch_ops.py "$@"; }

if [[ $what == all ]]; then
  for model in Qwen3-0.6B Qwen3-1.7B Qwen3-4B; do
    for shape in 1x4096 2x4096 4x1024; do
      step --model="$model" --shape="$shape"
    done
  done
  for part in eager small tight ragged saves ops; do "$part"; done
  goals
else
  "$what" "$@"
fi
exit "$status"
