# SPDX-License-Identifier: Apache-2.0
"""Shifting, digests, errors, futures and the derivative of a loss."""

import logging
import threading
import time

import grpc
import numpy as np
import pytest
import xxhash

gradwire = pytest.importorskip("gradwire")
if not hasattr(gradwire, "Datum"):
    pytest.skip("the client is not installed", allow_module_level=True)
from google.rpc import error_details_pb2, status_pb2  # noqa: E402
from gradwire import errors, wire  # noqa: E402
from gradwire.custom_loss import differentiate  # noqa: E402
from gradwire.future import Future, Workers  # noqa: E402


def test_from_tokens_shifts_and_masks_the_prompt():
    datum = gradwire.Datum.from_tokens([5, 6, 7, 8], prompt_length=2)
    assert list(datum.model_input) == [5, 6, 7]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [6, 7, 8]
    assert datum.loss_fn_inputs["weights"].tolist() == [0, 1, 1]
    assert datum.response([10, 11, 12]) == [11, 12]


def test_weights_of_the_response_land_on_the_response():
    datum = gradwire.Datum.from_tokens(
        [5, 6, 7, 8], prompt_length=2, weights=[-0.5, 3], advantages=[1, 2]
    )
    assert datum.loss_fn_inputs["weights"].tolist() == [0, -0.5, 3]
    assert datum.loss_fn_inputs["advantages"].tolist() == [0, 1, 2]


def test_wrong_lengths_are_refused():
    with pytest.raises(gradwire.UserError) as caught:
        gradwire.Datum.from_tokens([1, 2, 3], weights=[1.0])
    assert caught.value.reason == "SHAPE_MISMATCH"
    datum = gradwire.Datum.from_tokens([1, 2, 3])
    with pytest.raises(gradwire.UserError):
        datum.response([0.0] * 3)


def test_commit_covers_tokens_then_inputs_by_name():
    datum = gradwire.Datum.from_tokens([5, 6, 7])
    *chunks, commit = wire.datum_stream([wire.encode_datum(datum)])
    payload = (
        np.array([5, 6], "<i4").tobytes()
        + b"target_tokens"
        + np.array([6, 7], "<i8").tobytes()
        + b"weights"
        + np.array([1, 1], "<f4").tobytes()
    )
    assert len(chunks) == 1
    assert (commit.datum_count, commit.byte_count) == (1, len(payload))
    assert commit.xxh3_128 == xxhash.xxh3_128(payload).digest()


def test_long_batches_travel_in_chunks(monkeypatch):
    monkeypatch.setattr(wire, "CHUNK_BYTES", 1)
    datum = wire.encode_datum(gradwire.Datum.from_tokens([5, 6, 7]))
    *chunks, commit = wire.datum_stream([datum] * 3)
    assert len(chunks) == commit.datum_count == 3


def test_reader_refuses_a_missing_or_changed_datum():
    lps = [np.float32([-1, -2]), np.float32([-3])]
    *chunks, commit = wire.gradient_stream(lps)

    def read(change):
        reader = wire.LogprobReader(2)
        message = wire.data_pb2.LogprobChunk()
        for item in chunks[0].items:
            message.items.add(
                datum_index=item.datum_index, logprobs=item.d_logprobs
            )
        change(message)
        reader.add(message)
        reader.commit(commit)
        return reader.logprobs

    assert [lp.tolist() for lp in read(lambda m: None)] == [[-1, -2], [-3]]
    with pytest.raises(gradwire.ServerError):
        read(lambda m: m.items.pop())
    with pytest.raises(gradwire.ServerError):
        read(lambda m: setattr(m.items[1].logprobs, "data", b"\0" * 4))


class Call(grpc.RpcError):
    def __init__(self, code, details, metadata=()):
        self.parts = code, details, metadata

    def code(self):
        return self.parts[0]

    def details(self):
        return self.parts[1]

    def trailing_metadata(self):
        return self.parts[2]


