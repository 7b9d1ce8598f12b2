# SPDX-License-Identifier: Apache-2.0
"""Each mistake has its own code and reason, and nothing of it is kept."""

import itertools
import math

import calls
import gradwire
import numpy as np
import pytest
import torch
from conftest import MODELS, sequences
from gradwire import wire
from gradwire._proto.gradwire.v1 import (
    data_pb2,
    jobs_pb2,
    operations_pb2,
    sessions_pb2,
)
from grpc import StatusCode

VOCAB = MODELS["llama"][1]["vocab_size"]
CONTEXT = 64


def datum(n=5, **inputs):
    tokens = [(3 * i + 1) % VOCAB for i in range(n)]
    targets = [(5 * i + 2) % VOCAB for i in range(n)]
    return gradwire.Datum(tokens, {"target_tokens": targets, **inputs})


def with_tokens(tokens):
    return gradwire.Datum(tokens, {"target_tokens": [1] * len(tokens)})


def with_targets(targets):
    return gradwire.Datum([1] * len(targets), {"target_tokens": targets})


ZEROS = [0.0] * 5
RL = {"logprobs": ZEROS, "advantages": ZEROS}

# what: (datum, loss, config, code, reason, metadata)
USER = StatusCode.INVALID_ARGUMENT
REFUSED = {
    "token too large": (
        with_tokens([1, 2, VOCAB]),
        ("cross_entropy", {}),
        (USER, "TOKEN_OUT_OF_RANGE"),
        {"position": "2", "value": str(VOCAB), "limit": str(VOCAB)},
    ),
    "token negative": (
        with_tokens([1, -1]),
        ("cross_entropy", {}),
        (USER, "TOKEN_OUT_OF_RANGE"),
        {"position": "1", "value": "-1"},
    ),
    "target too large": (
        with_targets([1, VOCAB, 2]),
        ("cross_entropy", {}),
        (USER, "TOKEN_OUT_OF_RANGE"),
        {"field": "target_tokens", "position": "1", "limit": str(VOCAB)},
    ),
    "target that fits only 64 bits": (
        with_targets([1, (1 << 32) + 1]),
        ("cross_entropy", {}),
        (USER, "TOKEN_OUT_OF_RANGE"),
        {"field": "target_tokens", "position": "1"},
    ),
    "target negative": (
        with_targets([-1, 2]),
        ("cross_entropy", {}),
        (USER, "TOKEN_OUT_OF_RANGE"),
        {"field": "target_tokens", "position": "0", "value": "-1"},
    ),
    "too few targets": (
        gradwire.Datum([1, 2, 3], {"target_tokens": [1, 2]}),
        ("cross_entropy", {}),
        (USER, "SHAPE_MISMATCH"),
        {"field": "target_tokens"},
    ),
    "too many weights": (
        datum(weights=[1.0] * 6),
        ("cross_entropy", {}),
        (USER, "SHAPE_MISMATCH"),
        {"field": "weights"},
    ),
    "flat weights with wide targets": (
        gradwire.Datum(
            [1, 2],
            {"target_tokens": np.ones((2, 3), int), "weights": [1.0, 1.0]},
        ),
        ("cross_entropy", {}),
        (USER, "SHAPE_MISMATCH"),
        {"field": "weights"},
    ),
    "wide targets for a loss of single ones": (
        gradwire.Datum(
            [1, 2],
            {
                "target_tokens": np.ones((2, 3), int),
                "logprobs": np.zeros((2, 3)),
                "advantages": np.zeros((2, 3)),
            },
        ),
        ("ppo", {}),
        (USER, "SHAPE_MISMATCH"),
        {},
    ),
    "no token": (
        gradwire.Datum([], {"target_tokens": np.zeros(0, int)}),
        ("cross_entropy", {}),
        (USER, "SHAPE_MISMATCH"),
        {},
    ),
    "weight that is no number": (
        datum(weights=[1.0, 1.0, math.nan, 1.0, 1.0]),
        ("cross_entropy", {}),
        (USER, "NONFINITE_INPUT"),
        {"field": "weights", "position": "2"},
    ),
    "infinite advantage": (
        datum(logprobs=ZEROS, advantages=[0.0, -math.inf, 0.0, 0.0, 0.0]),
        ("ppo", {}),
        (USER, "NONFINITE_INPUT"),
        {"field": "advantages", "position": "1"},
    ),
    "sequence over the limit": (
        datum(CONTEXT + 1),
        ("cross_entropy", {}),
        (USER, "SEQUENCE_TOO_LONG"),
        {"value": str(CONTEXT + 1), "limit": str(CONTEXT)},
    ),
    "missing input": (
        datum(logprobs=ZEROS),
        ("ppo", {}),
        (USER, "MISSING_LOSS_INPUT"),
        {"field": "advantages"},
    ),
    "missing target": (
        gradwire.Datum([1, 2], {}),
        ("cross_entropy", {}),
        (USER, "MISSING_LOSS_INPUT"),
        {"field": "target_tokens"},
    ),
    "unknown input": (
        datum(colour=ZEROS),
        ("cross_entropy", {}),
        (USER, "UNKNOWN_LOSS_INPUT"),
        {"field": "colour"},
    ),
    "input of another loss": (
        datum(**RL),
        ("cross_entropy", {}),
        (USER, "UNKNOWN_LOSS_INPUT"),
        {},
    ),
    "unknown loss": (
        datum(),
        ("no_such_loss", {}),
        (USER, "UNKNOWN_LOSS"),
        {"value": "no_such_loss"},
    ),
    "unknown key": (
        datum(**RL),
        ("ppo", {"kl_beta": 0.1}),
        (USER, "UNKNOWN_LOSS_CONFIG"),
        {"field": "kl_beta"},
    ),
    "key out of range": (
        datum(**RL),
        ("ppo", {"clip_low_threshold": 2.0, "clip_high_threshold": 1.0}),
        (USER, "LOSS_CONFIG_OUT_OF_RANGE"),
        {},
    ),
    "dual clip at 1": (
        datum(**RL),
        ("dapo", {"eps_clip_c": 1.0}),
        (USER, "LOSS_CONFIG_OUT_OF_RANGE"),
        {"field": "eps_clip_c"},
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_datum_is_named_and_nothing_is_kept(model, what):
    bad, (loss, config), (code, reason), metadata = REFUSED[what]
    good = datum(**(RL if loss != "cross_entropy" else {}))
    parts = calls.batch([good, bad])
    error = calls.refusal(
        model.stubs,
        lambda: model.forward_backward(parts, loss=loss, config=config),
    )
    assert (error.code, error.reason) == (code, reason), error
    assert error.category == "USER"
    for key, value in metadata.items():
        assert error.metadata.get(key) == value, (key, error.metadata)
    if reason not in (
        "UNKNOWN_LOSS",
        "UNKNOWN_LOSS_CONFIG",
        "LOSS_CONFIG_OUT_OF_RANGE",
    ):
        assert error.metadata["datum_index"] == "1"
    assert model.nothing_accumulated()
    assert model.logprobs(model.forward(calls.batch([datum()])), 1)


@pytest.mark.parametrize("what", REFUSED)
def test_the_client_says_the_same_and_goes_on(shared_client, what):
    bad, (loss, config), (code, reason), _ = REFUSED[what]
    good = datum(**(RL if loss != "cross_entropy" else {}))
    failed = shared_client.forward_backward([good, bad], loss, config)
    after = shared_client.forward([datum()])
    with pytest.raises(gradwire.UserError) as caught:
        failed.result()
    assert (caught.value.code, caught.value.reason) == (code, reason)
    assert len(after.result().logprobs) == 1
    step = shared_client.optim_step(gradwire.AdamParams(expected_ops=0))
    assert step.result().skipped


def test_a_pipelined_step_never_takes_part_of_a_window(new_client):
    """Its batch failed while the step was already sent."""
    client = new_client("llama")
    good = client.forward_backward([datum()], "cross_entropy")
    bad = client.forward_backward([with_tokens([VOCAB])], "cross_entropy")
    # The client would count the failure if it came first.
    step = client.optim_step(gradwire.AdamParams(expected_ops=2))
    client.forward_backward([datum()], "cross_entropy")
    clean = client.optim_step().result()
    good.result()
    for future, reason in (
        (bad, "TOKEN_OUT_OF_RANGE"),
        (step, "ACCUMULATION_MISMATCH"),
    ):
        with pytest.raises(gradwire.UserError) as caught:
            future.result()
        assert caught.value.reason == reason
    assert (clean.optimizer_step, clean.weight_version) == (1, 1)
    alone = new_client("llama")
    alone.forward_backward([datum()], "cross_entropy")
    alone.optim_step()
    ends = [c.save_weights_for_sampler("end") for c in (client, alone)]
    assert len({end.result().digest for end in ends}) == 1


def test_an_empty_batch_is_refused(model):
    error = calls.refusal(
        model.stubs, lambda: model.forward_backward(calls.batch([]))
    )
    assert (error.code, error.reason) == (USER, "EMPTY_BATCH")
    assert model.nothing_accumulated()


def raw_datum(**changes):
    (message,) = calls.encode([datum(weights=[1.0] * 5)])
    for name, value in changes.items():
        message.loss_fn_inputs[name].MergeFrom(value)
    return message


def refuse_message(model, message, reason):
    parts = list(wire.datum_stream([message]))
    error = calls.refusal(model.stubs, lambda: model.forward_backward(parts))
    assert error.reason == reason, error
    assert error.category == "USER"
    assert model.nothing_accumulated()
    return error


def test_bytes_must_be_as_many_as_the_shape_says(model):
    message = raw_datum()
    message.loss_fn_inputs["weights"].data += b"\0"
    refuse_message(model, message, "SHAPE_MISMATCH")
    message = raw_datum()
    message.loss_fn_inputs["weights"].shape[:] = [1 << 62, 1 << 62]
    refuse_message(model, message, "SHAPE_MISMATCH")
    message = raw_datum()
    message.loss_fn_inputs["weights"].shape[:] = [-5]
    refuse_message(model, message, "SHAPE_MISMATCH")
    message = raw_datum()
    message.chunks[0].text.tokens += b"\0"
    refuse_message(model, message, "SHAPE_MISMATCH")


def test_arrays_must_have_the_type_of_their_name(model):
    message = raw_datum()
    message.loss_fn_inputs["weights"].dtype = data_pb2.DATA_TYPE_INT32
    refuse_message(model, message, "DTYPE_MISMATCH")


def test_images_are_refused_as_what_they_are(model):
    message = raw_datum()
    message.chunks.add().image.format = "png"
    error = refuse_message(model, message, "MODALITY_UNSUPPORTED")
    assert error.code == StatusCode.UNIMPLEMENTED


def test_hostile_sparse_arrays_are_refused(model):
    def sparse(columns, offsets, values=1):
        return data_pb2.TensorData(
            dtype=data_pb2.DATA_TYPE_FLOAT32,
            shape=[5, 1],
            data=np.ones(values, "<f4").tobytes(),
            csr_columns=np.array(columns, "<i4").tobytes(),
            csr_row_offsets=np.array(offsets, "<i8").tobytes(),
        )

    for array in (
        sparse([0], [0, 1, 1, 1, 1]),  # an offset short
        sparse([1], [0, 1, 1, 1, 1, 1]),  # column beyond K
        sparse([-1], [0, 1, 1, 1, 1, 1]),
        sparse([0], [0, 1 << 40, 1, 1, 1, 1]),
        sparse([0], [0, 1, 0, 1, 1, 1]),  # descending
        sparse([0], [0, 0, 0, 0, 0, 0]),  # a value of no row
        sparse([0, 0], [0, 1, 1, 1, 1, 1], values=1),
    ):
        message = raw_datum()
        message.loss_fn_inputs["weights"].CopyFrom(array)
        parts = list(wire.datum_stream([message]))
        error = calls.refusal(
            model.stubs, lambda parts=parts: model.forward_backward(parts)
        )
        assert error.code == USER
        assert error.reason in ("CSR_INVALID", "SHAPE_MISMATCH"), error
        assert model.nothing_accumulated()


def test_a_batch_without_its_commit_record_never_happened(model):
    *chunks, commit = calls.batch([datum(), datum(3)])
    seq = model.due()
    # However much of it arrived.
    for parts in (chunks, [], [chunks[0], chunks[0]]):
        error = calls.refusal(
            model.stubs,
            lambda parts=parts: model.forward_backward(parts, seq=seq),
        )
        assert (error.code, error.reason) == (USER, "MISSING_COMMIT")
    # Its number is still open for the whole of it.
    model.result(model.forward_backward([*chunks, commit], seq=seq))
    step = model.result(model.optim_step(learning_rate=0.0, expected_ops=1))
    assert step.optim_step.loss_tokens == 8


def test_a_commit_record_must_match_its_batch(model):
    *chunks, commit = calls.batch([datum(), datum(3)])
    wrong = [data_pb2.CommitRecord.FromString(b"") for _ in range(3)]
    for record in wrong:
        record.CopyFrom(commit)
    wrong[0].datum_count += 1
    wrong[1].byte_count -= 1
    digest = bytearray(commit.xxh3_128)
    digest[3] ^= 1
    wrong[2].xxh3_128 = bytes(digest)
    wrong.append(data_pb2.CommitRecord())
    for record in wrong:
        error = calls.refusal(
            model.stubs,
            lambda record=record: model.forward_backward([*chunks, record]),
        )
        assert (error.code, error.reason) == (USER, "COMMIT_MISMATCH")
        assert model.nothing_accumulated()


def test_a_batch_over_the_limits_is_refused(model, stubs):
    config = stubs.sessions.GetClientConfig(
        sessions_pb2.GetClientConfigRequest()
    )
    (one,) = calls.encode([datum(1)])
    many = config.max_batch_datums + 1
    chunk = data_pb2.DatumChunk(datums=[one] * 1024)

    def parts():
        for _ in range(many // 1024 + 1):
            yield chunk
        yield data_pb2.CommitRecord()

    error = calls.refusal(stubs, lambda: model.forward_backward(parts()))
    assert error.code in (StatusCode.RESOURCE_EXHAUSTED, USER)
    assert error.reason == "BATCH_TOO_LARGE"
    assert error.metadata["limit"] == str(config.max_batch_datums)
    assert model.nothing_accumulated()


def test_top_k_has_a_limit(shared_client):
    for top_k in (-1, 1 << 20):
        with pytest.raises(gradwire.UserError) as caught:
            shared_client.forward([datum()], top_k=top_k).result()
        assert (caught.value.code, caught.value.reason) == (
            USER,
            "TOP_K_OUT_OF_RANGE",
        )
    limit = shared_client.info().profile.max_top_k
    best = shared_client.forward([datum()], top_k=limit).result()
    assert best.top_k_indices[0].shape == (5, limit)
    with pytest.raises(gradwire.UserError):
        shared_client.forward([datum()], top_k=limit + 1).result()


def test_limits_of_the_profile_are_true(shared_client):
    profile = shared_client.info().profile
    assert profile.max_context_length == CONTEXT
    longest = shared_client.forward([datum(CONTEXT)]).result()
    assert len(longest.logprobs[0]) == CONTEXT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", math.nan),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", -1e-8),
        ("weight_decay", math.inf),
        ("grad_clip_norm", -1.0),
    ],
)
def test_parameters_of_a_step_have_ranges(shared_client, field, value):
    shared_client.forward_backward([datum()], "cross_entropy")
    with pytest.raises(gradwire.UserError) as caught:
        params = gradwire.AdamParams(**{field: value})
        shared_client.optim_step(params).result()
    assert caught.value.code == USER
    assert caught.value.reason == "OPTIM_PARAM_OUT_OF_RANGE"
    assert caught.value.metadata["field"] == field
    shared_client.zero_grad().result()


