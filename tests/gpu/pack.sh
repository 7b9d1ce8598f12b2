#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the tests that need a GPU, and the programs of benchmarks/gpu.sh, and
# puts them with the libraries that they are linked with into tests/gpu/bin, and
# all of that into tests/gpu/bin.tar.xz, for a machine that has a GPU, but not what
# they are built with. cuBLAS and NCCL, which are large, are left out:
# tests/gpu/libraries.sh finds that machine's own.
#
#   tests/gpu/pack.sh              all of them
#   tests/gpu/pack.sh tests        one half
#   tests/gpu/pack.sh benchmarks   the other
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly out=tests/gpu/bin what=${1:-all}
targets=()
case "$what" in
  all | tests)
    mapfile -t targets < <(bazel query --noshow_progress \
      'attr(tags, "\bgpu\b", tests(//...))' 2>/dev/null)
    ;;&
  all | benchmarks)
    targets+=(//benchmarks/gpu:gpu_step //benchmarks/cuda_kernels:cuda_kernels
      //benchmarks/checkpoint:gpu_checkpoint)
    ;;
  tests) ;;
  *)
    echo "pack.sh: unknown argument '$what'; use tests, benchmarks or nothing" >&2
    exit 2
    ;;
esac
bazel build --noshow_progress --config=cuda "${targets[@]}"
bin=$(bazel info bazel-bin 2>/dev/null)
# Every machine's own; libstdc++'s is as new as ours, or newer.
readonly theirs='libnccl\|libcublasLt\|libcuda\|libc\|libm\|libdl\|librt\|libpthread\|libstdc++\|libgcc_s'
rm -rf "$out" "$out.tar.xz"
mkdir -p "$out/lib"
for target in "${targets[@]}"; do
  path=${target#//}
  binary=$bin/${path/://}
  if [[ ! -x $binary ]]; then
    echo "pack.sh: $target was not built: is there a CUDA toolkit, and NCCL?" >&2
    exit 1
  fi
  # Kernels have their own symbols, which this leaves.
  strip -o "$out/$(basename "$binary")" "$binary"
  ldd "$binary" | awk '$2 == "=>" { print $3 }' |
    { grep -v "/\\($theirs\\)\\.so" || true; } |
    xargs -r cp -n -t "$out/lib"
done
git describe --always --dirty '--exclude=*' >"$out/commit" 2>/dev/null || true
XZ_OPT='-1 -T2' tar -cJf "$out.tar.xz" -C tests/gpu bin
touch "$out/commit" # Unpacked already, as tests/gpu/programs.sh sees it.
echo "packed ${#targets[@]} programs, $(du -sm "$out" | cut -f1) MiB: $out" \
  "($(du -sm "$out.tar.xz" | cut -f1) MiB: $out.tar.xz)"
