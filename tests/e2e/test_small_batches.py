# SPDX-License-Identifier: Apache-2.0
"""Batches that come with their header, and results that come with the answer
to the wait: the same as those that come in messages of their own."""

import calls
import grpc
import numpy as np
import pytest
from conftest import MODELS, sequences
from gradwire import wire
from gradwire._proto.gradwire.v1 import (
    data_pb2,
    operations_pb2,
    training_pb2,
)
from gradwire.errors import from_rpc

VOCAB = MODELS["llama"][1]["vocab_size"]
DATUMS = [wire.encode_datum(d) for d in sequences(VOCAB, (9, 17, 5))]
LOSS = training_pb2.LossConfig(loss_fn="cross_entropy")


def header(model, seq, datums=DATUMS, kind=training_pb2.ForwardBackwardHeader):
    head = kind(model_id=model.model_id, seq_id=seq, loss=LOSS)
    wire.fill_header(head, wire.datum_stream(datums))
    return head


def forward_backward(model, *messages):
    request = training_pb2.ForwardBackwardRequest
    return model.stubs.training.ForwardBackward(
        iter([request(**message) for message in messages])
    )


def wait(model, ref, array_bytes):
    return model.stubs.operations.WaitOperation(
        operations_pb2.WaitOperationRequest(
            op_id=ref.op_id, timeout_seconds=30, array_bytes=array_bytes
        )
    )


def arrays(operation):
    reader = wire.LogprobReader(len(DATUMS))
    reader.add(operation.logprobs)
    reader.commit(operation.logprobs_commit)
    return reader.logprobs


def test_a_batch_with_its_header_is_the_same_request(model):
    seq = model.due()
    ref = forward_backward(model, {"header": header(model, seq)})
    done = model.result(ref)
    # Repeated in messages of its own it is the same one, and not run again.
    again = model.forward_backward(wire.datum_stream(DATUMS), seq)
    assert again.op_id == ref.op_id and model.due() == seq + 1
    assert model.result(again) == done
    # Another one under its number is told apart.
    other = header(model, seq, DATUMS[:2])
    error = calls.refusal(
        model.stubs, lambda: forward_backward(model, {"header": other})
    )
    assert error.reason == "SEQ_REUSED"
    plain = model.forward_backward(wire.datum_stream(DATUMS))
    want, got = (model.logprobs(r, len(DATUMS)) for r in (plain, ref))
    for w, g in zip(want, got, strict=True):
        np.testing.assert_array_equal(w, g)


def test_a_forward_takes_it_too(model):
    seq = model.due()
    head = header(model, seq, kind=training_pb2.ForwardHeader)
    ref = model.stubs.training.Forward(
        iter([training_pb2.ForwardRequest(header=head)])
    )
    want = model.forward(wire.datum_stream(DATUMS), seq=seq + 1)
    for w, g in zip(
        model.logprobs(want, len(DATUMS)),
        model.logprobs(ref, len(DATUMS)),
        strict=True,
    ):
        np.testing.assert_array_equal(w, g)


def test_half_a_batch_is_none(model):
    seq = model.due()
    without = header(model, seq)
    without.ClearField("datums_commit")
    alone = header(model, seq)
    alone.ClearField("datums")
    wrong = header(model, seq)
    wrong.datums_commit.byte_count += 1
    part = data_pb2.DatumChunk(datums=DATUMS)
    for messages, reason in (
        ([{"header": without}], "MISSING_COMMIT"),
        ([{"header": alone}], "COMMIT_MISMATCH"),
        ([{"header": wrong}], "COMMIT_MISMATCH"),
        (
            [{"header": header(model, seq)}, {"chunk": part}],
            "MESSAGE_UNEXPECTED",
        ),
    ):
        error = calls.refusal(
            model.stubs, lambda m=messages: forward_backward(model, *m)
        )
        assert error.reason == reason
    assert model.nothing_accumulated()


def test_a_custom_step_takes_a_batch_with_its_header(model):
    want = model.logprobs(model.forward(wire.datum_stream(DATUMS)), len(DATUMS))
    seq = model.due()
    head = training_pb2.CustomHeader(
        model_id=model.model_id, forward_seq_id=seq, backward_seq_id=seq + 1
    )
    wire.fill_header(head, wire.datum_stream(DATUMS))
    stream = model.stubs.training.ForwardBackwardCustom(
        iter([training_pb2.CustomRequest(header=head)])
    )
    reader = wire.LogprobReader(len(DATUMS))
    with pytest.raises(grpc.RpcError) as caught:
        for message in stream:
            if message.HasField("logprobs"):
                reader.add(message.logprobs)
            elif message.HasField("logprobs_commit"):
                reader.commit(message.logprobs_commit)
    # Nobody sent gradients; all logprobs were there.
    assert from_rpc(caught.value).reason == "MISSING_COMMIT"
    for w, g in zip(want, reader.logprobs, strict=True):
        np.testing.assert_array_equal(w, g)


def test_small_arrays_come_with_the_answer(model):
    ref = model.forward_backward(wire.datum_stream(DATUMS))
    done = wait(model, ref, 1 << 20)
    assert done.state == operations_pb2.OPERATION_STATE_DONE
    want = model.logprobs(ref, len(DATUMS))
    for w, g in zip(want, arrays(done), strict=True):
        np.testing.assert_array_equal(w, g)
    # Not unless they are asked for, nor if they are larger than that.
    for most in (0, 1, done.logprobs.ByteSize() // 2):
        answer = wait(model, ref, most)
        assert not answer.HasField("logprobs")
        assert not answer.HasField("logprobs_commit")
        assert answer.forward == done.forward


def test_what_is_gone_does_not_come(model):
    ref = model.forward_backward(wire.datum_stream(DATUMS))
    model.result(ref)
    model.stubs.operations.AcknowledgeOperation(
        operations_pb2.AcknowledgeOperationRequest(op_ids=[ref.op_id])
    )
    assert not wait(model, ref, 1 << 20).HasField("logprobs_commit")


def test_other_operations_have_none(model):
    ref = model.zero_grad()
    assert not wait(model, ref, 1 << 20).HasField("logprobs_commit")


def test_the_client_uses_both(new_client, monkeypatch):
    client = new_client("llama")
    fetch, fetched = client.service.operations.FetchResult, []

    def counted(*args, **kwargs):
        fetched.append(args)
        return fetch(*args, **kwargs)

    monkeypatch.setattr(client.service.operations, "FetchResult", counted)
    data = sequences(VOCAB, (9, 17, 5))
    small = client.forward(data).result().logprobs
    assert not fetched
    # More than 2 MiB of datums, more than 1 MiB of results.
    many = client.forward(data * 12000).result().logprobs
    assert len(fetched) == 1
    for w, g in zip(small, many[-3:], strict=True):
        np.testing.assert_allclose(w, g, rtol=0, atol=1e-5)
