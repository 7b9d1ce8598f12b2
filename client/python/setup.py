# SPDX-License-Identifier: Apache-2.0
"""Generates gradwire/_proto from ../../proto, then lets setuptools work."""

import pathlib
import re

from setuptools import setup

_HERE = pathlib.Path(__file__).resolve().parent
_PROTO = _HERE.parents[1] / "proto"
_OUT = _HERE / "gradwire" / "_proto"
_IMPORT = re.compile(r"^from gradwire\.v1 import", re.MULTILINE)


def generate():
    """Writes the messages and stubs as modules below gradwire._proto."""
    import grpc_tools
    from grpc_tools import protoc

    _OUT.mkdir(exist_ok=True)
    included = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    files = sorted(
        str(file)
        for file in (_PROTO / "gradwire" / "v1").glob("*.proto")
        if file.name != "rank.proto"
    )
    status = protoc.main(
        [
            "protoc",
            f"-I{_PROTO}",
            f"-I{included}",
            f"--python_out={_OUT}",
            f"--grpc_python_out={_OUT}",
            *files,
        ]
    )
    if status:
        raise SystemExit(f"setup.py: protoc failed with status {status}")
    package = _OUT / "gradwire" / "v1"
    for folder in (_OUT, package.parent, package):
        (folder / "__init__.py").touch()
    for file in package.glob("*_pb2*.py"):
        text = file.read_text(encoding="utf-8")
        text = _IMPORT.sub("from gradwire._proto.gradwire.v1 import", text)
        file.write_text(text, encoding="utf-8")


# A source distribution carries the modules and no proto folder.
if _PROTO.is_dir():
    generate()

setup()
