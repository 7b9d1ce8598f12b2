# SPDX-License-Identifier: Apache-2.0
"""A reader of delta files that was written from docs/delta.md alone.

It checks all that the page says can be checked, and is slow.
"""

import json
import struct

import numpy as np
import xxhash
import zstandard

CHUNK = 65536
BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "U8": 1}
GAPS, BITMAP, VALUES, ESCAPES, LOW, HIGH, PLANES = range(7)


def _crc_table():
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ 0x82F63B78, table >> 1)
    return [int(entry) for entry in table]


_CRC = _crc_table()


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def xxh128(data):
    return xxhash.xxh3_128_digest(data)


def tensor_hash(data, element):
    step = CHUNK * element
    hashes = [xxh128(data[i : i + step]) for i in range(0, len(data), step)]
    return xxh128(b"".join(hashes))


def weight_id(tensors):
    """Of (name, dtype, shape, hash) tuples."""

    def number(value):
        return struct.pack("<q", value)

    text = b""
    for name, dtype, shape, digest in sorted(tensors):
        for word in (name.encode(), dtype.encode()):
            text += number(len(word)) + word
        text += number(len(shape)) + b"".join(map(number, shape)) + digest
    return xxh128(text).hex()


def key(x):
    return np.where(x >= 0x8000, ~x, x | 0x8000).astype(np.uint16)


def from_key(k):
    return np.where(k >= 0x8000, k & 0x7FFF, ~k).astype(np.uint16)


def unpack(stored, size):
    if len(stored) == size:
        return stored
    frame = zstandard.get_frame_parameters(stored)
    assert frame.content_size == size
    return zstandard.ZstdDecompressor().decompress(stored)


class Table:
    def __init__(self, planes, chunks):
        p = np.frombuffer(planes, np.uint8).reshape(12, chunks).astype(int)
        self.method, self.flags = p[0], p[1]
        self.changed = np.where(p[0] == 0, 0, p[2] + 256 * p[3] + 1)
        self.extensions = p[4] + 256 * p[5]
        self.escapes = p[6] + 256 * p[7]
        self.crc = p[8] + (p[9] << 8) + (p[10] << 16) + (p[11] << 24)

    def stream_bytes(self, c, n, element):
        """Of chunk c, which has n elements."""
        m, changed = self.method[c], self.changed[c]
        sizes = [0] * (PLANES + element)
        if m == 1:
            sizes[GAPS] = changed + self.extensions[c]
        if m == 2:
            sizes[BITMAP] = (n + 7) // 8
        if m in (1, 2):
            sizes[VALUES] = changed
            sizes[ESCAPES] = 2 * self.escapes[c]
        if m == 3:
            sizes[LOW] = sizes[HIGH] = n
        if m == 4:
            sizes[PLANES:] = [n] * element
        return sizes


class Streams:
    """The bytes of each stream that are left."""

    def __init__(self, payload, stored, sizes):
        self.left = []
        for size_stored, size in zip(stored, sizes, strict=True):
            self.left.append(unpack(payload[:size_stored], size))
            payload = payload[size_stored:]
        assert not payload

    def take(self, stream, size):
        part = self.left[stream][:size]
        assert len(part) == size
        self.left[stream] = self.left[stream][size:]
        return np.frombuffer(part, np.uint8)


def new_chunk(table, c, old, n, element, streams):
    """The new bytes of a chunk, from its old ones."""
    m = table.method[c]
    if m == 0:
        return old
    if m == 4:
        planes = [streams.take(PLANES + p, n) for p in range(element)]
        return np.stack(planes, axis=1).tobytes()
    x = np.frombuffer(old, np.uint16).copy()
    if m == 3:
        at = np.arange(n)
        low = streams.take(LOW, n).astype(np.uint16)
        z = low | streams.take(HIGH, n).astype(np.uint16) << 8
    else:
        if m == 1:
            gaps = streams.take(GAPS, table.changed[c] + table.extensions[c])
            at, position = [], 0
            for gap in gaps:
                position += int(gap)
                if gap != 255:
                    at.append(position)
                    position += 1
        else:
            bits = np.unpackbits(
                streams.take(BITMAP, (n + 7) // 8), bitorder="little"
            )
            assert not bits[n:].any()
            at = np.flatnonzero(bits)
        assert len(at) == table.changed[c]
        z = streams.take(VALUES, len(at)).astype(np.uint16)
        escapes = streams.take(ESCAPES, 2 * table.escapes[c])
        z[z == 255] = np.frombuffer(escapes.tobytes(), "<u2")
        assert z.all()
    d = np.where(z & 1, ~(z >> 1), z >> 1).astype(np.uint16)
    x[at] = from_key(key(x[at]) + d)
    return x.tobytes()


def apply(file, weights):
    """The new weights, by name, from the old ones (bytes)."""
    (length,) = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + length])
    data = file[8 + length :]
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "dlt1"
    assert xxh128(metadata["delta"].encode()).hex() == metadata["digest"]
    delta = json.loads(metadata["delta"])

    def entry(name):
        begin, end = header[name]["data_offsets"]
        return data[begin:end]

    result, hashes = {}, []
    for tensor in delta["tensors"]:
        name, element = tensor["name"], BYTES[tensor["dtype"]]
        elements = int(np.prod(tensor["shape"], dtype=np.int64))
        fresh = "fresh" in tensor
        old = bytes(elements * element) if fresh else weights[name]
        new = old
        if "groups" in tensor:
            new = apply_tensor(tensor, entry, old, element)
        digest = tensor_hash(new, element)
        assert digest.hex() == tensor["hash"]
        hashes.append((name, tensor["dtype"], tensor["shape"], digest))
        result[name] = new
    assert weight_id(hashes) == delta["id"]
    return delta, result


def apply_tensor(tensor, entry, old, element):
    chunks = sum(group["chunks"] for group in tensor["groups"])
    stored = entry("table/" + tensor["name"])
    assert xxhash.xxh3_64_hexdigest(stored) == tensor["table_digest"]
    table = Table(unpack(stored, 12 * chunks), chunks)
    payload = entry("payload/" + tensor["name"])
    new, c = [], 0
    for group in tensor["groups"]:
        size = sum(group["sizes"])
        part, payload = payload[:size], payload[size:]
        assert xxhash.xxh3_64_hexdigest(part) == group["digest"]
        members = range(c, c + group["chunks"])
        olds = [old[CHUNK * element * i :][: CHUNK * element] for i in members]
        lengths = [len(o) // element for o in olds]
        sizes = np.sum(
            [
                table.stream_bytes(i, n, element)
                for i, n in zip(members, lengths, strict=True)
            ],
            axis=0,
        )
        streams = Streams(part, group["sizes"], [int(s) for s in sizes])
        for i, o, n in zip(members, olds, lengths, strict=True):
            new.append(new_chunk(table, i, o, n, element, streams))
            assert crc32c(new[-1]) == table.crc[i]
        assert not any(streams.left)
        c += group["chunks"]
    assert not payload
    return b"".join(new)