# A custom step.


def total(data, logprobs):
    return sum(lp.sum() for lp in logprobs), {}


def raising(data, logprobs):
    raise ZeroDivisionError("of the user's own")


def test_a_loss_that_raises_leaves_nothing(shared_client):
    data = sequences(VOCAB, (9, 5))
    failed = shared_client.forward_backward_custom(data, raising)
    after = shared_client.forward(data)
    with pytest.raises(ZeroDivisionError, match="of the user's own"):
        failed.result()
    assert len(after.result().logprobs) == 2
    step = shared_client.optim_step(gradwire.AdamParams(expected_ops=0))
    assert step.result().skipped


def bad_gradient(data, logprobs):
    return (logprobs[0] * math.nan).sum() + logprobs[1].sum(), {}


def forgets_a_datum(data, logprobs):
    return logprobs[0].sum(), {}


def returns_no_scalar(data, logprobs):
    return logprobs[0], {}


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (bad_gradient, "NONFINITE_INPUT"),
        (forgets_a_datum, "NO_GRADIENT"),
        (returns_no_scalar, "BAD_LOSS"),
    ],
)
def test_a_bad_loss_is_refused_before_it_is_sent(shared_client, loss, reason):
    data = sequences(VOCAB, (9, 5))
    with pytest.raises(gradwire.UserError) as caught:
        shared_client.forward_backward_custom(data, loss).result()
    assert caught.value.reason == reason
    step = shared_client.optim_step(gradwire.AdamParams(expected_ops=0))
    assert step.result().skipped


