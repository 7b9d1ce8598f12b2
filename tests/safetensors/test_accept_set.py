# SPDX-License-Identifier: Apache-2.0
"""What gradwire reads as a safetensors file, the safetensors package does, too.

Files with every known trick, and thousands of changes of valid ones: whatever
our reader accepts, the package opens, with the same names, dtypes, shapes and
bytes. Otherwise one file would be two models.
"""

import json
import os
import pathlib
import random
import struct
import subprocess

import numpy as np
import pytest
import safetensors

ROOT = pathlib.Path(__file__).resolve().parents[2]
READER = pathlib.Path(
    os.environ.get("GRADWIRE_SAFETENSORS_READER")
    or ROOT / "bazel-bin" / "tests" / "safetensors" / "read_files"
)

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I16": 2}
SIZES |= {"U8": 1, "BOOL": 1, "F8_E4M3": 1, "U32": 4}

# Pieces of JSON that parsers disagree on, or that have no place.
TOKENS = [
    *(b"\0", b"\0x", b"\xef\xbb\xbf", b"-0", b"-1", b"1.0", b"1e1", b"1e400"),
    *(b"NaN", b"Infinity", b"null", b"true", b'""', b"\\u0000", b"\\ud800"),
    *(b"/**/", b"//\n", b",", b":", b"{", b"}", b"[", b"]", b"{}", b"[]"),
    *(b'"', b"\\", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x7f"),
    *(b" ", b"\n", b"\t", b"\x0b", b"\x0c", b"0", b"00", b"+1", b"0x1"),
    *(b"9223372036854775808", b"18446744073709551616", b"4294967296"),
    *(b'"U16"', b'"F8_E5M2"', b'"F4"', b'"C64"', b'"bf16"', b"'a'", b'"x":1,'),
]


def pack(header, data=b"", length=None):
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    if length is None:
        length = len(header)
    return struct.pack("<Q", length & 0xFFFFFFFFFFFFFFFF) + header + data


def entry(dtype="F32", shape=(1,), begin=0, end=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def valid_file(rng):
    header, data = {}, b""
    if rng.random() < 0.5:
        header["__metadata__"] = {"format": "pt", "ä": "\n"}
    for i in range(rng.randrange(4)):
        dtype = rng.choice(list(SIZES))
        shape = [rng.randrange(4) for _ in range(rng.randrange(3))]
        size = SIZES[dtype] * int(np.prod(shape, dtype=int))
        name = rng.choice(["w", "ü", "a.b", ""]) + str(i)
        header[name] = entry(dtype, shape, len(data), len(data) + size)
        data += rng.randbytes(size)
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5)
    return pack(text + " " * rng.choice([0, 0, 3]), data)


def tricks():
    """Name and file, each with one thing that some reader gets wrong."""
    a, word = entry(), b"\1\2\3\4"
    both = {"a": a, "b": entry(begin=4, end=8)}
    text = json.dumps({"a": a})
    inner = text[1:-1]
    big = 1 << 51

    def shaped(shape, data=b""):
        return pack(
            f'{{"a":{{"dtype":"F32","shape":{shape},'
            f'"data_offsets":[0,{len(data)}]}}}}',
            data,
        )

    return {
        "valid": pack({"a": a}, word),
        "two": pack(both, word * 2),
        "out of order": pack({"b": both["b"], "a": a}, word * 2),
        "no tensors": pack("{}"),
        "empty": b"",
        "seven bytes": b"\0" * 7,
        "no header": pack(""),
        "overlap": pack({"a": a, "b": a}, word),
        "partial overlap": pack(
            {"a": a, "b": entry(begin=2, end=6)}, b"123456"
        ),
        "gap before": pack({"a": entry(begin=4, end=8)}, word * 2),
        "gap between": pack({"a": a, "b": entry(begin=8, end=12)}, word * 3),
        "trailing byte": pack({"a": a}, word + b"x"),
        "trailing without tensors": pack("{}", b"x"),
        "a byte missing": pack({"a": a}, word[:3]),
        "reversed": pack({"a": entry(begin=4, end=0)}, word),
        "negative begin": pack({"a": entry(begin=-4, end=0)}, word),
        "offset of 2^64": pack({"a": entry(begin=1 << 64, end=4)}, word),
        "offset of 2^63": pack({"a": entry(end=(1 << 63) + 4)}, word),
        "offsets that wrap": pack(
            {"a": entry(begin=(1 << 64) - 4, end=0)}, word
        ),
        "three offsets": pack({"a": {**a, "data_offsets": [0, 4, 4]}}, word),
        "one offset": pack({"a": {**a, "data_offsets": [0]}}, word),
        "header of 2^63": pack({"a": a}, word, 1 << 63),
        "header of -1": pack({"a": a}, word, -1),
        "header of 100 MB": pack({"a": a}, word, 100_000_001),
        "header longer than the file": pack({"a": a}, word, len(text) + 5),
        "header shorter by one": pack({"a": a}, word, len(text) - 1),
        "header with the data": pack({"a": a}, word, len(text) + 4),
        "a name twice": pack("{" + inner + "," + inner + "}", word),
        "a name twice by an escape": pack(
            "{" + inner + "," + inner.replace('"a"', '"\\u0061"') + "}", word
        ),
        "a dtype twice": pack(
            text.replace('"dtype"', '"dtype":"F32","dtype"', 1), word
        ),
        "an unknown member": pack({"a": {**a, "x": [1, {"y": None}]}}, word),
        "an unknown member of 1e400": pack(text[:-2] + ',"x":1e400}}', word),
        "an unknown member of NaN": pack(text[:-2] + ',"x":NaN}}', word),
        "an unknown deep member": pack(
            {"a": {**a, "x": [[[[[[[[[[[[1]]]]]]]]]]]]}}, word
        ),
        "metadata twice": pack('{"__metadata__":{},"__metadata__":{}}'),
        "metadata null": pack({"__metadata__": None}),
        "metadata of a number": pack({"__metadata__": 3}),
        "metadata of a list": pack({"__metadata__": []}),
        "metadata with a number": pack({"__metadata__": {"a": 1}}),
        "metadata with null": pack({"__metadata__": {"a": None}}),
        "metadata with an object": pack({"__metadata__": {"a": {"b": "c"}}}),
        "metadata with a name twice": pack(
            '{"__metadata__":{"a":"b","a":"c"}}'
        ),
        "metadata like a tensor": pack({"__metadata__": a}, word),
        "an empty name": pack({"": a}, word),
        "a name with a zero": pack({"a\0b": a}, word),
        "a lone surrogate": pack(text.replace('"a"', '"\\ud800"'), word),
        "a pair of surrogates": pack(
            text.replace('"a"', '"\\ud83d\\ude00"'), word
        ),
        "a control character": pack(text.replace('"a"', '"\x01"'), word),
        "not UTF-8": pack(text.encode().replace(b'"a"', b'"\xff"'), word),
        "an overlong form": pack(
            text.encode().replace(b'"a"', b'"\xc0\xaf"'), word
        ),
        "a coded surrogate": pack(
            text.encode().replace(b'"a"', b'"\xed\xa0\x80"'), word
        ),
        "a byte order mark": pack(b"\xef\xbb\xbf" + text.encode(), word),
        "UTF-16": pack(text.encode("utf-16"), word),
        "space before": pack(" " + text, word),
        "line feeds around": pack("\n" + text + "\n\n", word),
        "space behind": pack(text + " " * 9, word),
        "zeros behind": pack(text + "\0" * 5, word),
        "text behind a zero": pack(text + '\0{"b":1}', word),
        "a zero within": pack(text.replace(":", ":\0", 1), word),
        "a form feed behind": pack(text + "\f", word),
        "two objects": pack(text + "{}", word),
        "a comma at the end": pack(text[:-1] + ",}", word),
        "a comment": pack(text + "/* */", word),
        "single quotes": pack(text.replace('"', "'"), word),
        "a list": pack("[" + text + "]", word),
        "a text": pack('"a"'),
        "null": pack("null"),
        "a tensor of null": pack('{"a":null}'),
        "a tensor of a list": pack('{"a":["F32",[1],[0,4]]}', word),
        "a tensor of nothing": pack('{"a":{}}'),
        "a scalar": shaped("[]", word),
        "nine dimensions": shaped("[1,1,1,1,1,1,1,1,1]", word),
        "a dimension of zero": shaped("[0,5]"),
        "a dimension of -0": shaped("[-0]"),
        "a dimension of -1": shaped("[-1]", word),
        "dimensions of -1": shaped("[-1,-1]", word),
        "a dimension of 1.0": shaped("[1.0]", word),
        "a dimension of 1e0": shaped("[1e0]", word),
        "a dimension of NaN": shaped("[NaN]", word),
        "a dimension of 1e400": shaped("[1e400]", word),
        "a dimension of 01": shaped("[01]", word),
        "a dimension of a text": shaped('["1"]', word),
        "a dimension of null": shaped("[null]", word),
        "a dimension of true": shaped("[true]", word),
        "a product of 2^64": shaped(f"[{1 << 32},{1 << 32}]"),
        "a product of 2^64 + 1": shaped("[274177,67280421310721]", word),
        "bytes of 2^64": shaped(f"[{1 << 62}]"),
        "zero and a product of 2^102": shaped(f"[0,{big},{big}]"),
        "a product of 2^102 and zero": shaped(f"[{big},{big},0]"),
        "a shape of null": shaped("null", word),
        "a dtype of null": pack({"a": {**a, "dtype": None}}, word),
        "an unknown dtype": pack({"a": entry("F31")}, word),
        "a dtype in lower case": pack({"a": entry("f32")}, word),
        "half a byte": pack({"a": entry("F4", [8])}, word),
        "empty tensors in one place": pack(
            {"a": entry(shape=[0], end=0), "b": entry(shape=[0], end=0)}
        ),
        "an empty tensor within another": pack(
            {
                "a": entry(shape=[2], end=8),
                "b": entry(shape=[0], begin=4, end=4),
            },
            word * 2,
        ),
        "an empty tensor behind the end": pack(
            {"a": a, "b": entry(shape=[0], begin=4, end=4)}, word
        ),
    }


def change(file, rng):
    """Changes bytes of the header or of the file."""
    length = min(struct.unpack("<Q", file[:8])[0], len(file) - 8)
    text, data = bytearray(file[8 : 8 + length]), bytearray(file[8 + length :])
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(text) + 1)
        kind = rng.randrange(8)
        if kind == 0:
            text[at:at] = rng.choice(TOKENS)
        elif kind == 1:
            size = rng.randrange(12)
            text[at : at + size] = rng.choice(TOKENS)
        elif kind == 2 and at < len(text):
            text[at] = rng.randrange(256)
        elif kind == 3:
            other, size = rng.randrange(len(text) + 1), rng.randrange(40)
            text[at:at] = text[other : other + size]
        elif kind == 4:
            del text[at : at + rng.randrange(1, 6)]
        elif kind == 5 and any(48 <= c <= 57 for c in text):
            digits = [i for i, c in enumerate(text) if 48 <= c <= 57]
            text[rng.choice(digits)] = rng.choice(b"0123456789")
        elif kind == 6:
            data[:] = data[: rng.randrange(len(data) + 1)]
        else:
            data += rng.randbytes(rng.randrange(4))
    length = len(text)
    if rng.random() < 0.05:
        length = max(0, length + rng.choice([-1, 1, 8]))
    return pack(bytes(text), bytes(data), length)


