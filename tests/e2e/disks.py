# SPDX-License-Identifier: Apache-2.0
"""Disks that are small, and full."""

import contextlib
import os
import subprocess

import pytest


@contextlib.contextmanager
def small_disk(folder, megabytes=4):
    """In the folder's place; skips the test if it may not be mounted."""
    size = f"size={megabytes}m"
    mount = ["mount", "-t", "tmpfs", "-o", size, "none", folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted: not root")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def full(folder, left=0):
    """So many bytes, in whole pages, are left on its disk."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file:
        with pytest.raises(OSError):
            while file.write(bytes(4096)):
                pass
    os.truncate(filler, max(0, filler.stat().st_size - left))
    yield
    filler.unlink()
