# SPDX-License-Identifier: Apache-2.0
"""The messages between a supervisor and its ranks, as Python modules.

They are no part of the client's package, so they are generated here.
"""

import importlib
import pathlib
import re
import sys
import tempfile

import grpc_tools
from grpc_tools import protoc

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_IMPORT = re.compile(r"^from gradwire\.v1 import (\w+)_pb2", re.MULTILINE)


def _place(match):
    name = match.group(1)
    return (
        "import rank_pb2"
        if name == "rank"
        else f"from gradwire._proto.gradwire.v1 import {name}_pb2"
    )


def _generate():
    folder = tempfile.TemporaryDirectory(prefix="gradwire-proto-")
    out = pathlib.Path(folder.name)
    included = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    status = protoc.main(
        [
            "protoc",
            f"-I{_ROOT / 'proto'}",
            f"-I{included}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            "gradwire/v1/rank.proto",
        ]
    )
    assert status == 0
    modules = []
    sys.path.insert(0, str(out))
    for name in ("rank_pb2", "rank_pb2_grpc"):
        text = (out / "gradwire" / "v1" / f"{name}.py").read_text()
        (out / f"{name}.py").write_text(_IMPORT.sub(_place, text))
        modules.append(importlib.import_module(name))
    sys.path.remove(str(out))
    folder.cleanup()
    return modules


rank_pb2, rank_pb2_grpc = _generate()
