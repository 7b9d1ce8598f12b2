# SPDX-License-Identifier: Apache-2.0
"""Datums and gradients as streamed messages with a commit record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import xxhash

from gradwire._proto.gradwire.v1 import data_pb2
from gradwire.datum import Datum, to_array
from gradwire.errors import ServerError, invalid
from gradwire.types import ForwardBackwardResult

# Of one message; far below every server's limit, so that uploads overlap.
CHUNK_BYTES = 2 << 20

_DTYPES = {
    data_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    data_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
    data_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
}


def message(kind: Any, /, **fields: Any) -> Any:
    """A message of these fields; an error that names one that cannot be.

    Made before the call has a number, so that none is taken in vain.
    """
    try:
        return kind(**fields)
    except (TypeError, ValueError, AttributeError):
        for name, value in fields.items():
            try:
                kind(**{name: value})
            except (TypeError, ValueError, AttributeError) as error:
                raise invalid(
                    "BAD_ARGUMENT",
                    f"{name} cannot be {value!r} ({type(value).__name__}): "
                    f"{error}",
                    field=name,
                    value=repr(value),
                ) from None
        raise


def reference(what: Any) -> Any:
    """The path of a checkpoint or snapshot, or of a result that has one."""
    return getattr(what, "path", what)


def numbered(request: Any, seq: int) -> Any:
    """A copy with its number: a request may be sent again beside another."""
    copy = type(request)()
    copy.CopyFrom(request)
    copy.seq_id = seq
    return copy


def encode_tensor(values: Any, dtype: int) -> data_pb2.TensorData:
    array = to_array(values, _DTYPES[dtype])
    return data_pb2.TensorData(
        dtype=dtype, shape=array.shape, data=array.tobytes()
    )


def decode_tensor(tensor: Any) -> np.ndarray:
    if tensor.dtype not in _DTYPES:
        raise ServerError("a tensor has no known dtype", reason="BAD_RESULT")
    array = np.frombuffer(tensor.data, _DTYPES[tensor.dtype])
    return array.reshape(tuple(tensor.shape)).copy()


def encode_datum(datum: Datum) -> data_pb2.Datum:
    message = data_pb2.Datum()
    chunk = message.chunks.add()
    chunk.text.tokens = datum.model_input.tokens.astype("<i4").tobytes()
    for name, values in datum.loss_fn_inputs.items():
        integer = name == "target_tokens"
        if integer:
            array = to_array(values, None)
            if array.size and array.dtype.kind not in "iu":
                raise invalid(
                    "SHAPE_MISMATCH",
                    f"target_tokens must be integers, not {array.dtype}",
                    field=name,
                    value=str(array.dtype),
                )
        tensor = message.loss_fn_inputs[name]
        tensor.dtype = (
            data_pb2.DATA_TYPE_INT64 if integer else data_pb2.DATA_TYPE_FLOAT32
        )
        array = to_array(values, _DTYPES[tensor.dtype])
        tensor.shape.extend(array.shape)
        tensor.data = array.tobytes()
    return message


def size(datums: Sequence[Any]) -> int:
    """Bytes of encoded datums."""
    return sum(datum.ByteSize() for datum in datums)


class Digest:
    """Counts and hashes payload in stream order."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self._items = 0
        self._bytes = 0

    def _add(self, *parts: bytes) -> None:
        for part in parts:
            self._hash.update(part)
            self._bytes += len(part)

    def add_datum(self, datum: Any) -> None:
        self._items += 1
        for chunk in datum.chunks:
            self._add(chunk.text.tokens)
        names = sorted(datum.loss_fn_inputs, key=lambda name: name.encode())
        for name in names:
            tensor = datum.loss_fn_inputs[name]
            self._add(
                name.encode(),
                tensor.data,
                tensor.csr_columns,
                tensor.csr_row_offsets,
            )

    def add_tensor(self, tensor: Any) -> None:
        self._items += 1
        self._add(tensor.data)

    def commit(self) -> data_pb2.CommitRecord:
        return data_pb2.CommitRecord(
            datum_count=self._items,
            byte_count=self._bytes,
            xxh3_128=self._hash.digest(),
        )


def _chunked(messages: Iterable[Any]) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    size = 0
    for message in messages:
        more = message.ByteSize()
        if chunk and size + more > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(message)
        size += more
    if chunk:
        yield chunk


def datum_stream(datums: Sequence[Any]) -> Iterator[Any]:
    """DatumChunks of encoded datums, then their CommitRecord."""
    digest = Digest()
    for chunk in _chunked(datums):
        for datum in chunk:
            digest.add_datum(datum)
        yield data_pb2.DatumChunk(datums=chunk)
    yield digest.commit()


def fits_header(datums: Sequence[Any]) -> bool:
    """Whether a batch may travel with its header."""
    return bool(datums) and size(datums) <= CHUNK_BYTES


def fill_header(header: Any, parts: Iterator[Any]) -> None:
    """Puts all of a datum_stream, one chunk and its record, into a header."""
    header.datums.CopyFrom(next(parts))
    header.datums_commit.CopyFrom(next(parts))


def gradient_stream(gradients: Sequence[np.ndarray]) -> Iterator[Any]:
    """GradientChunks, one item for each datum, then their CommitRecord."""
    digest = Digest()
    items = (
        data_pb2.GradientItem(
            datum_index=index,
            d_logprobs=encode_tensor(gradient, data_pb2.DATA_TYPE_FLOAT32),
        )
        for index, gradient in enumerate(gradients)
    )
    for chunk in _chunked(items):
        for item in chunk:
            digest.add_tensor(item.d_logprobs)
        yield data_pb2.GradientChunk(items=chunk)
    yield digest.commit()


class LogprobReader:
    """Collects logprobs that come in any order and checks their commit."""

    def __init__(self, count: int):
        self.logprobs: list[Any] = [None] * count
        self.top_k_logprobs: list[Any] = [None] * count
        self.top_k_indices: list[Any] = [None] * count
        self._digest = Digest()
        self.complete = False

    def add(self, chunk: Any) -> None:
        for item in chunk.items:
            index = item.datum_index
            if not 0 <= index < len(self.logprobs):
                raise _bad(f"a result has datum index {index}")
            if self.logprobs[index] is not None:
                raise _bad(f"datum {index} came twice")
            self._digest.add_tensor(item.logprobs)
            self.logprobs[index] = decode_tensor(item.logprobs)
            if item.HasField("top_k_logprobs"):
                self.top_k_logprobs[index] = decode_tensor(item.top_k_logprobs)
                self.top_k_indices[index] = decode_tensor(item.top_k_indices)

    def commit(self, record: Any) -> None:
        own = self._digest.commit()
        missing = sum(lp is None for lp in self.logprobs)
        if missing or own != record:
            raise _bad(
                f"the result does not match its commit record ({missing} of "
                f"{len(self.logprobs)} datums are missing)"
            )
        self.complete = True


def to_result(reader: LogprobReader, done: Any) -> ForwardBackwardResult:
    with_top_k = any(k is not None for k in reader.top_k_indices)
    return ForwardBackwardResult(
        logprobs=reader.logprobs,
        metrics=dict(done.metrics),
        weight_version=done.weight_version,
        optimizer_step=done.optimizer_step,
        top_k_logprobs=reader.top_k_logprobs if with_top_k else None,
        top_k_indices=reader.top_k_indices if with_top_k else None,
    )


def _bad(message: str) -> ServerError:
    return ServerError(message + "; fetch it again", reason="RESULT_CORRUPT")
