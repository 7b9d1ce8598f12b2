# SPDX-License-Identifier: Apache-2.0
"""Order, waiting, limits and lifetimes of operations."""

import concurrent.futures
import random

import calls
import gradwire
import grpc
import numpy as np
import pytest
from conftest import MODELS, sequences
from google.rpc import error_details_pb2, status_pb2
from gradwire import wire
from gradwire._proto.gradwire.v1 import (
    jobs_pb2,
    operations_pb2,
    sessions_pb2,
    training_pb2,
)
from processes import Server

VOCAB = MODELS["llama"][1]["vocab_size"]


@pytest.fixture(scope="module")
def hasty(binaries, tmp_path_factory):
    """A server that waits for seconds where others wait for minutes, which is
    longer than what is done meanwhile; and queues little."""
    with Server(
        tmp_path_factory.mktemp("state"),
        "--gap_timeout_seconds=3",
        "--max_queued_ops=4",
        "--result_retention_seconds=5",
    ) as server:
        yield server


@pytest.fixture
def hasty_model(hasty, models):
    with calls.Stubs(hasty.address) as stubs:
        job = stubs.create_job(base_model=str(models["llama"]), precision="f32")
        yield calls.Model(stubs, stubs.attach(job))
        stubs.delete_job(job)


def parts(*lengths):
    return calls.batch(sequences(VOCAB, lengths))


def test_a_number_that_never_comes_fails_what_waits_for_it(hasty_model):
    model = hasty_model
    model.result(model.forward_backward(parts(9), seq=1))
    waiting = [
        model.forward_backward(parts(5), seq=4),
        model.optim_step(seq=5, expected_ops=2),
    ]
    for ref in waiting:
        error = calls.refusal(model.stubs, lambda ref=ref: ref)
        assert (error.code, error.reason) == (
            grpc.StatusCode.ABORTED,
            "SEQUENCE_GAP",
        )
    # The missing numbers are closed, the next is behind the last that failed.
    for seq in (2, 3):
        error = calls.refusal(
            model.stubs, lambda seq=seq: model.optim_step(seq=seq)
        )
        assert (error.code, error.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "SEQUENCE_CLOSED",
        )
    assert model.due() == 6
    # What was accumulated before is still there, and no more.
    step = model.result(model.optim_step(seq=6, expected_ops=1)).optim_step
    assert step.loss_tokens > 0 and step.sequences == 1


def test_a_full_queue_still_takes_what_it_waits_for(tmp_path, models):
    with (
        Server(tmp_path, "--max_queued_ops=4") as server,
        calls.Stubs(server.address) as own,
    ):
        job = own.create_job(base_model=str(models["llama"]), precision="f32")
        model = calls.Model(own, own.attach(job))
        refs = [model.forward(parts(5), seq=seq) for seq in (2, 3, 4, 5)]
        with pytest.raises(grpc.RpcError) as caught:
            model.forward(parts(5), seq=6)
        error = gradwire.errors.from_rpc(caught.value)
        assert (error.code, error.reason, error.category) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUEUE_FULL",
            "SERVER",
        )
        assert error.retry_after > 0
        assert len(details(caught.value, error_details_pb2.RetryInfo)) == 1
        refs.append(model.forward(parts(5), seq=1))
        for ref in refs:
            model.result(ref)
        # And the one that was turned away comes again.
        model.result(model.forward(parts(5), seq=6))
        # The client does that by itself.
        with gradwire.ServiceClient(address=server.address) as service:
            client = calls.attach(service, job)
            data = sequences(VOCAB, (9, 5))
            many = [client.forward(data) for _ in range(40)]
            for future in many:
                future.result()


def details(error, kind):
    found = []
    for key, value in error.trailing_metadata():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                message = kind()
                if detail.Unpack(message):
                    found.append(message)
    return found


def test_a_result_that_is_gone_is_never_computed_again(hasty_model):
    model = hasty_model
    ref = model.forward_backward(parts(9))
    model.result(ref)
    request = operations_pb2.FetchResultRequest(op_id=ref.op_id)
    error = None
    while error is None:  # until its time is over
        try:
            list(model.stubs.operations.FetchResult(request))
        except grpc.RpcError as expired:
            error = gradwire.errors.from_rpc(expired)
    assert (error.code, error.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "RESULT_EXPIRED",
    )
    again = model.forward_backward(parts(9), seq=ref.seq_id)
    assert again.op_id == ref.op_id
    model.result(model.optim_step(expected_ops=1))