def test_a_bad_custom_batch_is_named(shared_client):
    data = [*sequences(VOCAB, (9,)), with_tokens([1, VOCAB])]
    failed = shared_client.forward_backward_custom(data, total)
    after = shared_client.forward(data[:1])
    with pytest.raises(gradwire.UserError) as caught:
        failed.result()
    assert caught.value.reason == "TOKEN_OUT_OF_RANGE"
    assert caught.value.metadata["datum_index"] == "1"
    assert len(after.result().logprobs) == 1
    step = shared_client.optim_step(gradwire.AdamParams(expected_ops=0))
    assert step.result().skipped


def gradient_refusals():
    n = 5
    good = np.ones(n, np.float32)
    nan = good.copy()
    nan[3] = math.nan
    return {
        "no number": ([good, nan], "NONFINITE_INPUT"),
        "too short": ([good, good[:-1]], "SHAPE_MISMATCH"),
        "of a datum that is not there": ([good] * 3, "DATUM_INDEX_INVALID"),
    }


@pytest.mark.parametrize("what", gradient_refusals())
def test_bad_gradients_are_refused_before_they_are_added(model, what):
    gradients, reason = gradient_refusals()[what]
    forward = model.result(
        model.forward(calls.batch([datum(), datum()]), retain=True)
    )
    parts = calls.gradient_parts(gradients)
    activation_id = forward.forward.activation_id
    error = calls.refusal(
        model.stubs, lambda: model.backward(activation_id, parts)
    )
    assert (error.code, error.reason) == (USER, reason)
    assert model.nothing_accumulated()