def rewrite(file, rng):
    """Changes values of the header."""
    length = struct.unpack("<Q", file[:8])[0]
    header = json.loads(file[8 : 8 + length])
    numbers = [0, 1, 2, 3, 4, 5, 8, 12, -1, -4, 1.0, 1 << 31, 1 << 48, 1 << 51]
    numbers += [(1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, None, "1", True]
    for name in list(header):
        if name == "__metadata__" or rng.random() < 0.3:
            continue
        tensor = header[name]
        kind = rng.randrange(5)
        if kind == 0:
            tensor["dtype"] = rng.choice([*SIZES, "U64", "I8", "F8_E5M2", "X"])
        elif kind == 1:
            tensor["shape"] = [
                rng.choice(numbers) for _ in range(rng.randrange(4))
            ]
        elif kind == 2:
            tensor["data_offsets"][rng.randrange(2)] = rng.choice(numbers)
        elif kind == 3:
            rng.shuffle(tensor["shape"])
            tensor["shape"].append(rng.choice([0, 1, 1]))
        else:
            header[rng.choice(["a", "__metadata__", name + "'"])] = header.pop(
                name
            )
    return pack(json.dumps(header), file[8 + length :])


def generated(count):
    rng = random.Random(20)
    for i in range(count):
        file = valid_file(rng)
        kind = i % 4
        if kind > 1:
            file = rewrite(file, rng)
        if kind in (1, 3):
            file = change(file, rng)
        yield f"generated {i}", file


def read_all(files, directory):
    """What our reader says of each file."""
    assert READER.exists(), "bazel build //tests/safetensors:read_files"
    paths = []
    for i, file in enumerate(files):
        paths.append(directory / f"{i}.safetensors")
        paths[-1].write_bytes(file)
    done = subprocess.run(
        [READER],
        input="".join(f"{path}\n" for path in paths),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return paths, [json.loads(line) for line in done.stdout.splitlines()]


def as_floats(dtype, data):
    if dtype == "BF16":
        wide = np.frombuffer(data, "<u2").astype("<u4") << 16
        return wide.astype("<u4").view("<f4")
    return np.frombuffer(data, "<f4" if dtype == "F32" else "<f2").astype("<f4")


def check_same(name, file, path, ours):
    """That the package says of a file what ours does."""
    theirs = dict(safetensors.deserialize(file))
    assert set(theirs) == set(ours), name
    for tensor, their in theirs.items():
        our = ours[tensor]
        assert our["dtype"] == their["dtype"], name
        assert our["shape"] == their["shape"], name
        data = file[our["offset"] : our["offset"] + our["bytes"]]
        assert data == bytes(their["data"]), name
        if "floats" in our:
            np.testing.assert_array_equal(
                np.frombuffer(bytes.fromhex(our["floats"]), "<f4"),
                as_floats(our["dtype"], data),
                err_msg=name,
            )
    with safetensors.safe_open(path, framework="np") as opened:
        assert set(opened.keys()) == set(ours), name
        for tensor, our in ours.items():
            part = opened.get_slice(tensor)
            assert part.get_dtype() == our["dtype"], name
            assert part.get_shape() == our["shape"], name


def is_read_by_the_package(file):
    try:
        safetensors.deserialize(file)
    except safetensors.SafetensorError:
        return False
    return True


def compare(files, directory):
    """Checks all files; how many were accepted by both, and by neither."""
    paths, results = read_all([file for _, file in files], directory)
    assert len(results) == len(files)
    wrong, accepted, refused = [], 0, 0
    for (name, file), path, result in zip(files, paths, results, strict=True):
        if "tensors" not in result:
            assert result["error"] == "SAFETENSORS_INVALID", name
            refused += not is_read_by_the_package(file)
        elif is_read_by_the_package(file):
            check_same(name, file, path, result["tensors"])
            accepted += 1
        else:
            wrong.append((name, file))
    assert not wrong
    return accepted, refused


def test_no_trick_makes_a_file_that_only_we_read(tmp_path):
    files = list(tricks().items())
    accepted, refused = compare(files, tmp_path)
    # Neither reader refuses all of them.
    assert accepted >= 12
    assert refused >= 60


def test_plain_files_are_read(tmp_path):
    wanted = ["valid", "two", "out of order", "no tensors", "a scalar"]
    wanted += [
        "space behind",
        "empty tensors in one place",
        "an unknown member",
    ]
    _, results = read_all([tricks()[name] for name in wanted], tmp_path)
    assert all("tensors" in result for result in results)


@pytest.mark.parametrize("count", [6000])
def test_no_change_makes_a_file_that_only_we_read(count, tmp_path):
    files = list(generated(count))
    accepted, refused = compare(files, tmp_path)
    assert accepted >= count // 4
    assert refused >= count // 4