def test_error_info_becomes_reason_and_metadata():
    status = status_pb2.Status(code=3, message="too long")
    info = error_details_pb2.ErrorInfo(
        reason="SEQUENCE_TOO_LONG", metadata={"limit": "8"}
    )
    status.details.add().Pack(info)
    details = (("grpc-status-details-bin", status.SerializeToString()),)
    error = errors.from_rpc(
        Call(grpc.StatusCode.INVALID_ARGUMENT, "x", details)
    )
    assert isinstance(error, gradwire.UserError)
    assert error.reason == "SEQUENCE_TOO_LONG"
    assert error.metadata == {"limit": "8"}
    assert error.category == "USER"


def test_no_server_names_address_and_remedy():
    with gradwire.ServiceClient(address="127.0.0.1:1") as service:
        with pytest.raises(gradwire.UnreachableError) as caught:
            service.get_server_info()
    assert "127.0.0.1:1" in str(caught.value)
    assert "gradwire serve" in str(caught.value)
    assert isinstance(caught.value, ConnectionError)


def test_unread_failure_is_logged_and_raised_once(caplog):
    future = Future("optim_step")
    outcome = future._outcome
    future._inner.set_exception(gradwire.ServerError("broken"))
    with caplog.at_level(logging.ERROR, "gradwire"):
        del future
    assert "optim_step failed and nobody read it" in caplog.text
    with pytest.raises(gradwire.ServerError):
        outcome.raise_if_unread()
    outcome.raise_if_unread()


def test_read_failure_is_not_raised_again():
    future = Future()
    future._inner.set_exception(gradwire.ServerError("broken"))
    with pytest.raises(gradwire.ServerError):
        future.result()
    future._outcome.raise_if_unread()


def test_timeout_leaves_the_future_open():
    future = Future("forward")
    with pytest.raises(TimeoutError):
        future.result(timeout=0)
    future._inner.set_result(3)
    assert future.result() == 3


def test_gradient_of_a_loss_over_all_datums():
    pytest.importorskip("torch")
    lps = [np.float32([-1, -2]), np.float32([-3])]

    def loss_fn(data, logprobs):
        return sum(lp.sum() for lp in logprobs) ** 2, {"m:mean": 1}

    found = differentiate([], lps, loss_fn)
    assert found.loss == 36
    assert [g.tolist() for g in found.gradients] == [[-12, -12], [-12]]
    assert found.metrics == {"m:mean": 1.0}


def test_bad_losses_are_refused_before_sending():
    torch = pytest.importorskip("torch")
    lps = [np.float32([-1, 0]), np.float32([-3])]

    def reason(loss_fn):
        with pytest.raises(gradwire.UserError) as caught:
            differentiate([], lps, loss_fn)
        return caught.value.reason

    assert reason(lambda d, lp: (lp[0].sum(), {})) == "NO_GRADIENT"
    assert reason(lambda d, lp: (torch.tensor(1.0), {})) == "NO_GRADIENT"
    assert reason(lambda d, lp: (lp[0], {})) == "BAD_LOSS"
    assert reason(lambda d, lp: lp[0].sum()) == "BAD_LOSS"
    assert (
        reason(lambda d, lp: (sum(torch.sqrt(x).sum() for x in lp), {}))
        == "NONFINITE_INPUT"
    )


def test_idle_workers_end_and_come_again():
    def running():
        return [t for t in threading.enumerate() if t.name == "gradwire-worker"]

    before = set(running())
    workers = Workers(limit=2, idle=0.01)
    done = threading.Semaphore(0)
    for _ in range(3):
        for _ in range(100):
            workers.submit(done.release)
        for _ in range(100):
            assert done.acquire(timeout=60)
        end = time.monotonic() + 60
        while set(running()) - before:
            assert time.monotonic() < end, "a worker without work stays"
            time.sleep(0.01)