def test_gradients_of_some_datums_leave_the_others_at_zero(model):
    forward = model.result(
        model.forward(calls.batch([datum(), datum(3), datum(4)]), retain=True)
    )
    (item,) = calls.gradient_parts([np.ones(3, np.float32)])[0].items
    item.datum_index = 1
    digest = wire.Digest()
    digest.add_tensor(item.d_logprobs)
    parts = [data_pb2.GradientChunk(items=[item]), digest.commit()]
    model.result(model.backward(forward.forward.activation_id, parts))
    step = model.result(model.optim_step(learning_rate=0.0, expected_ops=1))
    assert step.optim_step.loss_tokens == 3
    assert step.optim_step.sequences == 1


def test_activations_are_used_once(model):
    forward = model.result(model.forward(calls.batch([datum()]), retain=True))
    activation_id = forward.forward.activation_id
    parts = calls.gradient_parts([np.ones(5, np.float32)])
    model.result(model.backward(activation_id, parts))
    model.result(model.optim_step(learning_rate=0.0))
    for known in (activation_id, "never-made"):
        error = calls.refusal(
            model.stubs,
            lambda known=known: model.backward(known, parts),
        )
        assert (error.code, error.reason) == (
            StatusCode.NOT_FOUND,
            "ACTIVATIONS_EXPIRED",
        )
    assert model.nothing_accumulated()


