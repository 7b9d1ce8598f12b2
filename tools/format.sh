#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Formats C++ and proto files (clang-format), Bazel files (buildifier) and
# Python files (ruff).
#
#   tools/format.sh            rewrites what differs
#   tools/format.sh --check    names what differs and fails
#
# Needs tools/setup.sh --dev.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

check=
case "${1:-}" in
  '') ;;
  --check) check=1 ;;
  *)
    echo "tools/format.sh: unknown argument '$1'; use --check or nothing" >&2
    exit 2
    ;;
esac

readonly buildifier=.cache/buildifier/node_modules/.bin/buildifier
readonly ruff=(.venv/bin/python -m ruff)
if ! command -v clang-format >/dev/null || [[ ! -x $buildifier ]] ||
  ! "${ruff[@]}" --version >/dev/null 2>&1; then
  echo "tools/format.sh: formatters are missing; run tools/setup.sh --dev" >&2
  exit 2
fi

# Tracked files and new ones; what git ignores is generated.
files() { git ls-files -z --cached --others --exclude-standard --deduplicate -- "$@" |
  while IFS= read -r -d '' file; do [[ -f $file ]] && printf '%s\0' "$file"; done; }

status=0
run() { # run 'PATTERN...' FORMATTER...
  local patterns=$1
  shift
  # shellcheck disable=SC2086
  (set -f && files $patterns) | xargs -0 --no-run-if-empty "$@" || status=1
}
readonly cpp='*.cc *.h *.cu *.cuh *.proto'
readonly bazel='*.bazel *.bzl WORKSPACE'

if [[ $check ]]; then
  run "$cpp" clang-format --dry-run -Werror --ferror-limit=1
  run "$bazel" "$buildifier" -mode=check
  run '*.py' "${ruff[@]}" format --quiet --diff
  run '*.py' "${ruff[@]}" check --quiet
else
  run "$cpp" clang-format -i
  run "$bazel" "$buildifier"
  run '*.py' "${ruff[@]}" format --quiet
  run '*.py' "${ruff[@]}" check --quiet --fix
fi

if [[ $check && $status -ne 0 ]]; then
  echo "tools/format.sh: the files above differ; run tools/format.sh" >&2
fi
exit "$status"
