#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the tests that need a GPU, and puts them with the libraries that they
# are linked with into tests/gpu/bin, for a machine that has a GPU, but not what
# they are built with. cuBLAS and NCCL, which are large, are left out:
# tests/gpu/run.sh looks for that machine's own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly out=tests/gpu/bin
mapfile -t targets < <(bazel query --noshow_progress \
  'attr(tags, "\bgpu\b", tests(//...))' 2>/dev/null)
bazel build --noshow_progress --config=cuda "${targets[@]}"
bin=$(bazel info bazel-bin 2>/dev/null)
rm -rf "$out"
mkdir -p "$out/lib"
for target in "${targets[@]}"; do
  path=${target#//}
  binary=$bin/${path/://}
  if [[ ! -x $binary ]]; then
    echo "pack.sh: $target was not built: is there a CUDA toolkit, and NCCL?" >&2
    exit 1
  fi
  cp "$binary" "$out/"
  ldd "$binary" | awk '$2 == "=>" { print $3 }' |
    { grep -v '/\(libnccl\|libcublasLt\|libcuda\|libc\|libm\|libdl\|librt\|libpthread\)\.so' || true; } |
    xargs -r cp -n -t "$out/lib"
done
echo "packed $(ls "$out" | grep -c _test) tests, $(du -sm "$out" | cut -f1) MiB: $out"
