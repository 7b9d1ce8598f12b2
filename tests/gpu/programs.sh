# SPDX-License-Identifier: Apache-2.0
#
# Sourced in the repository's root by what runs packed programs
# (tests/gpu/pack.sh).

# need_programs HALF FILE...: unpacks the archive if it is newer than what was
# unpacked before, or builds and packs that half of the programs, unless the files
# are there.
need_programs() {
  local half=$1 bin=tests/gpu/bin archive=tests/gpu/bin.tar.xz file
  shift
  if [[ -f $archive && $archive -nt $bin/commit ]]; then
    rm -rf "$bin"
    # xz may not be there; Python's is.
    tar -xJmf "$archive" -C tests/gpu 2>/dev/null ||
      "${PYTHON:-python3}" -m tarfile -e "$archive" tests/gpu || return
    touch "$bin/commit"
  fi
  for file in "$@"; do
    if compgen -G "$file" >/dev/null; then continue; fi
    tests/gpu/pack.sh "$half"
    return
  done
}
