# SPDX-License-Identifier: Apache-2.0
"""A server that is killed and started again: what it knows, what it takes up
again, what it refuses. How bits come through any kill is in tests/faults."""

import contextlib
import os
import pathlib
import shutil
import signal
import sqlite3
import subprocess
import time

import calls
import grpc
import pytest
from conftest import MODELS, sequences
from gradwire._proto.gradwire.v1 import (
    jobs_pb2,
    operations_pb2,
    sessions_pb2,
    training_pb2,
)
from gradwire.errors import from_rpc
from gradwire.local_server import find_server
from processes import Server, ranks_of

VOCAB = MODELS["llama"][1]["vocab_size"]
DATA = sequences(VOCAB, (9, 17, 5, 12))
BIT_IDENTICAL = jobs_pb2.REPLAY_FIDELITY_BIT_IDENTICAL
WITHIN_TOLERANCE = jobs_pb2.REPLAY_FIDELITY_WITHIN_TOLERANCE


def kill(server):
    server.process.kill()
    server.process.wait()


@contextlib.contextmanager
def serving(state_dir, *flags):
    with (
        Server(state_dir, "--max_recoveries=5", *flags) as server,
        calls.Stubs(server.address) as stubs,
    ):
        yield server, stubs


def ended(job):
    return job.ready or job.state == jobs_pb2.JOB_STATE_FAILED


def recovered(stubs):
    """The job, as soon as it is ready, or has failed."""
    job = stubs.watch("job", ended)
    assert job.last_recovery.restored_from or not job.ready
    return job


def profile_of(stubs):
    return stubs.jobs.GetProfile(jobs_pb2.GetProfileRequest(job_id="job"))


def arrays_of(parts):
    return [x.logprobs.data for part in parts for x in part.chunk.items]


def log_of(state_dir, job="job"):
    return sorted((pathlib.Path(state_dir) / "jobs" / job / "log").iterdir())


def points_of(state_dir):
    """(number, optimizer step) of the checkpoints that recovery knows."""
    with contextlib.closing(
        sqlite3.connect(pathlib.Path(state_dir) / "gradwire.db")
    ) as database:
        return database.execute(
            "SELECT number, optimizer_step FROM recovery_points "
            "WHERE job_id = 'job' ORDER BY number"
        ).fetchall()


def await_points(state_dir, stubs, count):
    """They are written beside the training, one after the other: steps that
    were taken meanwhile have none of their own."""
    end = time.monotonic() + 120
    while len(points_of(state_dir)) < count:
        assert time.monotonic() < end, points_of(state_dir)
        stubs.jobs.GetJob(jobs_pb2.GetJobRequest(job_id="job"))


def new_model(stubs, models, job="job", **spec):
    stubs.create_job(
        job, base_model=str(models["llama"]), precision="f32", **spec
    )
    return calls.Model(stubs, stubs.attach(job))


def train(model, steps):
    """(op_id, logprobs, grad_norm) of each."""
    out = []
    for _ in range(steps):
        ref = model.forward_backward(calls.batch(DATA))
        logprobs = model.logprobs(ref, len(DATA))
        step = model.result(model.optim_step(learning_rate=0.01))
        out.append(
            (
                ref.op_id,
                [x.tobytes() for x in logprobs],
                step.optim_step.grad_norm,
            )
        )
    return out


def logprobs_now(model):
    ref = model.forward(calls.batch(DATA))
    return [x.tobytes() for x in model.logprobs(ref, len(DATA))]


