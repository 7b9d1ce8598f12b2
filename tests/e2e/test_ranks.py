# SPDX-License-Identifier: Apache-2.0
"""Jobs of several ranks: who gets what, what is made of it, how they end.

The ranks are fake_rank.py's, started by the server in gradwire_rank's place.
"""

import contextlib
import json
import os
import pathlib
import signal
import sys
import time
import urllib.request

import calls
import grpc
import pytest
from conftest import MODELS, sequences
from gradwire import cli
from gradwire._proto.gradwire.v1 import jobs_pb2, operations_pb2
from processes import Server, Watched, arguments_of, ranks_by_number

VOCAB = MODELS["llama"][1]["vocab_size"]
# Of waits that end early where all is well.
LONG = 60
RANK_TIMEOUT = 3


@pytest.fixture(scope="module")
def fake_binary(tmp_path_factory):
    script = pathlib.Path(__file__).with_name("fake_rank.py")
    binary = tmp_path_factory.mktemp("bin") / "fake_rank"
    binary.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    binary.chmod(0o755)
    return binary


@pytest.fixture
def fakes(fake_binary, tmp_path, monkeypatch):
    """A server whose ranks are fakes; the last one answers first."""
    monkeypatch.setenv("FAKE_RANK_DELAY", "0.3")
    with Server(
        tmp_path,
        f"--rank_binary={fake_binary}",
        f"--rank_timeout_seconds={RANK_TIMEOUT}",
        "--threads=0",
    ) as server:
        yield server


@pytest.fixture
def own(fakes):
    with calls.Stubs(fakes.address) as stubs:
        yield stubs


def new_model(own, world_size=3):
    job = own.create_job(base_model="anything", world_size=world_size)
    return job, calls.Model(own, own.attach(job))


def indices(stubs, ref):
    """Of the items that FetchResult gives, in its order."""
    request = operations_pb2.FetchResultRequest(op_id=ref.op_id)
    found = []
    for message in stubs.operations.FetchResult(request):
        found += [item.datum_index for item in message.chunk.items]
    return found


def failed(job):
    return job.state == jobs_pb2.JOB_STATE_FAILED


def test_every_rank_has_its_datums_and_results_are_in_order(own):
    _, model = new_model(own)
    lengths = (9, 17, 5, 12, 2, 9, 9)
    data = sequences(VOCAB, lengths)
    ref = model.forward(calls.batch(data), retain=True)
    logprobs = model.logprobs(ref, len(data))
    # The longest first, each to the rank that has least.
    assert [-lp[0] for lp in logprobs] == [2, 0, 0, 1, 2, 2, 1]
    for length, values in zip(lengths, logprobs, strict=True):
        assert len(values) == length - 1
        assert len(set(values)) == 1
    assert indices(own, ref) == list(range(len(data)))
    # A rank that gets a foreign gradient ends.
    gradients = calls.gradient_parts([0.0 * lp for lp in logprobs])
    activation_id = model.result(ref).forward.activation_id
    model.result(model.backward(activation_id, gradients))
    model.result(model.optim_step())


def test_fewer_datums_than_ranks(own):
    _, model = new_model(own)
    data = sequences(VOCAB, (4,))
    ref = model.forward_backward(calls.batch(data))
    assert [-lp[0] for lp in model.logprobs(ref, 1)] == [0]


def test_ranks_share_the_cores(fakes, own):
    new_model(own, world_size=2)
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    for rank, pid in ranks_by_number(fakes.process.pid).items():
        arguments = arguments_of(pid)
        assert f"--threads={max(1, half)}" in arguments
        part = cores[half:] if rank else cores[:half]
        if half:
            assert f"--cpus={','.join(map(str, part))}" in arguments


def test_metrics_tell_every_rank(fakes, own):
    job, _ = new_model(own, world_size=2)
    url = f"http://{fakes.metrics_address}/metrics"
    deadline = time.monotonic() + LONG
    while True:
        text = urllib.request.urlopen(url, timeout=LONG).read().decode()
        found = all(
            f'gradwire_rank_up{{job_id="{job}",rank="{job}/{rank}"}} 1' in text
            and f'_heartbeat_age_seconds{{job_id="{job}",rank="{job}/{rank}"}}'
            in text
            for rank in (0, 1)
        )
        if found:
            break
        assert time.monotonic() < deadline, text
        time.sleep(0.1)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_rank_ends_its_group_and_is_named(fakes, own, how):
    job, model = new_model(own)
    ranks = ranks_by_number(fakes.process.pid)
    watched = [Watched(pid) for pid in ranks.values()]
    waiting = model.optim_step(seq=model.due() + 1)
    os.kill(ranks[1], how)
    ended = own.watch(job, failed)
    assert ended.status_reason == "RANK_EXITED"
    assert ended.error.metadata["rank"] == "1"
    assert ended.error.metadata["signal"] == str(int(how))
    assert "Rank 1" in ended.status_message
    found = calls.refusal(own, lambda: waiting)
    assert found.reason == "RANK_EXITED"
    for rank in watched:
        assert rank.has_ended(LONG)
        rank.close()


