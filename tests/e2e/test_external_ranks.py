# SPDX-License-Identifier: Apache-2.0
"""Ranks that come by themselves: who may, when, and what they are told.

The test plays the ranks (fake_rank.py), so it decides who answers when.
"""

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time

import calls
import fake_rank
import pytest
from conftest import MODELS, sequences
from fake_rank import FakeRank
from gradwire._proto.gradwire.v1 import jobs_pb2, operations_pb2
from gradwire.errors import from_rpc
from gradwire.local_server import find_server
from processes import Server, Watched

VOCAB = MODELS["llama"][1]["vocab_size"]
LONG = 60
RANK_TIMEOUT = 3
TOKEN = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("token") / "join.token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def external(tmp_path_factory, token_file):
    with Server(
        tmp_path_factory.mktemp("external"),
        "--launch=external",
        "--rank_listen=127.0.0.1:0",
        f"--join_token_file={token_file}",
        f"--rank_timeout_seconds={RANK_TIMEOUT}",
    ) as server:
        yield server


@pytest.fixture
def own(external):
    with calls.Stubs(external.address) as stubs:
        yield stubs


@pytest.fixture
def dial(external):
    """dial(job, rank, world_size, **options): a rank; closed at the end."""
    with contextlib.ExitStack() as stack:

        def new_rank(job, rank=0, world_size=2, token=TOKEN, **options):
            fake = FakeRank(
                external.rank_address, job, token, rank, world_size, **options
            )
            stack.callback(fake.close)
            return fake

        yield new_rank


RECOVERING = jobs_pb2.JOB_PHASE_RECOVERING


def failed(job):
    return job.state == jobs_pb2.JOB_STATE_FAILED


def ready_group(own, dial, world_size=2, quadratic=0.0):
    job = own.start_job(base_model="anything", world_size=world_size)
    ranks = [dial(job, rank, world_size) for rank in range(world_size)]
    for rank in ranks:
        rank.next("joined")
        load = rank.next("load").load
        assert (load.rank, load.world_size) == (rank.rank, world_size)
        assert load.collective_timeout_seconds == 120
    for rank in reversed(ranks):
        rank.be_ready(quadratic)
    own.watch(job, lambda j: j.ready)
    return job, ranks


def attach(own, job, ranks):
    """A handle: ranks are told to reset for it."""
    models = []
    thread = threading.Thread(
        target=lambda: models.append(calls.Model(own, own.attach(job)))
    )
    thread.start()
    for rank in ranks:
        rank.send_done(rank.next("reset"))
    thread.join(LONG)
    return models[0]


def batch_of(rank, kind):
    """The batch that comes before a command of this kind, and the command."""
    items = []
    while (command := rank.next()).WhichOneof("command") != kind:
        items += command.datums.datums or command.gradients.items
    return items, command


def refusal(rank):
    assert rank.has_ended(LONG)
    return from_rpc(rank.error)


# ---- Joining ---------------------------------------------------------------


def test_a_job_waits_for_its_ranks(own, dial):
    job = own.start_job(base_model="anything", world_size=3)

    def says(count):
        message = f"{count} of 3 ranks have come."
        now = own.watch(job, lambda j: j.status_message == message)
        assert now.state == jobs_pb2.JOB_STATE_PENDING
        assert not now.ready

    says(0)
    second = dial(job, 1, 3)
    assert second.next("joined").joined.joined == 1
    says(1)
    second.close()
    says(0)
    ranks = [dial(job, rank, 3) for rank in (2, 1)]
    says(2)
    ranks.append(dial(job, 0, 3))
    for rank in ranks:
        rank.next("joined")
        rank.next("load")
        rank.be_ready()
    ready = own.watch(job, lambda j: j.ready)
    assert ready.status_message == ""