def fetch(stubs, op_id):
    return list(
        stubs.operations.FetchResult(
            operations_pb2.FetchResultRequest(op_id=op_id)
        )
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_next_server_knows_all_and_goes_on(models, tmp_path, world_size):
    with serving(tmp_path) as (server, stubs):
        undisturbed = new_model(stubs, models, "calm", world_size=world_size)
        want = train(undisturbed, 4)
        weights = logprobs_now(undisturbed)
        model = new_model(stubs, models, world_size=world_size)
        session = stubs.new_session()
        assert [x[1:] for x in train(model, 2)] == [x[1:] for x in want[:2]]
        ref = model.forward_backward(calls.batch(DATA))
        done = model.result(ref)
        arrays = fetch(stubs, ref.op_id)
        # This one may have run, or may not.
        pending = model.optim_step(seq=6, learning_rate=0.01)
        kill(server)
    with serving(tmp_path) as (server, stubs):
        model.stubs = stubs
        # Before the ranks are back: nothing of it needs them.
        request = operations_pb2.GetOperationRequest(op_id=ref.op_id)
        found = stubs.operations.GetOperation(request)
        assert found.durable and not done.durable, "the next server synced it"
        for operation in (found, done):
            operation.ClearField("durable")
            operation.ClearField("durable_through_seq")
        assert found == done
        assert fetch(stubs, ref.op_id) == arrays
        again = model.forward_backward(calls.batch(DATA), seq=5)
        assert again.op_id == ref.op_id, "a repetition"
        reused = model.forward_backward, calls.batch(DATA[:2])
        error = calls.refusal(stubs, lambda: reused[0](reused[1], seq=5))
        assert error.reason == "SEQ_REUSED"
        stubs.sessions.Heartbeat(
            sessions_pb2.HeartbeatRequest(session_id=session)
        )
        step = model.result(pending).optim_step
        assert (step.optimizer_step, step.grad_norm) == (3, want[2][2])
        assert [x[1:] for x in train(model, 1)] == [want[3][1:]]
        assert logprobs_now(model) == weights
        job = recovered(stubs)
        assert job.last_recovery.cause == "SERVER_STARTED"
        assert job.last_recovery.restored_from == "base model"
        assert job.optimizer_step == 4


def test_recovery_begins_at_the_last_checkpoint_and_the_log_is_cut(
    models, tmp_path
):
    flag = "--auto_checkpoint_steps=3"
    with serving(tmp_path, flag) as (server, stubs):
        want = train(new_model(stubs, models, "calm"), 12)
        model = new_model(stubs, models)
        first = train(model, 5)
        await_points(tmp_path, stubs, 1)
        first += train(model, 5)
        await_points(tmp_path, stubs, 2)
        # What was checkpointed is told from the database, arrays from the log.
        kill(server)
    (_, older), (_, newer) = points_of(tmp_path)
    assert 0 < older < newer <= 10
    with serving(tmp_path, flag) as (server, stubs):
        model.stubs = stubs
        assert [x[1:] for x in first] == [x[1:] for x in want[:10]]
        for op_id, arrays, _ in first:
            assert arrays_of(fetch(stubs, op_id)) == arrays
        assert [x[1:] for x in train(model, 2)] == [x[1:] for x in want[10:]]
        job = recovered(stubs)
        assert job.last_recovery.restored_from == f"checkpoint of step {newer}"
        assert job.last_recovery.replayed_ops == 2 * (10 - newer)
        # Ranks' death alone is mended in the same way.
        for rank in ranks_of(server.process.pid):
            os.kill(rank, signal.SIGKILL)
        stubs.watch("job", lambda job: job.recoveries == 1 and job.ready)


def test_a_checkpoint_that_nobody_knows_is_in_nobodys_way(models, tmp_path):
    with serving(tmp_path) as (server, stubs):
        model = new_model(stubs, models)
        kill(server)
    # Of a server that died before the database knew it.
    stray = tmp_path / "jobs" / "job" / "recovery" / "1"
    stray.mkdir(parents=True)
    (stray / "manifest.json").write_text("half")
    with serving(tmp_path, "--auto_checkpoint_steps=1") as (server, stubs):
        assert not stray.exists()
        model.stubs = stubs
        train(model, 1)
        await_points(tmp_path, stubs, 1)
        assert points_of(tmp_path) == [(1, 1)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_whose_results_have_expired_are_run_again(
    models, tmp_path, world_size
):
    spec = {"world_size": world_size}
    with serving(tmp_path, "--result_retention_seconds=5") as (server, stubs):
        want = train(new_model(stubs, models, "calm", **spec), 3)
        model = new_model(stubs, models, **spec)
        train(model, 2)
        last = model.forward_backward(calls.batch(DATA))
        model.logprobs(last, len(DATA))

        def told():
            return stubs.wait(last.op_id)

        assert told().state == operations_pb2.OPERATION_STATE_DONE
        end = time.monotonic() + 60
        while told().state == operations_pb2.OPERATION_STATE_DONE:
            assert time.monotonic() < end
            time.sleep(0.1)
        expired = told()
        assert expired.state == operations_pb2.OPERATION_STATE_FAILED
        assert expired.error.reason == "RESULT_EXPIRED"
        assert not expired.HasField("forward")
        ranks = ranks_of(server.process.pid)
        assert len(ranks) == 2 * world_size
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
        step = model.result(model.optim_step(learning_rate=0.01))
        assert step.optim_step.grad_norm == want[2][2]
        assert recovered(stubs).last_recovery.fidelity == BIT_IDENTICAL
        assert told().error.reason == "RESULT_EXPIRED"


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_checkpoint_only_makes_it_longer(models, tmp_path, damaged):
    flag = "--auto_checkpoint_steps=2"
    with serving(tmp_path, flag) as (server, stubs):
        want = train(new_model(stubs, models, "calm"), 8)
        model = new_model(stubs, models)
        train(model, 3)
        await_points(tmp_path, stubs, 1)
        train(model, 4)
        await_points(tmp_path, stubs, 2)
        kill(server)
    points = points_of(tmp_path)
    step = points[0][1]
    folder = tmp_path / "jobs" / "job" / "recovery"
    for number, _ in points[2 - damaged :]:
        path = folder / str(number) / "rank-00000.data"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with serving(tmp_path, flag) as (server, stubs):
        model.stubs = stubs
        job = recovered(stubs)
        if damaged == 1:
            assert job.last_recovery.damaged_checkpoints == 1
            assert (
                job.last_recovery.restored_from == f"checkpoint of step {step}"
            )
            assert [x[1:] for x in train(model, 1)] == [want[7][1:]]
            return
        # The log no longer begins at the beginning: never from initial weights.
        assert job.state == jobs_pb2.JOB_STATE_FAILED
        assert job.status_reason == "CHECKPOINT_CORRUPT"
        error = calls.refusal(stubs, lambda: model.optim_step(seq=99))
        assert error.reason == "JOB_FAILED"


def test_a_replay_that_differs_stops_the_job_and_no_other(models, tmp_path):
    base = tmp_path / "model"
    shutil.copytree(models["llama"], base)
    state = tmp_path / "state"
    state.mkdir()
    with serving(state) as (server, stubs):
        stubs.create_job("job", base_model=str(base), precision="f32")
        train(calls.Model(stubs, stubs.attach("job")), 2)
        healthy = new_model(stubs, models, "healthy")
        train(healthy, 1)
        kill(server)
    # One bit of one weight is another.
    path = base / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4096] ^= 1
    path.write_bytes(content)
    with serving(state) as (server, stubs):
        job = stubs.watch("job", ended)
        assert job.status_reason == "REPLAY_DIVERGED"
        assert job.error.code == grpc.StatusCode.DATA_LOSS.value[0]
        assert job.error.metadata["value"] != job.error.metadata["limit"]
        healthy.stubs = stubs
        train(healthy, 1)


@pytest.mark.parametrize("where", ["middle", "tail"])
def test_damage_in_what_was_synced_stops_the_job_and_no_other(
    models, tmp_path, where
):
    with serving(tmp_path) as (server, stubs):
        model = new_model(stubs, models)
        train(model, 2)
        healthy = new_model(stubs, models, "healthy")
        train(healthy, 1)
        kill(server)
    (segment,) = log_of(tmp_path)
    content = bytearray(segment.read_bytes())
    if where == "middle":
        content[len(content) // 2] ^= 4
    else:
        content = content[:-40]
    segment.write_bytes(content)
    with serving(tmp_path) as (server, stubs):
        job = stubs.watch("job", ended)
        assert job.status_reason == "OPLOG_CORRUPT"
        assert job.error.metadata["segment"] == segment.name
        healthy.stubs = stubs
        train(healthy, 1)
        error = calls.refusal(stubs, lambda: stubs.restart_job("job"))
        assert error.reason == "OPLOG_CORRUPT"


def test_an_unsynced_tail_that_is_torn_is_cut(models, tmp_path):
    with serving(tmp_path) as (server, stubs):
        model = new_model(stubs, models)
        want = train(model, 1)
        synced = log_of(tmp_path)[-1].stat().st_size
        ref = model.forward_backward(calls.batch(DATA), seq=3)
        done = model.result(ref)
        assert not done.durable
        assert done.durable_through_seq == 2
        kill(server)
    segment = log_of(tmp_path)[-1]
    segment.write_bytes(segment.read_bytes()[: synced + 100])
    with serving(tmp_path) as (server, stubs):
        model.stubs = stubs
        stubs.watch("job", ended)
        assert model.due() == 3, "as if it had never come"
        ref = model.forward_backward(calls.batch(DATA), seq=3)
        again = model.result(ref)
        assert again.forward.metrics == done.forward.metrics
        step = model.result(model.optim_step(seq=4, learning_rate=0.01))
        assert step.durable
        assert step.durable_through_seq == 4
    assert want


def test_deleted_failed_and_fenced_stay_so(models, tmp_path):
    with serving(tmp_path) as (server, stubs):
        new_model(stubs, models, "gone")
        stubs.delete_job("gone")
        assert not (tmp_path / "jobs" / "gone" / "log").exists()
        stubs.start_job("failed", base_model=str(tmp_path / "none"))
        failed = stubs.watch("failed", ended)
        old = new_model(stubs, models)
        train(old, 1)
        key = {"session_id": stubs.new_session()}
        new = calls.Model(stubs, stubs.attach("job", **key))
        kill(server)
    with serving(tmp_path) as (server, stubs):
        old.stubs = new.stubs = stubs
        error = calls.refusal(
            stubs, lambda: stubs.start_job("gone", base_model="x")
        )
        assert error.reason == "JOB_ID_TOMBSTONED"
        job = stubs.jobs.GetJob(jobs_pb2.GetJobRequest(job_id="failed"))
        assert job.state == jobs_pb2.JOB_STATE_FAILED
        assert job.error == failed.error
        assert calls.refusal(stubs, lambda: old.optim_step(seq=9)).reason == (
            "HANDLE_FENCED"
        )
        # The same call again is the same handle.
        assert stubs.attach("job", **key) == new.model_id
        request = training_pb2.CreateModelRequest(
            session_id=key["session_id"],
            model_seq_id=1,
            job_id="job",
            take_over=True,
        )
        created = stubs.training.CreateModel(request)
        assert created.attached
        assert created.optimizer_step == 1
        train(new, 1)


def test_of_a_handle_that_the_log_does_not_know_nothing_is_waited_for(
    models, tmp_path
):
    with serving(tmp_path) as (server, stubs):
        session = stubs.new_session()
        model = new_model(stubs, models)
        train(model, 1)
        kill(server)
    # As if power had failed while another one took over from it.
    request = training_pb2.CreateModelRequest(
        session_id=session, model_seq_id=1, job_id="job"
    )
    with contextlib.closing(
        sqlite3.connect(tmp_path / "gradwire.db", isolation_level=None)
    ) as database:
        database.execute(
            "INSERT INTO handles VALUES ('job', 0, 'job.0', ?, ?, 0, 0, 0)",
            (session, request.SerializeToString()),
        )
    with serving(tmp_path) as (server, stubs):
        recovered(stubs)
        with pytest.raises(grpc.RpcError) as refused:
            stubs.training.CreateModel(request, timeout=30)
        assert from_rpc(refused.value).reason == "HANDLE_FENCED"
        model.stubs = stubs
        train(model, 1)


def test_numbers_that_were_closed_stay_closed(models, tmp_path):
    flag = "--gap_timeout_seconds=0.2"
    with serving(tmp_path, flag) as (server, stubs):
        model = new_model(stubs, models)
        train(model, 1)
        late = model.optim_step(seq=5)
        assert calls.refusal(stubs, lambda: late).reason == "SEQUENCE_GAP"
        assert model.due() == 6
        kill(server)
    with serving(tmp_path, flag) as (server, stubs):
        model.stubs = stubs
        assert model.due() == 6
        error = calls.refusal(stubs, lambda: model.optim_step(seq=4))
        assert error.reason == "SEQUENCE_CLOSED"
        train(model, 1)


def test_a_failure_is_not_decided_again(models, tmp_path):
    with serving(tmp_path) as (server, stubs):
        model = new_model(stubs, models)
        train(model, 1)
        model.result(model.forward_backward(calls.batch(DATA)))
        refused = model.optim_step(learning_rate=0.01, expected_ops=7)
        error = calls.refusal(stubs, lambda: refused)
        assert error.reason == "ACCUMULATION_MISMATCH"
        assert stubs.wait(refused.op_id).durable
        # It has dropped the gradient, and so must a replay.
        kill(server)
    with serving(tmp_path) as (server, stubs):
        model.stubs = stubs
        again = calls.refusal(stubs, lambda: refused)
        assert again.reason == "ACCUMULATION_MISMATCH"
        assert again.metadata == error.metadata
        assert model.nothing_accumulated()


def test_a_save_is_what_it_had_published_and_nothing_else(models, tmp_path):
    folder = tmp_path / "jobs" / "job" / "checkpoints"
    with serving(tmp_path) as (server, stubs):
        model = new_model(stubs, models)
        train(model, 1)
        there = model.result(model.save_state("there")).save_state
        # Both wait for a number that has not come.
        published = model.save_state("published", seq=5)
        taken = model.save_state("there", seq=6)
        kill(server)
    # As if the server had died when it was published, and before it was told.
    shutil.copytree(folder / "there", folder / "published")
    with serving(tmp_path) as (server, stubs):
        model.stubs = stubs
        model.result(model.zero_grad(seq=4))
        found = model.result(published).save_state
        assert found.path == "gradwire://jobs/job/checkpoints/published"
        assert (found.digest, found.bytes) == (there.digest, there.bytes)
        assert found.optimizer_step == 1
        error = calls.refusal(stubs, lambda: taken)
        assert error.reason == "CHECKPOINT_EXISTS"


def test_kept_activations_come_back(models, tmp_path):
    with serving(tmp_path) as (server, stubs):
        model = new_model(stubs, models)
        train(model, 1)
        ref = model.forward(calls.batch(DATA), retain=True)
        logprobs = model.logprobs(ref, len(DATA))
        kept = model.result(ref).forward.activation_id
        kill(server)
    with serving(tmp_path) as (server, stubs):
        model.stubs = stubs
        parts = calls.gradient_parts(logprobs)
        model.result(model.backward(kept, parts))
        step = model.result(model.optim_step(expected_ops=1)).optim_step
        assert step.optimizer_step == 2
        assert step.grad_norm > 0


def test_a_handle_that_attaches_meanwhile_comes_after_what_ran(
    models, tmp_path
):
    with serving(tmp_path) as (server, stubs):
        old = new_model(stubs, models)
        refs = []
        for number in range(8):
            seq = 2 * number + 1
            old.forward_backward(calls.batch(DATA), seq=seq)
            refs.append(old.optim_step(seq=seq + 1, learning_rate=0.01))
        os.kill(ranks_of(server.process.pid).pop(), signal.SIGKILL)
        request = training_pb2.CreateModelRequest(
            session_id=stubs.new_session(),
            model_seq_id=1,
            job_id="job",
            take_over=True,
        )
        created = stubs.training.CreateModel(request)
        ends = [stubs.wait(ref.op_id) for ref in refs]
        done = [e for e in ends if e.HasField("optim_step")]
        assert all(
            e.error.reason == "HANDLE_FENCED" for e in ends if e not in done
        )
        assert [e.optim_step.optimizer_step for e in done] == list(
            range(1, len(done) + 1)
        )
        assert created.optimizer_step == len(done)
        kill(server)
    with serving(tmp_path) as (server, stubs):
        new = calls.Model(stubs, created.model_id)
        # At once, and not only when the ranks have come so far.
        assert new.info().optimizer_step == len(done)
        assert stubs.training.CreateModel(request) == created
        step = new.result(new.optim_step(expected_ops=0)).optim_step
        assert step.skipped
        assert step.optimizer_step == len(done)


def test_a_clean_stop_loses_nothing_that_was_accepted(models, tmp_path):
    with serving(tmp_path, "--drain_seconds=0") as (server, stubs):
        model = new_model(stubs, models)
        refs = []
        for number in range(20):
            seq = 2 * number + 1
            refs.append(model.forward_backward(calls.batch(DATA), seq=seq))
            refs.append(model.optim_step(seq=seq + 1, learning_rate=0.01))
        server.process.terminate()
        assert server.process.wait() == 143
    with serving(tmp_path) as (server, stubs):
        model.stubs = stubs
        steps = [model.result(ref) for ref in refs]
        assert steps[-1].optim_step.optimizer_step == 20


def test_a_job_that_cannot_recover_fails_with_the_reason(models, tmp_path):
    base = tmp_path / "model"
    shutil.copytree(models["llama"], base)
    state = tmp_path / "state"
    state.mkdir()
    with serving(state) as (server, stubs):
        stubs.create_job("job", base_model=str(base), precision="f32")
        model = calls.Model(stubs, stubs.attach("job"))
        train(model, 1)
        shutil.move(base, tmp_path / "away")
        os.kill(ranks_of(server.process.pid).pop(), signal.SIGKILL)
        job = stubs.watch("job", lambda j: j.state == jobs_pb2.JOB_STATE_FAILED)
        assert job.status_reason not in ("", "RANK_EXITED")
        shutil.move(tmp_path / "away", base)
        stubs.restart_job("job")
        stubs.watch("job", ended)
        again = calls.Model(stubs, stubs.attach("job"))
        assert again.info().optimizer_step == 1
        train(again, 1)


def test_a_second_server_is_kept_out_by_the_lock(tmp_path):
    with serving(tmp_path) as (server, stubs):
        command = [
            find_server(),
            f"--state_dir={tmp_path}",
            "--listen=127.0.0.1:0",
            "--metrics_listen=127.0.0.1:0",
        ]
        second = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False
        )
        assert second.returncode != 0
        assert str(server.process.pid) in second.stdout + second.stderr
        # Nor has it taken the lease.
        new = stubs.new_session()
        assert new
    kill(server)


def test_a_second_server_is_kept_out_by_its_epoch(models, tmp_path):
    """The lock is one host's; the lease is the state directory's."""
    with serving(tmp_path) as (server, stubs):
        model = new_model(stubs, models)
        train(model, 1)
        with sqlite3.connect(tmp_path / "gradwire.db") as database:
            database.execute("UPDATE lease SET epoch = epoch + 1")
        model.result(model.forward_backward(calls.batch(DATA)))
        step = calls.refusal(stubs, lambda: model.optim_step())
        assert step.reason == "EPOCH_FENCED"
        job = stubs.jobs.GetJob(jobs_pb2.GetJobRequest(job_id="job"))
        assert job.state == jobs_pb2.JOB_STATE_FAILED


def test_other_kernels_replay_within_a_tolerance(models, tmp_path, monkeypatch):
    """Another instruction set, or build, rounds in another way; that is said,
    and a change that is more than rounding still stops the job."""
    base = tmp_path / "model"
    shutil.copytree(models["llama"], base)
    state = tmp_path / "state"
    state.mkdir()
    with serving(state) as (server, stubs):
        stubs.create_job("job", base_model=str(base))
        model = calls.Model(stubs, stubs.attach("job"))
        precision = profile_of(stubs).precision
        first = train(model, 3)
        kill(server)
    with serving(state) as (server, stubs):
        job = recovered(stubs)
        assert job.last_recovery.fidelity == BIT_IDENTICAL
        kill(server)
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "SSE41")
    with serving(state) as (server, stubs):
        job = recovered(stubs)
        assert job.ready, job.status_message
        assert job.last_recovery.fidelity == WITHIN_TOLERANCE
        assert job.optimizer_step == 3
        # The precision is that of the beginning, whatever suits this device.
        assert profile_of(stubs).precision == precision
        # What had been told is told again, to the bit.
        for op_id, arrays, _ in first:
            assert arrays_of(fetch(stubs, op_id)) == arrays
        model.stubs = stubs
        # Both kinds of records are in the log now.
        train(model, 2)
        kill(server)
    with serving(state) as (server, stubs):
        job = recovered(stubs)
        assert job.ready, job.status_message
        assert job.last_recovery.fidelity == WITHIN_TOLERANCE
        model.stubs = stubs
        train(model, 1)
        kill(server)
    path = base / "model.safetensors"
    content = bytearray(path.read_bytes())
    for i in range(len(content) // 2, len(content), 4):
        content[i + 3] ^= 0x80  # the sign
    path.write_bytes(content)
    with serving(state) as (server, stubs):
        assert recovered(stubs).status_reason == "REPLAY_DIVERGED"