def test_activations_of_other_weights_are_stale(model):
    forward = model.result(model.forward(calls.batch([datum()]), retain=True))
    model.result(model.forward_backward(calls.batch([datum()])))
    model.result(model.optim_step(learning_rate=0.0))
    parts = calls.gradient_parts([np.ones(5, np.float32)])
    error = calls.refusal(
        model.stubs,
        lambda: model.backward(forward.forward.activation_id, parts),
    )
    assert (error.code, error.reason) == (
        StatusCode.FAILED_PRECONDITION,
        "ACTIVATIONS_STALE",
    )
    assert model.nothing_accumulated()


# Numbers that overflow.


def test_a_gradient_that_overflows_changes_nothing(new_client):
    client = new_client("llama")
    data = sequences(VOCAB, (9, 5))
    before = client.forward(data).result().logprobs
    start = client.save_weights_for_sampler("start").result()
    # Each is a float32, and so is its loss; the sum of their gradients is none.
    huge = [
        gradwire.Datum(
            d.model_input,
            {
                **d.loss_fn_inputs,
                "weights": np.full(len(d.model_input), 2e37, np.float32),
            },
        )
        for d in data
    ]
    assert client.forward_backward(huge * 64, "cross_entropy").result()
    with pytest.raises(gradwire.UserError) as caught:
        client.optim_step().result()
    assert caught.value.code == StatusCode.FAILED_PRECONDITION
    assert caught.value.reason == "NONFINITE_GRADIENT"
    end = client.save_weights_for_sampler("end").result()
    assert start.digest == end.digest
    for a, b in zip(
        before, client.forward(data).result().logprobs, strict=True
    ):
        assert np.array_equal(a, b)
    # The window after it is clean, and the step is the first.
    client.forward_backward(data, "cross_entropy")
    step = client.optim_step().result()
    assert (step.optimizer_step, step.weight_version) == (1, 1)
    alone = new_client("llama")
    alone.forward_backward(data, "cross_entropy")
    alone.optim_step()
    ends = [c.save_weights_for_sampler("one") for c in (client, alone)]
    assert len({end.result().digest for end in ends}) == 1


