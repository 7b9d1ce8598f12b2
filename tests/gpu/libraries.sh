# SPDX-License-Identifier: Apache-2.0
#
# Sourced in the repository's root: what packed programs are linked with but do
# not bring. cuBLAS and NCCL are those of $NCCL_HOME, of tools/setup.sh, of the
# toolkit, or of PyTorch, whichever is found first.
#
# Sets $gpu_libraries, a search path for LD_LIBRARY_PATH.

# python_package NAME: where it lies, if it is there.
python_package() {
  "${PYTHON:-python3}" -c "import $1; print(list($1.__path__)[0])" 2>/dev/null
}

gpu_libraries=$PWD/tests/gpu/bin/lib
# find_library FILE PLACE...: in the first of the places that has it.
find_library() {
  local file=$1 place
  shift
  for place in "$@"; do
    if [[ -n $place && -e $place/$file ]]; then
      gpu_libraries+=:$place
      return
    fi
  done
  echo "$file was not found; what needs it will fail" >&2
}
find_library libnccl.so.2 "${NCCL_HOME:+$NCCL_HOME/lib}" \
  .cache/cuda/nvidia/nccl/lib "$(python_package nvidia.nccl)/lib"
find_library libcublasLt.so.13 .cache/cuda/nvidia/cu13/lib \
  "${CUDA_HOME:-/usr/local/cuda}/lib64" "$(python_package nvidia.cu13)/lib" \
  "$(python_package nvidia.cublas)/lib"
gpu_libraries+=${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
