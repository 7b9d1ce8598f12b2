# SPDX-License-Identifier: Apache-2.0
"""Processes that die: nothing is lost, or what is lost is said."""

import os
import pathlib
import signal
import subprocess
import sys

import calls
import gradwire
import pytest
from conftest import MODELS, sequences
from gradwire._proto.gradwire.v1 import jobs_pb2
from processes import Server, Watched, ranks_of

VOCAB = MODELS["llama"][1]["vocab_size"]
# Of waits that end early where all is well.
LONG = 60


@pytest.fixture
def own_server(binaries):
    with gradwire.LocalServer(threads=1) as running:
        yield running


@pytest.fixture
def own(own_server):
    with calls.Stubs(own_server.address) as stubs:
        yield stubs


def kill(pid):
    watched = Watched(pid)
    os.kill(pid, signal.SIGKILL)
    assert watched.has_ended(LONG)
    watched.close()


def dying_client(server, model, seq, where):
    """A client of its own process that has come to `where` and is dead."""
    script = pathlib.Path(__file__).with_name("dying_client.py")
    client = subprocess.Popen(
        [
            sys.executable,
            script,
            server.address,
            model.model_id,
            str(seq),
            where,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdout.readline() == "reached\n"
    client.kill()
    client.communicate()


def test_a_client_that_dies_in_its_upload_leaves_nothing(server, model):
    seq = model.due()
    dying_client(server, model, seq, "upload")
    # The number is open: whatever takes it finds nothing accumulated.
    step = model.result(model.optim_step(seq=seq, expected_ops=0)).optim_step
    assert step.skipped


def test_a_client_that_dies_between_the_halves_leaves_nothing(server, model):
    seq = model.due()
    dying_client(server, model, seq, "custom")
    assert model.due() == seq + 1
    step = model.optim_step(seq=seq + 1, expected_ops=0)
    assert model.result(step).optim_step.skipped


def test_another_client_can_send_the_missing_half(server, model):
    seq = model.due()
    dying_client(server, model, seq, "custom")
    request = calls.operations_pb2.GetOperationRequest(
        model_id=model.model_id, seq_id=seq
    )
    forward = model.stubs.operations.GetOperation(request)
    logprobs = model.logprobs(forward, 4)
    parts = calls.gradient_parts(logprobs)
    activation_id = forward.forward.activation_id
    model.result(model.backward(activation_id, parts, seq=seq + 1))
    step = model.result(model.optim_step(learning_rate=0.0, expected_ops=1))
    assert step.optim_step.loss_tokens == sum(len(lp) for lp in logprobs)


def test_without_recovery_a_killed_rank_fails_its_job_alone(models, tmp_path):
    with Server(tmp_path) as server, calls.Stubs(server.address) as own:
        without_recovery(server, own, models)


def without_recovery(server, own, models):
    spec = {"base_model": str(models["llama"]), "precision": "f32"}
    doomed = own.create_job(**spec)
    (rank,) = ranks_of(server.process.pid)
    healthy = own.create_job(**spec)
    data = sequences(VOCAB, (9, 5))

    model = calls.Model(own, own.attach(doomed))
    model.result(model.forward_backward(calls.batch(data)))
    # These wait for a number that never comes.
    due = model.due()
    waiting = [
        model.forward_backward(calls.batch(data), seq=due + 1),
        model.optim_step(seq=due + 2),
    ]
    kill(rank)
    job = own.watch(doomed, lambda j: j.state == jobs_pb2.JOB_STATE_FAILED)
    assert job.status_reason == "RANK_EXITED"
    assert job.error.reason == "RANK_EXITED"
    assert not job.ready
    assert "9" in job.status_message or "KILL" in job.status_message.upper()
    for ref in waiting:
        error = calls.refusal(own, lambda ref=ref: ref)
        assert error.reason == "RANK_EXITED"
        assert error.category == "SERVER"
    refused = (
        lambda: model.optim_step(seq=due),
        lambda: own.attach(doomed),
    )
    for call in refused:
        assert calls.refusal(own, call).reason in ("JOB_FAILED", "RANK_EXITED")

    other = calls.Model(own, own.attach(healthy))
    other.result(other.forward_backward(calls.batch(data)))
    step = other.result(other.optim_step(expected_ops=1)).optim_step
    assert step.optimizer_step == 1
    assert own.create_job(**spec)


def test_futures_of_a_killed_rank_come_all_the_same(own_server, models):
    data = sequences(VOCAB, (60,) * 64)
    results = []
    with gradwire.ServiceClient(address=own_server.address) as service:
        for kills in (0, 3):
            client = service.create_training_client(
                models["llama"], precision="f32"
            )
            futures = []
            for _ in range(16):
                futures.append(client.forward_backward(data, "cross_entropy"))
                futures.append(client.optim_step())
            for number in range(kills):
                futures[4 * number].result()
                # It may have been told before the last kill.
                while not (ranks := ranks_of(own_server.pid)):
                    service.get_job(client.job_id)
                kill(ranks.pop())
            done = [future.result(LONG) for future in futures]
            results.append(
                [
                    [x.tobytes() for x in r.logprobs]
                    if hasattr(r, "logprobs")
                    else (r.optimizer_step, r.grad_norm)
                    for r in done
                ]
            )
            job = service.get_job(client.job_id)
            assert job.optimizer_step == 16
            assert (job.recoveries > 0) == (kills > 0)
            service.delete_job(client.job_id)
    assert results[0] == results[1]


def test_a_failed_job_goes_on_where_it_was(models, tmp_path):
    data = sequences(VOCAB, (9, 5))
    with (
        Server(tmp_path) as server,
        gradwire.ServiceClient(address=server.address) as service,
    ):

        def attach(job_id=None):
            return service.create_training_client(
                models["llama"], precision="f32", job_id=job_id
            )

        first = attach()
        first.forward_backward(data, "cross_entropy").result()
        first.optim_step(gradwire.AdamParams(learning_rate=0.1)).result()
        before = first.forward(data).result().logprobs
        (rank,) = ranks_of(server.process.pid)
        kill(rank)
        with calls.Stubs(server.address) as stubs:
            stubs.watch(
                first.job_id, lambda j: j.state == jobs_pb2.JOB_STATE_FAILED
            )
        restarted = service.restart_job(first.job_id)
        assert restarted.optimizer_step == 1
        again = attach(first.job_id)
        after = again.forward(data).result().logprobs
        for x, y in zip(before, after, strict=True):
            assert (x == y).all()
        recovery = service.get_job(first.job_id).last_recovery
        assert recovery.cause == "RESTARTED"
        assert recovery.restored_from == "base model"
        assert recovery.replayed_ops == 3, "attach, gradient, step"
        with pytest.raises(gradwire.GradwireError) as caught:
            first.forward(data).result()
        assert caught.value.reason == "HANDLE_FENCED"


def test_a_deleted_job_ends_its_rank(own_server, own, models):
    job = own.create_job(base_model=str(models["llama"]), precision="f32")
    (rank,) = ranks_of(own_server.pid)
    watched = Watched(rank)
    own.jobs.DeleteJob(jobs_pb2.DeleteJobRequest(job_id=job, force=True))
    assert watched.has_ended(LONG)
    watched.close()


def test_ranks_end_with_a_killed_server(own_server, own, models):
    for _ in range(2):
        own.create_job(base_model=str(models["llama"]), precision="f32")
    ranks = [Watched(pid) for pid in ranks_of(own_server.pid)]
    assert len(ranks) == 2
    kill(own_server.pid)
    for rank in ranks:
        assert rank.has_ended(LONG)
        rank.close()


def test_a_state_directory_outlives_a_killed_server(tmp_path, models):
    state = tmp_path / "state"
    with gradwire.LocalServer(state, threads=1) as first:
        with calls.Stubs(first.address) as stubs:
            stubs.create_job(base_model=str(models["llama"]))
        kill(first.pid)
    with gradwire.LocalServer(state, threads=1) as second:
        with calls.Stubs(second.address) as stubs:
            stubs.create_job(base_model=str(models["llama"]))