def test_very_large_weights_are_only_large(new_client):
    """Signed, of sum 0, and far from 1: no clamp, no division by a sum."""
    client = new_client("llama")
    (one,) = sequences(VOCAB, (9,))
    weights = np.array([1e6, -1e6, 1e-6, -1e-6] * 2, np.float32)
    heavy = gradwire.Datum(
        one.model_input, {**one.loss_fn_inputs, "weights": weights}
    )
    fused = client.forward_backward([heavy], "cross_entropy").result()
    expected = -np.sum(weights.astype(float) * fused.logprobs[0])
    terms = np.sum(np.abs(weights.astype(float) * fused.logprobs[0]))
    assert abs(fused.loss - expected) <= np.finfo(np.float32).eps * terms
    step = client.optim_step().result()
    assert step.loss_tokens == 8 and math.isfinite(step.grad_norm)


# Numbers of requests.


def test_the_order_of_arrival_is_not_the_order_of_work(new_client, stubs):
    client = new_client("llama")
    data = sequences(VOCAB, (9, 5))
    first = calls.Model(stubs, stubs.attach(client.job_id))
    step = first.optim_step(seq=2, learning_rate=1e-2, expected_ops=1)
    snapshot = first.save_snapshot("late", seq=3)
    waiting = stubs.operations.GetOperation(
        operations_pb2.GetOperationRequest(op_id=step.op_id)
    )
    assert waiting.state == operations_pb2.OPERATION_STATE_BLOCKED_ON_GAP
    assert first.due() == 1
    first.forward_backward(calls.batch(data), seq=1)
    assert first.result(step).optim_step.optimizer_step == 1
    late = first.result(snapshot).snapshot.digest

    other = new_client("llama")
    other.forward_backward(data, "cross_entropy")
    other.optim_step(gradwire.AdamParams(learning_rate=1e-2))
    assert other.save_weights_for_sampler("end").result().digest == late


def test_a_repetition_is_the_same_operation(model):
    parts = calls.batch([datum()])
    seq = model.due()
    refs = [model.forward_backward(parts, seq=seq) for _ in range(3)]
    model.result(refs[0])
    refs.append(model.forward_backward(parts, seq=seq))
    assert len({ref.op_id for ref in refs}) == 1
    found = [model.logprobs(ref, 1)[0] for ref in refs]
    assert all(np.array_equal(found[0], lp) for lp in found)
    step = model.result(model.optim_step(learning_rate=0.0, expected_ops=1))
    assert step.optim_step.loss_tokens == 5