def test_an_acknowledged_result_is_dropped(model):
    ref = model.forward(parts(9))
    first = model.logprobs(ref, 1)
    for a, b in zip(first, model.logprobs(ref, 1), strict=True):
        assert np.array_equal(a, b)  # read twice
    request = operations_pb2.AcknowledgeOperationRequest(op_ids=[ref.op_id])
    model.stubs.operations.AcknowledgeOperation(request)
    with pytest.raises(grpc.RpcError) as caught:
        model.logprobs(ref, 1)
    assert gradwire.errors.from_rpc(caught.value).reason == "RESULT_EXPIRED"


def test_a_queued_operation_can_be_cancelled(model):
    seq = model.due()
    cancelled = model.forward_backward(parts(9), seq=seq + 1)
    after = model.optim_step(seq=seq + 2, expected_ops=0)
    request = operations_pb2.CancelOperationRequest(op_id=cancelled.op_id)
    operation = model.stubs.operations.CancelOperation(request)
    assert operation.state == operations_pb2.OPERATION_STATE_CANCELLED
    assert operation.error.code == grpc.StatusCode.CANCELLED.value[0]
    # Its number counts as executed; the one before it is still missing.
    model.result(model.forward(parts(5), seq=seq))
    assert model.result(after).optim_step.skipped
    done = model.stubs.operations.CancelOperation(
        operations_pb2.CancelOperationRequest(op_id=after.op_id)
    )
    assert done.state == operations_pb2.OPERATION_STATE_DONE


def test_any_order_of_arrival_gives_the_same_end(new_client, stubs):
    """Twenty steps sent by eight threads, in no order, some of them twice."""
    steps = 20

    def train(order, workers):
        client = new_client("llama")
        model = calls.Model(stubs, stubs.attach(client.job_id))

        def send(seq):
            if seq % 2:
                batch = sequences(VOCAB, (9, 5, 12), seed=seq)
                return model.forward_backward(calls.batch(batch), seq=seq)
            return model.optim_step(seq=seq, learning_rate=1e-2, expected_ops=1)

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for ref in list(pool.map(send, order)):
                model.result(ref)
        end = model.save_snapshot("end", seq=2 * steps + 1)
        return model.result(end).snapshot.digest

    numbers = list(range(1, 2 * steps + 1))
    shuffled = numbers + numbers[::5]
    random.Random(9).shuffle(shuffled)
    assert train(numbers, 1) == train(shuffled, 8)


def test_numbers_far_ahead_hold_nobody_up(binaries, models, tmp_path):
    far = 10**15
    for again in range(2):
        flags = ["--gap_timeout_seconds=1"]
        with (
            Server(tmp_path, *flags) as server,
            calls.Stubs(server.address) as stubs,
        ):
            if not again:
                stubs.create_job("job", base_model=str(models["llama"]))
                model = calls.Model(stubs, stubs.attach("job"))
                waits = model.zero_grad(seq=far)
                error = calls.refusal(stubs, lambda ref=waits: ref)
                assert error.reason == "SEQUENCE_GAP"
                assert model.due() == far + 1
            else:
                stubs.watch("job", lambda job: job.ready)
            # Closed by being taken over, too.
            other = calls.Model(stubs, stubs.attach("job"))
            other.zero_grad(seq=far)
            last = calls.Model(stubs, stubs.attach("job"))
            last.result(last.zero_grad())
            request = jobs_pb2.GetJobRequest(job_id="job")
            assert stubs.jobs.GetJob(request, timeout=10).ready
            for seq in (2**62 + 1, 2**63 - 1):
                error = calls.refusal(
                    stubs, lambda seq=seq, last=last: last.zero_grad(seq=seq)
                )
                assert error.reason == "SEQ_INVALID"


def test_a_repeated_model_is_the_same_request(stubs, shared_job):
    request = {"session_id": stubs.new_session(), "take_over": True}
    first = stubs.attach(shared_job, **request)
    assert stubs.attach(shared_job, **request) == first
    for other in (
        {"mode": training_pb2.MODEL_MODE_FORWARD_ONLY},
        {"base_model": "/another"},
        {"init_from": {"ref": "jobs/a/checkpoints/b"}},
    ):
        error = calls.refusal(
            stubs,
            lambda other=other: stubs.attach(shared_job, **request, **other),
        )
        assert error.reason == "MODEL_CONFIG_MISMATCH"
        assert error.metadata["field"].split(".")[0] in other
    assert stubs.attach(shared_job, **request) == first