def test_whoever_may_not_be_a_rank_is_told_why(own, dial):
    job = own.start_job(base_model="anything", world_size=2)
    first = dial(job, 0)
    first.next("joined")
    rows = [
        (dial(job, 1, token="x" * 32), "RANK_TOKEN_WRONG"),
        (dial(job, 1, token=""), "RANK_TOKEN_WRONG"),
        (dial("no-job", 1, token="x" * 32), "RANK_TOKEN_WRONG"),
        (dial("no-job", 1), "RANK_JOB_UNKNOWN"),
        (dial(job, 1, version="0.0.1"), "RANK_VERSION_MISMATCH"),
        (dial(job, 1, 3), "RANK_WORLD_MISMATCH"),
        (dial(job, 2, 2), "RANK_OUT_OF_RANGE"),
        (dial(job, -1, 2), "RANK_OUT_OF_RANGE"),
        (dial(job, 0), "RANK_DUPLICATE"),
    ]
    for rank, reason in rows:
        error = refusal(rank)
        assert error.reason == reason
        if reason not in ("RANK_TOKEN_WRONG",):
            assert error.metadata["rank"] == str(rank.rank)
    assert refusal(rows[0][0]).code.name == "PERMISSION_DENIED"
    assert refusal(rows[-1][0]).code.name == "ALREADY_EXISTS"
    second = dial(job, 1)
    second.next("joined")
    error = refusal(dial(job, 1))
    assert error.reason == "RANK_LATE"
    for rank in (first, second):
        rank.next("load")
    assert not first.has_ended(0)


def test_addresses_go_to_all_ranks_in_order(own, dial):
    job = own.start_job(base_model="anything", world_size=3)
    ranks = [dial(job, rank, 3) for rank in range(3)]
    for rank in ranks:
        rank.next("joined")
        rank.next("load")
    for number in (2, 0, 1):
        given = fake_rank.rank_pb2.RankAddress(address=f"at {number}".encode())
        ranks[number].send(address=given)
    for rank in ranks:
        addresses = rank.next("addresses").addresses
        assert list(addresses.address) == [b"at 0", b"at 1", b"at 2"]


# ---- Operations ------------------------------------------------------------