def test_a_number_is_not_used_for_two_things(model):
    seq = model.due()
    model.result(model.forward_backward(calls.batch([datum()]), seq=seq))
    others = (
        lambda: model.forward_backward(calls.batch([datum(4)]), seq=seq),
        lambda: model.forward(calls.batch([datum()]), seq=seq),
        lambda: model.optim_step(seq=seq, learning_rate=0.0),
        lambda: model.forward_backward(
            calls.batch([datum(**RL)]), seq=seq, loss="ppo"
        ),
    )
    for other in others:
        error = calls.refusal(model.stubs, other)
        assert (error.code, error.reason) == (USER, "SEQ_REUSED")
    step = model.result(model.optim_step(learning_rate=0.0, expected_ops=1))
    assert step.optim_step.loss_tokens == 5
    error = calls.refusal(model.stubs, lambda: model.optim_step(seq=0))
    assert error.code == USER


def test_a_newer_handle_fences_the_older(stubs, shared_job):
    old = calls.Model(stubs, stubs.attach(shared_job))
    old.result(old.forward_backward(calls.batch([datum()])))
    due = old.due()
    waiting = old.optim_step(seq=due + 1)
    error = calls.refusal(
        stubs, lambda: stubs.attach(shared_job, take_over=False)
    )
    assert (error.code, error.reason) == (
        StatusCode.FAILED_PRECONDITION,
        "MODEL_IN_USE",
    )
    new = calls.Model(stubs, stubs.attach(shared_job, take_over=True))
    fenced = (
        lambda: waiting,
        lambda: old.optim_step(seq=due),
        lambda: old.forward(calls.batch([datum()]), seq=due),
    )
    for call in fenced:
        error = calls.refusal(stubs, call)
        assert (error.code, error.reason) == (
            StatusCode.FAILED_PRECONDITION,
            "HANDLE_FENCED",
        )
    # Its gradients are dropped, and number 1 is a new one.
    assert new.due() == 1
    assert new.nothing_accumulated()


# Names, jobs and models.


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "../up", "a b", "ä", "x" * 129]
)
def test_a_snapshot_has_a_plain_name(shared_client, name):
    with pytest.raises(gradwire.UserError) as caught:
        shared_client.save_weights_for_sampler(name).result()
    assert (caught.value.code, caught.value.reason) == (USER, "INVALID_NAME")


def test_a_snapshot_is_never_replaced(new_client):
    client = new_client("llama")
    first = client.save_weights_for_sampler("same").result()
    client.forward_backward([datum()], "cross_entropy")
    client.optim_step(gradwire.AdamParams(learning_rate=0.1))
    with pytest.raises(gradwire.UserError) as caught:
        client.save_weights_for_sampler("same").result()
    assert caught.value.code == StatusCode.ALREADY_EXISTS
    assert caught.value.reason == "SNAPSHOT_EXISTS"
    other = client.save_weights_for_sampler("other").result()
    assert other.digest != first.digest


@pytest.mark.parametrize(
    "job_id", ["../up", "a/b", "", "A", "-a", "a.b", "x" * 64, "a\n"]
)
def test_a_job_has_a_plain_id(stubs, models, job_id):
    spec = jobs_pb2.JobSpec(base_model=str(models["llama"]))
    error = calls.refusal(
        stubs,
        lambda: stubs.jobs.CreateJob(
            jobs_pb2.CreateJobRequest(job_id=job_id, spec=spec)
        ),
    )
    assert (error.code, error.reason) == (USER, "INVALID_NAME")


def test_unknown_things_are_not_found(service, stubs, shared_job):
    for call in (
        lambda: service.get_job("no-such-job"),
        lambda: service.delete_job("no-such-job"),
        lambda: service.get_profile("no-such-job"),
        lambda: next(iter(service.watch_job("no-such-job"))),
    ):
        with pytest.raises(gradwire.UserError) as caught:
            call()
        assert caught.value.code == StatusCode.NOT_FOUND
        assert caught.value.reason == "JOB_NOT_FOUND"
    for model_id in ("no-such-job.1", f"{shared_job}.0", ""):
        error = calls.refusal(stubs, calls.Model(stubs, model_id).info)
        assert (error.code, error.reason) == (
            StatusCode.NOT_FOUND,
            "MODEL_NOT_FOUND",
        )
    error = calls.refusal(
        stubs,
        lambda: stubs.operations.GetOperation(
            operations_pb2.GetOperationRequest(op_id="no-such-operation")
        ),
    )
    assert (error.code, error.reason) == (
        StatusCode.NOT_FOUND,
        "OPERATION_NOT_FOUND",
    )