def test_a_stopped_rank_is_hung_and_its_group_ends(fakes, own):
    job, model = new_model(own)
    ranks = ranks_by_number(fakes.process.pid)
    watched = [Watched(pid) for pid in ranks.values()]
    # Not even large batches hold the end up.
    parts = list(calls.batch(sequences(VOCAB, (60,) * 3000)))
    begin = time.monotonic()
    os.kill(ranks[2], signal.SIGSTOP)
    running = [model.forward_backward(parts) for _ in range(3)]
    ended = own.watch(job, failed)
    assert time.monotonic() - begin < RANK_TIMEOUT + 10
    assert ended.status_reason == "RANK_HUNG"
    assert ended.error.metadata["rank"] == "2"
    for ref in running:
        found = calls.refusal(own, lambda ref=ref: ref)
        assert found.reason == "RANK_HUNG"
    for rank in watched:
        assert rank.has_ended(LONG)
        rank.close()
    own.delete_job(job)


def test_a_job_with_a_stopped_rank_can_be_deleted(fakes, own):
    job, _ = new_model(own)
    ranks = ranks_by_number(fakes.process.pid)
    os.kill(ranks[0], signal.SIGSTOP)
    own.delete_job(job)
    assert not ranks_by_number(fakes.process.pid)


def test_a_server_with_a_stopped_rank_can_be_stopped(fakes, own):
    _, model = new_model(own)
    ranks = ranks_by_number(fakes.process.pid)
    watched = [Watched(pid) for pid in ranks.values()]
    os.kill(ranks[1], signal.SIGSTOP)
    model.optim_step()
    fakes.process.terminate()
    assert fakes.process.wait(LONG) == 143
    for rank in watched:
        assert rank.has_ended(LONG)
        rank.close()


def test_a_failed_job_starts_again(fakes, own):
    job, model = new_model(own)
    error = calls.refusal(own, lambda: own.restart_job(job))
    assert error.reason == "JOB_NOT_FAILED"
    before = ranks_by_number(fakes.process.pid)
    for _ in range(2):
        os.kill(ranks_by_number(fakes.process.pid)[0], signal.SIGKILL)
        own.watch(job, failed)
        restarted = own.restart_job(job)
        assert not restarted.HasField("error")
        assert "executed" in restarted.status_message
        own.watch(job, lambda j: j.ready)
    after = ranks_by_number(fakes.process.pid)
    assert len(after) == 3 and not set(after.values()) & set(before.values())
    # The handle of before is of no use, a new one is.
    error = calls.refusal(own, model.optim_step)
    assert error.reason == "HANDLE_FENCED"
    model = calls.Model(own, own.attach(job))
    data = sequences(VOCAB, (5, 3))
    model.logprobs(model.forward_backward(calls.batch(data)), 2)
    url = f"http://{fakes.metrics_address}/metrics"
    text = urllib.request.urlopen(url, timeout=LONG).read().decode()
    name = "gradwire_job_restarts_total"
    assert f'{name}{{cause="rank_signal",job_id="{job}"}} 2' in text
    own.delete_job(job)
    error = calls.refusal(own, lambda: own.restart_job(job))
    assert error.reason == "JOB_DELETED"


def await_running(own, ref):
    """Until the ranks have it."""
    request = operations_pb2.GetOperationRequest(op_id=ref.op_id)
    while True:
        operation = own.operations.GetOperation(request)
        if operation.state == operations_pb2.OPERATION_STATE_RUNNING:
            return


def test_what_crashes_a_rank_each_time_is_given_up(
    fake_binary, tmp_path, monkeypatch
):
    monkeypatch.setenv("FAKE_RANK_DELAY", "3")
    flags = (f"--rank_binary={fake_binary}", "--max_recoveries=5")
    with (
        Server(tmp_path, *flags) as server,
        calls.Stubs(server.address) as own,
    ):
        job, model = new_model(own, world_size=2)
        data = calls.batch(sequences(VOCAB, (5, 3)))
        ref = model.forward_backward(data)
        for crashes in range(3):
            own.watch(job, lambda j, n=crashes: j.recoveries == n and j.ready)
            await_running(own, ref)
            os.kill(ranks_by_number(server.process.pid)[1], signal.SIGSEGV)
            own.watch(job, lambda j, n=crashes: j.recoveries == n + 1)
        error = calls.refusal(own, lambda: ref)
        assert error.reason == "OP_CRASHED_WORKER"
        assert error.metadata["signal"] == str(int(signal.SIGSEGV))
        assert error.metadata["rank"] == "1"
        assert error.metadata["limit"] == "3"
        # It is final, and the job goes on without it.
        assert calls.refusal(own, lambda: ref).reason == "OP_CRASHED_WORKER"
        model.logprobs(model.forward_backward(data), 2)


