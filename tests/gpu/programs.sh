# SPDX-License-Identifier: Apache-2.0
#
# Sourced in the repository's root by what runs packed programs
# (tests/gpu/pack.sh).

# need_programs HALF FILE...: unpacks the programs, or builds and packs that half
# of them, unless the files are there.
need_programs() {
  local half=$1 archive=tests/gpu/bin.tar.xz file missing=
  shift
  for file in "$@"; do
    if ! compgen -G "$file" >/dev/null; then missing=1; fi
  done
  if [[ ! $missing ]]; then return 0; fi
  if [[ -f $archive ]]; then
    # xz may not be there; Python's is.
    tar -xJf "$archive" -C tests/gpu 2>/dev/null ||
      "${PYTHON:-python3}" -m tarfile -e "$archive" tests/gpu
  else
    tests/gpu/pack.sh "$half"
  fi
}