def test_fields_that_nobody_reads_are_refused(stubs, models, shared_job):
    spec = jobs_pb2.JobSpec(base_model=str(models["llama"]))
    # Field 103, of a later version.
    unknown = spec.SerializeToString() + bytes([0xBA, 0x06, 1]) + b"x"
    request = jobs_pb2.CreateJobRequest(
        job_id="unknown", spec=jobs_pb2.JobSpec.FromString(unknown)
    )
    error = calls.refusal(stubs, lambda: stubs.jobs.CreateJob(request))
    assert error.reason == "UNSUPPORTED_OPTION"
    assert "103" in error.metadata["field"]
    for lora in ({"rank": 4}, {"alpha": 8.0}, {"seed": 1}):
        error = calls.refusal(
            stubs, lambda lora=lora: stubs.attach(shared_job, lora=lora)
        )
        assert error.reason == "UNSUPPORTED_OPTION", lora


def test_a_job_id_means_one_job(stubs, models):
    spec = {"base_model": str(models["llama"]), "precision": "f32"}
    job = stubs.create_job(**spec)
    assert stubs.start_job(job, **spec) == job
    error = calls.refusal(
        stubs, lambda: stubs.start_job(job, **{**spec, "precision": "bf16"})
    )
    assert (error.code, error.reason) == (
        StatusCode.ALREADY_EXISTS,
        "JOB_SPEC_MISMATCH",
    )
    found = {name: error.metadata[name] for name in ("field", "value", "limit")}
    assert found == {"field": "precision", "value": '"bf16"', "limit": '"f32"'}
    # What is the default, whether it is said or not.
    assert stubs.start_job(job, **spec, world_size=1, replicas=1) == job
    with gradwire.ServiceClient(address=stubs.address) as service:
        service.delete_job(job)
        service.delete_job(job)
        assert job not in [j.job_id for j in service.list_jobs()]
    error = calls.refusal(stubs, lambda: stubs.start_job(job, **spec))
    assert (error.code, error.reason) == (
        StatusCode.FAILED_PRECONDITION,
        "JOB_ID_TOMBSTONED",
    )


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"world_size": -1}, "OPTION_OUT_OF_RANGE"),
        ({"world_size": 1025}, "OPTION_OUT_OF_RANGE"),
        ({"preemptible": True}, "UNSUPPORTED_OPTION"),
        ({"lora": {"max_rank": 8}}, "UNSUPPORTED_OPTION"),
        ({"lora": {"max_adapters": 4}}, "UNSUPPORTED_OPTION"),
        ({"precision": "fp4"}, "PRECISION_UNKNOWN"),
        ({"moment_precision": "fp8"}, "PRECISION_UNKNOWN"),
        (
            {"moment_precision": "bf16", "forward_only": True},
            "UNSUPPORTED_OPTION",
        ),
        ({"activation_bytes": -1}, "OPTION_OUT_OF_RANGE"),
        ({"base_model": ""}, "MISSING_FIELD"),
    ],
)
def test_an_option_is_used_or_refused(stubs, models, option, reason):
    spec = {"base_model": str(models["llama"]), **option}
    error = calls.refusal(stubs, lambda: stubs.start_job(**spec))
    assert error.code in (USER, StatusCode.UNIMPLEMENTED)
    assert error.reason == reason


def test_all_jobs_are_listed_whatever_the_page(stubs, service, shared_job):
    ids, token = [], ""
    for _ in itertools.count():
        page = stubs.jobs.ListJobs(
            jobs_pb2.ListJobsRequest(
                page_size=1, page_token=token, show_deleted=True
            )
        )
        ids += [job.job_id for job in page.jobs]
        token = page.next_page_token
        if not token:
            break
    assert shared_job in ids
    assert len(set(ids)) == len(ids)
    assert ids == [job.job_id for job in service.list_jobs(show_deleted=True)]


def test_torch_tensors_of_any_kind_are_taken(shared_client):
    """What is refused must be wrong: these are right."""
    n = 5
    data = [
        gradwire.Datum(
            torch.arange(n),
            {
                "target_tokens": torch.arange(n, dtype=torch.int32),
                "weights": torch.ones(n, dtype=torch.bfloat16),
            },
        )
    ]
    fused = shared_client.forward_backward(data, "cross_entropy").result()
    assert fused.metrics["tokens:sum"] == n
    shared_client.zero_grad().result()