def test_a_save_that_crashes_a_rank_is_given_up_and_nothing_else(
    fake_binary, tmp_path
):
    flags = (f"--rank_binary={fake_binary}", "--max_recoveries=5")
    with (
        Server(tmp_path, *flags) as server,
        calls.Stubs(server.address) as own,
    ):
        job, model = new_model(own, world_size=2)
        data = calls.batch(sequences(VOCAB, (5, 3)))
        # What runs beside it each time is not to blame, nor does its end bring
        # the job on.
        first = model.forward_backward(data)
        save = model.save_snapshot("crashes", seq=2)
        behind = [model.forward_backward(data, seq=3 + n) for n in range(4)]
        error = calls.refusal(own, lambda: save)
        assert error.reason == "OP_CRASHED_WORKER"
        assert error.metadata["seq_id"] == "2"
        for ref in (first, *behind):
            model.logprobs(ref, 2)
        assert own.watch(job, lambda j: j.ready).recoveries == 3
        model.result(model.save_snapshot("another", seq=7))


def test_choices_are_recorded_before_outcomes(
    fake_binary, binaries, tmp_path, monkeypatch
):
    """What a rank has decided is there after a death at which the outcome that
    has its bits may be."""
    failing = binaries / "gradwired_failpoints"
    if not failing.exists():
        pytest.skip("gradwired_failpoints was not built")
    noted = tmp_path / "choices"
    monkeypatch.setenv("FAKE_RANK_CHOICES", str(noted))
    flag = f"--rank_binary={fake_binary}"
    with monkeypatch.context() as patch:
        # After the beginning of a handle.
        patch.setenv("GRADWIRE_FAILPOINT", "op.after_record:2")
        with (
            Server(tmp_path, flag, binary=failing) as server,
            calls.Stubs(server.address) as own,
        ):
            job, model = new_model(own, world_size=2)
            # It may die before it has answered.
            with contextlib.suppress(grpc.RpcError):
                model.forward_backward(calls.batch(sequences(VOCAB, (5, 3))))
            server.process.wait(60)
    with (
        Server(tmp_path, flag) as server,
        calls.Stubs(server.address) as own,
    ):
        own.watch(job, lambda j: j.ready)
    loads = [json.loads(line) for line in noted.read_text().splitlines()]
    assert sorted(loads[:2]) == [[0], [1]]
    assert sorted(loads[2:]) == [
        [0, "rank 0, forward 1"],
        [1, "rank 1, forward 1"],
    ]


def test_a_job_that_keeps_failing_fails(fake_binary, tmp_path):
    flags = (f"--rank_binary={fake_binary}", "--max_recoveries=2")
    with (
        Server(tmp_path, *flags) as server,
        calls.Stubs(server.address) as own,
    ):
        job, _ = new_model(own, world_size=1)
        for recoveries in (1, 2):
            os.kill(ranks_by_number(server.process.pid)[0], signal.SIGKILL)
            own.watch(
                job, lambda j, n=recoveries: j.recoveries == n and j.ready
            )
        os.kill(ranks_by_number(server.process.pid)[0], signal.SIGKILL)
        assert own.watch(job, failed).status_reason == "RANK_EXITED"
        own.restart_job(job)
        own.watch(job, lambda j: j.ready)


def test_the_command_line_restarts_a_job(fakes, own, monkeypatch, capsys):
    monkeypatch.setenv("GRADWIRE_ADDRESS", fakes.address)
    job, _ = new_model(own, world_size=1)
    assert cli.main(["job", "restart", job]) == 1
    assert "JOB_NOT_FAILED" in capsys.readouterr().err
    os.kill(ranks_by_number(fakes.process.pid)[0], signal.SIGKILL)
    own.watch(job, failed)
    assert cli.main(["job", "restart", job, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status_reason"] == "RESTARTED"
    own.watch(job, lambda j: j.ready)


def test_a_program_that_is_none_fails_the_job(tmp_path):
    with Server(tmp_path, f"--rank_binary={tmp_path / 'none'}") as server:
        with calls.Stubs(server.address) as stubs:
            job = stubs.start_job(base_model="anything", world_size=2)
            ended = stubs.watch(job, failed)
            assert ended.status_reason == "RANK_START_FAILED"
            stubs.restart_job(job)
            stubs.watch(job, failed)
            stubs.delete_job(job)


def test_a_stopped_real_rank_is_hung(tmp_path, models):
    flag = f"--rank_timeout_seconds={RANK_TIMEOUT}"
    with Server(tmp_path, flag) as server:
        with calls.Stubs(server.address) as stubs:
            job = stubs.create_job(base_model=str(models["llama"]))
            (pid,) = ranks_by_number(server.process.pid).values()
            os.kill(pid, signal.SIGSTOP)
            ended = stubs.watch(job, failed)
            assert ended.status_reason == "RANK_HUNG"
            stubs.delete_job(job)
