# SPDX-License-Identifier: Apache-2.0
"""Deltas of the C++ encoder, read by dlt1.py and by the page's own reader."""

import os
import pathlib
import re
import subprocess
import textwrap

import dlt1
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
WRITER = pathlib.Path(
    os.environ.get("GRADWIRE_DELTA_SAMPLE")
    or ROOT / "bazel-bin" / "tests" / "delta" / "write_sample"
)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    directory = tmp_path_factory.mktemp("delta")
    assert WRITER.exists(), "bazel build //tests/delta:write_sample"
    subprocess.run([WRITER, directory], check=True)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}

    def side(prefix):
        return {
            name.removeprefix(prefix): data
            for name, data in files.items()
            if name.startswith(prefix)
        }

    return files["delta.safetensors"], side("old."), side("new.")


def test_an_independent_reader_gets_the_same_bytes(sample):
    file, old, new = sample
    delta, result = dlt1.apply(file, old)
    assert result == new
    shapes = {t["name"]: (t["dtype"], t["shape"]) for t in delta["tensors"]}
    before = [
        (name, *shapes[name], dlt1.tensor_hash(data, dlt1.BYTES[dtype]))
        for name, data in old.items()
        for dtype in [shapes[name][0]]
    ]
    assert dlt1.weight_id(before) == delta["prev_id"] == delta["base_id"]
    assert (delta["model"], delta["step"]) == ("sample", 3)


def test_the_sample_uses_every_method(sample):
    file, old, _ = sample
    used = set()
    take = dlt1.new_chunk

    def spy(table, c, *arguments):
        used.add(int(table.method[c]))
        return take(table, c, *arguments)

    dlt1.new_chunk = spy
    try:
        dlt1.apply(file, old)
    finally:
        dlt1.new_chunk = take
    assert used >= {1, 2, 3, 4}


def test_a_wrong_base_is_found(sample):
    file, old, _ = sample
    wrong = dict(old)
    wrong["gaps"] = bytes([wrong["gaps"][0] ^ 1]) + wrong["gaps"][1:]
    with pytest.raises(AssertionError):
        dlt1.apply(file, wrong)


def test_the_reader_of_the_page_reads(sample):
    file, old, new = sample
    page = (ROOT / "docs" / "delta.md").read_text(encoding="utf-8")
    code = re.search(r"with no checks:\n\n(.*)\Z", page, re.DOTALL)
    scope = {}
    exec(textwrap.dedent(code.group(1)), scope)
    weights = {
        name: np.frombuffer(old.get(name, bytes(len(data))), np.uint16).copy()
        for name, data in new.items()
    }
    scope["apply"](file, weights)
    for name, data in new.items():
        if name != "raw":  # float32
            assert weights[name].tobytes() == data, name