def test_datums_gradients_and_results_find_their_way(own, dial):
    job, ranks = ready_group(own, dial, 2)
    model = attach(own, job, ranks)
    lengths = (9, 17, 5, 12)
    ref = model.forward(calls.batch(sequences(VOCAB, lengths)), retain=True)
    # 16 | 11, then 8 to rank 1, 4 to rank 0.
    rank_of = [1, 0, 0, 1]
    commands = []
    for rank in ranks:
        datums, command = batch_of(rank, "forward")
        commands.append(command)
        mine = [
            n for n, r in zip(lengths, rank_of, strict=True) if r == rank.rank
        ]
        assert [len(d.chunks[0].text.tokens) // 4 + 1 for d in datums] == mine
        forward = command.forward
        assert list(forward.rank_of) == rank_of
        assert list(forward.tokens) == [n - 1 for n in lengths]
        assert list(forward.k) == [1] * 4

    def values(index):
        return (index, [-float(index)] * (lengths[index] - 1))

    stream = own.operations.FetchResult(
        operations_pb2.FetchResultRequest(op_id=ref.op_id)
    )
    arrived = []

    def wait_for(count):
        while len(arrived) < count:
            arrived.extend(i.datum_index for i in next(stream).chunk.items)

    command_id = commands[0].command_id
    ranks[1].send_logprobs(command_id, [values(3)])
    ranks[0].send_logprobs(command_id, [values(1)])
    ranks[1].send_logprobs(command_id, [values(0)])
    wait_for(2)
    assert arrived == [0, 1], "what is whole goes out before the end"
    ranks[0].send_logprobs(command_id, [values(2)])
    wait_for(4)
    assert arrived == [0, 1, 2, 3]
    ranks[1].send_done(commands[1])
    request = operations_pb2.GetOperationRequest(op_id=ref.op_id)
    running = own.operations.GetOperation(request)
    assert running.state == operations_pb2.OPERATION_STATE_RUNNING
    ranks[0].send_done(commands[0])
    logprobs = model.logprobs(ref, 4)
    activation_id = model.result(ref).forward.activation_id
    gradients = calls.gradient_parts([2.0 * lp for lp in logprobs])
    backward = model.backward(activation_id, gradients)
    for rank in ranks:
        items, command = batch_of(rank, "backward")
        assert list(command.backward.rank_of) == rank_of
        assert command.backward.datum_count == 4
        for item in items:
            assert rank_of[item.datum_index] == rank.rank
        assert len(items) == 2
        rank.send_done(command)
    model.result(backward)


def test_the_cost_of_attention_is_counted(own, dial):
    job, ranks = ready_group(own, dial, 2, quadratic=1.0)
    model = attach(own, job, ranks)
    lengths = (21, 11, 11, 11, 11)
    model.forward_backward(calls.batch(sequences(VOCAB, lengths)))
    for rank in ranks:
        _, command = batch_of(rank, "forward")
        # 20 + 400 on one side, four of 10 + 100 minus none on the other.
        assert list(command.forward.rank_of) == [0, 1, 1, 1, 1]


def test_the_first_error_in_rank_order_is_the_operations(own, dial):
    job, ranks = ready_group(own, dial, 3)
    model = attach(own, job, ranks)
    ref = model.optim_step()
    commands = [rank.next("optim_step") for rank in ranks]
    ranks[2].send_done(commands[2], error=fake_rank.error("NONFINITE_GRADIENT"))
    ranks[1].send_done(commands[1], error=fake_rank.error("GRADIENTS_TAINTED"))
    ranks[0].send_done(commands[0])
    found = calls.refusal(own, lambda: ref)
    assert found.reason == "GRADIENTS_TAINTED"
    # The group goes on.
    ref = model.optim_step()
    for rank in ranks:
        rank.send_done(rank.next("optim_step"))
    model.result(ref)


def test_ranks_at_different_steps_end_the_job(own, dial):
    job, ranks = ready_group(own, dial, 2)
    model = attach(own, job, ranks)
    ref = model.optim_step()
    for rank in ranks:
        rank.send_done(
            rank.next("optim_step"), version=rank.rank, step=rank.rank
        )
    ended = own.watch(job, failed)
    assert ended.status_reason == "INVARIANT_VIOLATED"
    assert ended.error.metadata["ranks"] == "0,1"
    assert calls.refusal(own, lambda: ref).reason == "INVARIANT_VIOLATED"


# ---- Saves -----------------------------------------------------------------


def saved(step):
    """What a rank says at the end of a save."""
    return operations_pb2.SaveStateResult(
        path="a path", bytes=7, optimizer_step=step, weight_version=step
    )


def state_of(own, ref):
    return own.operations.GetOperation(
        operations_pb2.GetOperationRequest(op_id=ref.op_id)
    ).state


def test_operations_run_beside_a_save(own, dial):
    job, ranks = ready_group(own, dial, 2)
    model = attach(own, job, ranks)
    save = model.save_state("one")
    writing = [rank.next("save_state") for rank in ranks]
    # Far more of them than are sent ahead of their answers.
    for step in range(1, 6):
        ref = model.optim_step()
        for rank in ranks:
            command = rank.next("optim_step")
            rank.send_done(command, version=step, step=step)
        model.result(ref)
    # A load, or a save, may be of what is being saved: they wait, and so does
    # what comes after them.
    load = model.load_state("one")
    second = model.save_state("two", seq=model.due() + 1)
    ranks[1].send_done(writing[1], save_state=saved(0))
    assert state_of(own, save) == operations_pb2.OPERATION_STATE_RUNNING
    assert state_of(own, load) == operations_pb2.OPERATION_STATE_QUEUED
    for rank in ranks:
        with pytest.raises(queue.Empty):
            rank.next(seconds=0.5)
    ranks[0].send_done(writing[0], save_state=saved(0))
    ends = [rank.next("end_save") for rank in ranks]
    assert not any(end.end_save.HasField("error") for end in ends)
    assert state_of(own, save) == operations_pb2.OPERATION_STATE_RUNNING
    for rank, end in zip(ranks, ends, strict=True):
        rank.send_done(end, version=5, step=5, save_state=saved(0))
    done = model.result(save)
    assert done.save_state.bytes == 7
    # Of the state that was saved, not of the one that the job is in.
    assert done.save_state.optimizer_step == done.save_state.weight_version == 0
    assert (
        own.jobs.GetJob(jobs_pb2.GetJobRequest(job_id=job)).weight_version == 5
    )
    for rank in ranks:
        rank.send_done(
            rank.next("load_state"),
            load_state=operations_pb2.LoadStateResult(path="a path"),
        )
    model.result(load)
    # The first is the server's own: what was loaded may be deleted.
    for place in ("recovery/1", "checkpoints/two"):
        for rank in ranks:
            command = rank.next("save_state")
            assert command.save_state.directory.endswith(place)
            rank.send_done(command, save_state=saved(0))
        for rank in ranks:
            rank.send_done(rank.next("end_save"), save_state=saved(0))
    model.result(second)


def snapshot(step):
    return operations_pb2.SnapshotResult(
        path="a path", bytes=7, optimizer_step=step, weight_version=step
    )


def test_operations_run_beside_a_snapshot(own, dial):
    job, ranks = ready_group(own, dial, 2)
    model = attach(own, job, ranks)
    first = model.save_snapshot("one")
    writing = [rank.next("save_snapshot") for rank in ranks]
    # Also the save of a checkpoint.
    save = model.save_state("one")
    for rank in ranks:
        rank.send_done(rank.next("save_state"), save_state=saved(0))
    for rank in ranks:
        end = rank.next("end_save")
        assert not end.end_save.snapshot
        rank.send_done(end, save_state=saved(0))
    model.result(save)
    for step in range(1, 6):
        ref = model.optim_step()
        for rank in ranks:
            rank.send_done(rank.next("optim_step"), version=step, step=step)
        model.result(ref)
    # Another one may be a delta to it.
    second = model.save_snapshot("two")
    assert state_of(own, first) == operations_pb2.OPERATION_STATE_RUNNING
    ranks[0].send_done(writing[0], snapshot=snapshot(0))
    for rank in ranks:
        with pytest.raises(queue.Empty):
            rank.next(seconds=0.5)
    ranks[1].send_done(writing[1], snapshot=operations_pb2.SnapshotResult())
    for rank in ranks:
        end = rank.next("end_save")
        assert end.end_save.snapshot and not end.end_save.HasField("error")
        rank.send_done(end, version=5, step=5, snapshot=snapshot(0))
    done = model.result(first).snapshot
    # Of the state that was saved, not of the one that the job is in.
    assert (done.bytes, done.optimizer_step, done.weight_version) == (7, 0, 0)
    # What one rank cannot write is removed by all.
    for rank, error in zip(ranks, ("STORAGE_FULL", ""), strict=True):
        command = rank.next("save_snapshot")
        failed_with = {"error": fake_rank.error(error)} if error else {}
        rank.send_done(command, version=5, step=5, **failed_with)
    for rank in ranks:
        end = rank.next("end_save")
        assert end.end_save.error.reason == "STORAGE_FULL"
        rank.send_done(end, version=5, step=5, error=end.end_save.error)
    assert calls.refusal(own, lambda: second).reason == "STORAGE_FULL"


def test_a_save_that_one_rank_cannot_write_is_removed_by_all(own, dial):
    job, ranks = ready_group(own, dial, 2)
    model = attach(own, job, ranks)
    save = model.save_state("one")
    writing = [rank.next("save_state") for rank in ranks]
    ranks[1].send_done(writing[1], error=fake_rank.error("STORAGE_FULL"))
    ranks[0].send_done(writing[0], save_state=saved(0))
    for rank in ranks:
        end = rank.next("end_save")
        assert end.end_save.error.reason == "STORAGE_FULL"
        rank.send_done(end, error=end.end_save.error)
    assert calls.refusal(own, lambda: save).reason == "STORAGE_FULL"
    # The next one can.
    save = model.save_state("one")
    for rank in ranks:
        rank.send_done(rank.next("save_state"), save_state=saved(0))
    for rank in ranks:
        rank.send_done(rank.next("end_save"), save_state=saved(0))
    model.result(save)


@pytest.mark.parametrize("written", [False, True])
def test_a_job_that_fails_ends_its_save(own, dial, written):
    job, ranks = ready_group(own, dial, 2)
    model = attach(own, job, ranks)
    save = model.save_state("one")
    for rank in ranks:
        command = rank.next("save_state")
        if written:
            rank.send_done(command, save_state=saved(0))
    if written:
        for rank in ranks:
            rank.next("end_save")
    ranks[1].close()
    own.watch(job, failed)
    assert calls.refusal(own, lambda: save).reason == "RANK_LOST"


def test_a_server_that_stops_waits_for_a_save(tmp_path, token_file):
    with Server(tmp_path, *external_flags(token_file)) as server:
        with calls.Stubs(server.address) as stubs:

            def dial(job, number, world_size):
                return FakeRank(
                    server.rank_address, job, TOKEN, number, world_size
                )

            job, (rank,) = ready_group(stubs, dial, 1)
            model = attach(stubs, job, [rank])
            model.save_state("one")
            command = rank.next("save_state")
            server.process.terminate()
            assert not rank.has_ended(1)
            rank.send_done(command, save_state=saved(0))
            rank.send_done(rank.next("end_save"), save_state=saved(0))
            assert rank.has_ended()
            assert server.process.wait(LONG) == 143


# ---- Ends ------------------------------------------------------------------


def test_a_lost_rank_ends_the_group(own, dial):
    job, ranks = ready_group(own, dial, 3)
    model = attach(own, job, ranks)
    ref = model.optim_step()
    ranks[1].close()
    ended = own.watch(job, failed)
    assert ended.status_reason == "RANK_LOST"
    assert ended.error.metadata["rank"] == "1"
    assert calls.refusal(own, lambda: ref).reason == "RANK_LOST"
    for rank in (ranks[0], ranks[2]):
        assert refusal(rank).reason == "RANK_LOST"


def test_a_silent_rank_ends_the_group(own, dial):
    job = own.start_job(base_model="anything", world_size=2)
    ranks = [dial(job, 0), dial(job, 1, beat=0)]
    begin = time.monotonic()
    ended = own.watch(job, failed)
    assert time.monotonic() - begin < RANK_TIMEOUT + 5
    assert ended.status_reason == "RANK_HUNG"
    assert ended.error.metadata["rank"] == "1"
    for rank in ranks:
        assert rank.has_ended(LONG)


def test_the_rank_that_others_name_is_blamed(own, dial):
    job, ranks = ready_group(own, dial, 3)
    model = attach(own, job, ranks)
    ref = model.optim_step()
    for rank in (ranks[0], ranks[1]):
        timeout = fake_rank.error("COLLECTIVE_TIMEOUT", rank=2, seconds=5)
        rank.send_done(rank.next("optim_step"), error=timeout)
    ended = own.watch(job, failed)
    assert ended.status_reason == "COLLECTIVE_TIMEOUT"
    assert ended.error.metadata["rank"] == "2"
    assert ended.error.metadata["reported_by"] == "0"
    assert "Rank 2" in ended.status_message
    assert calls.refusal(own, lambda: ref).reason == "COLLECTIVE_TIMEOUT"


def test_a_rank_that_has_gone_is_blamed_not_the_messenger(own, dial):
    job, ranks = ready_group(own, dial, 3)
    model = attach(own, job, ranks)
    model.optim_step()
    broken = fake_rank.error("COLLECTIVE_FAILED", rank=1, cause="reset")
    ranks[0].send_done(ranks[0].next("optim_step"), error=broken)
    ranks[2].close()
    ended = own.watch(job, failed)
    assert (ended.status_reason, ended.error.metadata["rank"]) == (
        "RANK_LOST",
        "2",
    )


def test_a_model_that_one_rank_cannot_load_is_refused(own, dial):
    job = own.start_job(base_model="anything", world_size=2)
    ranks = [dial(job, 0), dial(job, 1)]
    ranks[1].next("joined")
    ranks[1].next("load")
    ranks[1].send(failed=fake_rank.error("MODEL_FILE_NOT_FOUND"))
    ended = own.watch(job, failed)
    assert ended.status_reason == "MODEL_FILE_NOT_FOUND"
    assert ended.error.metadata["rank"] == "1"


def test_a_deleted_job_lets_its_ranks_go(own, dial):
    job, ranks = ready_group(own, dial)
    own.delete_job(job)
    for rank in ranks:
        assert rank.has_ended(LONG)
        assert rank.error is None, "a clean end"
    waiting = own.start_job(base_model="anything", world_size=2)
    silent = dial(waiting, 0, beat=0)
    silent.next("joined")
    begin = time.monotonic()
    own.delete_job(waiting)
    assert time.monotonic() - begin < 10
    assert silent.has_ended(LONG)


def test_a_restarted_job_takes_ranks_anew(own, dial):
    job, ranks = ready_group(own, dial)
    model = attach(own, job, ranks)
    model.optim_step()
    ranks[0].close()
    own.watch(job, failed)
    assert refusal(dial(job, 0)).reason == "RANK_GROUP_ENDED"
    assert "executed" in own.restart_job(job).status_message
    now = own.watch(job, lambda j: "0 of 2" in j.status_message)
    assert now.state == jobs_pb2.JOB_STATE_PENDING
    ranks = [dial(job, rank) for rank in (0, 1)]
    for rank in ranks:
        rank.next("joined")
        rank.next("load")
        rank.be_ready()
    # What the job had executed: that a handle attached.
    for rank in ranks:
        rank.send_done(rank.next("reset"))
    own.watch(job, lambda j: j.ready)
    assert calls.refusal(own, model.optim_step).reason == "HANDLE_FENCED"
    attach(own, job, ranks)


def test_a_job_that_recovers_waits_for_ranks_and_goes_on(tmp_path, token_file):
    flags = external_flags(token_file)
    with (
        Server(tmp_path, *flags, "--max_recoveries=2") as server,
        calls.Stubs(server.address) as own,
        contextlib.ExitStack() as stack,
    ):

        def dial(job, rank, world_size=2):
            fake = FakeRank(server.rank_address, job, TOKEN, rank, world_size)
            stack.callback(fake.close)
            return fake

        def join(job, rank):
            while (command := (fake := dial(job, rank)).next()) is None:
                # As if there were no job: such ranks wait, and dial again.
                assert refusal(fake).reason == "RANK_JOB_UNKNOWN"
            assert command.HasField("joined")
            return fake

        job, ranks = ready_group(own, dial)
        model = attach(own, job, ranks)
        step = model.optim_step()
        for rank in ranks:
            rank.next("optim_step")
        ranks[1].close()
        now = own.watch(job, lambda j: j.phase == RECOVERING)
        assert now.state == jobs_pb2.JOB_STATE_RUNNING
        assert now.status_reason == "RANK_LOST"
        assert not now.ready
        zero = model.zero_grad()
        ranks = [join(job, rank) for rank in (0, 1)]
        for rank in ranks:
            rank.next("load")
            rank.be_ready()
        for kind in ("reset", "optim_step", "zero_grad"):
            for rank in ranks:
                rank.send_done(rank.next(kind))
        model.result(step)
        model.result(zero)
        now = own.watch(job, lambda j: j.ready)
        assert now.last_recovery.cause == "RANK_LOST"
        assert now.recoveries == 1


# ---- Real programs ---------------------------------------------------------


@contextlib.contextmanager
def real_rank(supervisor, job, *flags, token=TOKEN):
    """gradwire_rank as a scheduler would start it."""
    environment = {**os.environ, "GRADWIRE_JOIN_TOKEN": token}
    if not token:
        del environment["GRADWIRE_JOIN_TOKEN"]
    process = subprocess.Popen(
        [
            find_server().with_name("gradwire_rank"),
            f"--supervisor={supervisor}",
            f"--job_id={job}",
            "--threads=1",
            *flags,
        ],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_real_rank_that_came_first_serves_a_job(
    external, own, models, token_file
):
    """It waits for the job, loads, trains, and ends well with the job."""
    job = "came-first"
    flag = f"--join_token_file={token_file}"
    with real_rank(external.rank_address, job, flag, token="") as rank:
        while "not yet" not in rank.stderr.readline():
            assert rank.poll() is None
        own.create_job(job, base_model=str(models["llama"]), precision="f32")
        model = calls.Model(own, own.attach(job))
        data = sequences(VOCAB, (9, 5))
        model.result(model.forward_backward(calls.batch(data)))
        step = model.result(model.optim_step(expected_ops=1)).optim_step
        assert step.optimizer_step == 1
        own.delete_job(job)
        assert rank.wait(LONG) == 0


def test_a_real_rank_waits_for_its_supervisor(tmp_path, models, token_file):
    """Schedulers start things in any order."""
    with Server(tmp_path / "probe", *external_flags(token_file)) as probe:
        address = probe.rank_address
    with real_rank(address, "late-server") as rank:
        while "not yet" not in rank.stderr.readline():
            assert rank.poll() is None
        flags = external_flags(token_file, address)
        with Server(tmp_path / "late", *flags) as server:
            with calls.Stubs(server.address) as stubs:
                stubs.create_job("late-server", base_model=str(models["llama"]))
        # The server has stopped, in order.
        assert rank.wait(LONG) == 0


def test_a_rank_that_is_sent_away_says_why(external, own):
    job = own.start_job(base_model="anything", world_size=2)
    rows = [
        ((), "x" * 40, "RANK_TOKEN_WRONG", 1),
        (("--world_size=3",), TOKEN, "RANK_WORLD_MISMATCH", 1),
        (("--rank=2", "--world_size=2"), TOKEN, "RANK_OUT_OF_RANGE", 1),
        (("--world_size=2",), "", "GRADWIRE_JOIN_TOKEN", 2),
    ]
    for flags, token, said, status in rows:
        with real_rank(external.rank_address, job, *flags, token=token) as rank:
            assert rank.wait(LONG) == status
            assert said in rank.stderr.read()
    dead = "127.0.0.1:9"
    with real_rank(dead, job, "--dial_timeout_seconds=0.5") as rank:
        assert rank.wait(LONG) == 1
    with real_rank("192.0.2.1:7701", job) as rank:
        assert rank.wait(LONG) == 2
        assert "--rank_insecure" in rank.stderr.read()
    own.delete_job(job)


def test_a_stopped_real_rank_is_let_go(external, own, models):
    with real_rank(external.rank_address, "stopped") as rank:
        own.create_job("stopped", base_model=str(models["llama"]))
        watched = Watched(rank.pid)
        os.kill(rank.pid, signal.SIGSTOP)
        ended = own.watch("stopped", failed)
        assert ended.status_reason == "RANK_HUNG"
        own.delete_job("stopped")
        os.kill(rank.pid, signal.SIGCONT)
        assert watched.has_ended(LONG)
        watched.close()
        assert rank.wait() == 1


# ---- What the operator must say --------------------------------------------


def external_flags(token_file, address="127.0.0.1:0"):
    return (
        "--launch=external",
        f"--rank_listen={address}",
        f"--join_token_file={token_file}",
    )


def last_line(state_dir, *flags):
    done = subprocess.run(
        [
            find_server(),
            f"--state_dir={state_dir}",
            "--listen=127.0.0.1:0",
            "--metrics_listen=127.0.0.1:0",
            *flags,
        ],
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert done.returncode == 2, done.stderr
    return done.stderr.splitlines()[-1]


def test_a_server_that_would_be_open_does_not_start(tmp_path, token_file):
    readable = tmp_path / "readable"
    readable.write_text(TOKEN)
    readable.chmod(0o644)
    short = tmp_path / "short"
    short.write_text("secret")
    short.chmod(0o600)
    everywhere = external_flags(token_file, "0.0.0.0:0")
    rows = [
        (("--launch=slurm",), "local or external"),
        (("--launch=external",), "needs --rank_listen"),
        (
            ("--launch=external", "--rank_listen=127.0.0.1:0"),
            "needs --join_token_file",
        ),
        (external_flags(token_file)[1:], "--launch=external alone"),
        (external_flags(readable), "everybody"),
        (external_flags(short), "32 characters"),
        (external_flags(tmp_path / "none"), "cannot be opened"),
        (everywhere, "--rank_insecure"),
        ((*everywhere, f"--rank_tls_cert={short}"), "PEM"),
        ((*everywhere, "--rank_tls_ca=/none"), "--rank_tls_cert is missing"),
        (("--rank_timeout_seconds=0",), "out of range"),
    ]
    for flags, said in rows:
        line = last_line(tmp_path / "state", *flags)
        assert said in line
        assert TOKEN not in line and "secret" not in line
    with Server(tmp_path / "state", *everywhere, "--rank_insecure") as server:
        assert server.rank_address.startswith("0.0.0.0:")


def tls_flags(pki, name):
    return (
        f"--rank_tls_cert={pki / name}.pem",
        f"--rank_tls_key={pki / name}.key",
        f"--rank_tls_ca={pki / 'ca.pem'}",
    )


def test_ranks_of_the_authority_alone_may_come(
    tmp_path, token_file, models, pki
):
    flags = (*external_flags(token_file), *tls_flags(pki, "server"))
    with Server(tmp_path, *flags) as server:
        with calls.Stubs(server.address) as stubs:
            job = stubs.start_job(base_model=str(models["llama"]))
            quick = "--dial_timeout_seconds=0.5"
            for strange in ((), tls_flags(pki, "stranger")):
                with real_rank(
                    server.rank_address, job, quick, *strange
                ) as rank:
                    assert rank.wait(LONG) == 1
            mine = tls_flags(pki, "rank")
            with real_rank(server.rank_address, job, *mine):
                stubs.watch(job, lambda j: j.ready)