def test_batches_and_results_of_many_messages(shared_client):
    """More than one message each way, whole all the same."""
    generator = np.random.default_rng(3)
    data = [
        gradwire.Datum(
            generator.integers(VOCAB, size=60),
            {"target_tokens": generator.integers(VOCAB, size=(60, 64))},
        )
        for _ in range(80)
    ]
    messages = calls.batch(data)
    assert len(messages) > 2, "one message was enough"
    limit = shared_client.info().profile.max_top_k
    whole = shared_client.forward(data, top_k=limit).result()
    assert len(whole.logprobs) == len(data)
    sent = sum(lp.nbytes for lp in whole.top_k_logprobs)
    assert 3 * sent > wire.CHUNK_BYTES
    for datum, logprobs, best in zip(
        data, whole.logprobs, whole.top_k_logprobs, strict=True
    ):
        assert logprobs.shape == (60, 64)
        assert best.shape == (60, limit)
        targets = datum.loss_fn_inputs["target_tokens"]
        same = targets[:, :1] == targets
        first = np.broadcast_to(logprobs[:, :1], logprobs.shape)
        assert np.array_equal(logprobs[same], first[same])
    single = shared_client.forward(data[-1:]).result()
    error = np.abs(single.logprobs[0] - whole.logprobs[-1])
    # Two float32 roundings of the logit and its log-sum-exp, at most a sum of
    # the vocabulary apart.
    largest = np.abs(whole.logprobs[-1]).max()
    assert error.max() <= VOCAB * np.finfo(np.float32).eps * largest


def test_completions_are_watched(model):
    session = model.stubs.new_session()
    handle = calls.Model(
        model.stubs,
        model.stubs.attach(model.info().job_id, session_id=session),
    )
    refs = [handle.forward(parts(9)), handle.optim_step(seq=2)]
    request = operations_pb2.WatchOperationsRequest(session_id=session)
    watching = model.stubs.operations.WatchOperations(request)
    events = [next(watching) for _ in refs]
    watching.cancel()
    assert [e.operation.op_id for e in events] == [r.op_id for r in refs]
    cursors = [event.cursor for event in events]
    assert cursors == sorted(set(cursors))
    request.from_cursor = cursors[0]
    watching = model.stubs.operations.WatchOperations(request)
    assert next(watching).cursor == cursors[1]
    watching.cancel()


def test_a_finished_session_makes_nothing_new(stubs, shared_job):
    session = stubs.new_session()
    stubs.sessions.Heartbeat(sessions_pb2.HeartbeatRequest(session_id=session))
    finish = sessions_pb2.FinishSessionRequest(
        session_id=session, reason="success"
    )
    stubs.sessions.FinishSession(finish)
    stubs.sessions.FinishSession(finish)  # the first call wins
    error = calls.refusal(
        stubs, lambda: stubs.attach(shared_job, session_id=session)
    )
    assert (error.code, error.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "SESSION_FINISHED",
    )
    error = calls.refusal(
        stubs, lambda: stubs.attach(shared_job, session_id="no-such-session")
    )
    assert (error.code, error.reason) == (
        grpc.StatusCode.NOT_FOUND,
        "SESSION_NOT_FOUND",
    )


def test_a_creation_that_is_repeated_makes_one_handle(stubs, shared_job):
    session = stubs.new_session()
    first = stubs.attach(shared_job, session_id=session)
    assert stubs.attach(shared_job, session_id=session) == first


def test_an_unloaded_model_answers_no_more(stubs, shared_job):
    model = calls.Model(stubs, stubs.attach(shared_job))
    model.result(model.forward_backward(parts(9)))
    request = calls.training_pb2.SequencedRequest(
        model_id=model.model_id, seq_id=2
    )
    model.result(stubs.training.UnloadModel(request))
    error = calls.refusal(stubs, lambda: model.forward(parts(9), seq=3))
    assert (error.code, error.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "MODEL_UNLOADED",
    )
    new = calls.Model(stubs, stubs.attach(shared_job, take_over=False))
    assert new.nothing_accumulated()


def test_a_forward_only_handle_does_that_alone(stubs, shared_job):
    mode = calls.training_pb2.MODEL_MODE_FORWARD_ONLY
    model = calls.Model(stubs, stubs.attach(shared_job, mode=mode))
    assert model.logprobs(model.forward(parts(9, 5)), 2)
    for call in (
        lambda: model.forward_backward(parts(9)),
        lambda: model.optim_step(),
    ):
        error = calls.refusal(stubs, call)
        assert (error.code, error.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "MODEL_FORWARD_ONLY",
        )
