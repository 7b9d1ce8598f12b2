#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs what is missing, builds the server and fine-tunes a real language
# model with a loss written in Python.
#
#   ./quickstart.sh [--steps N] [--out DIR] [--precision f32|bf16]
#
# The arguments are those of `gradwire quickstart`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

tools/setup.sh --quickstart

start=$SECONDS
echo "quickstart: building the server (first time: 5 to 15 minutes)"
if ! bazel build --noshow_progress --ui_event_filters=-info \
  //server:gradwired //server:gradwire_rank; then
  echo "quickstart: the build failed; the compiler's message is above" >&2
  exit 1
fi
echo "quickstart:   done in $((SECONDS - start)) s"

export GRADWIRE_CACHE=${GRADWIRE_CACHE:-$PWD/.cache}
exec .venv/bin/gradwire quickstart "$@"
