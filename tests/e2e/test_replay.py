# SPDX-License-Identifier: Apache-2.0
"""What a rank is told to run again, and in which order; what the op-log keeps
for that, and what becomes of it on a full disk. The test plays the rank
(fake_rank.py)."""

import contextlib
import pathlib
import queue
import shutil
import sqlite3
import time

import calls
import pytest
from conftest import MODELS, sequences
from disks import full, small_disk
from fake_rank import FakeRank, error
from gradwire._proto.gradwire.v1 import operations_pb2
from processes import Server

VOCAB = MODELS["llama"][1]["vocab_size"]
DATA = sequences(VOCAB, (5, 3))
LONG = 60
TOKEN = "0123456789abcdef" * 2
# Between the commands that are told apart.
PAYLOAD = ("datums", "gradients")


class Life:
    """A job of one rank, whose rank and server end as the test wants."""

    def __init__(self, folder, *flags, **spec):
        self._state = folder / "state"
        self._state.mkdir()
        self._token = folder / "join.token"
        self._token.write_text(TOKEN)
        self._token.chmod(0o600)
        self._flags = flags
        self._stack = contextlib.ExitStack()
        self.rank = None
        self._start()
        self.stubs.start_job("job", base_model="anything", **spec)
        self._join()
        self.stubs.watch("job", lambda job: job.ready)
        self._model_id = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.process.kill()
        self._stack.close()

    def _start(self):
        self._server = self._stack.enter_context(
            Server(
                self._state,
                "--launch=external",
                "--rank_listen=127.0.0.1:0",
                f"--join_token_file={self._token}",
                "--max_recoveries=5",
                *self._flags,
            )
        )
        self.stubs = self._stack.enter_context(
            calls.Stubs(self._server.address)
        )

    def _join(self):
        end = time.monotonic() + LONG
        while True:
            rank = FakeRank(self._server.rank_address, "job", TOKEN)
            if (command := rank.next()) is not None:
                break
            # The job has not let go of the one before yet.
            rank.close()
            assert time.monotonic() < end, rank.error
        self._stack.callback(rank.close)
        assert command.HasField("joined")
        rank.next("load")
        rank.be_ready()
        self.rank = rank

    def lose_rank(self):
        self.rank.close()
        self._join()

    def kill_server(self):
        self._server.process.kill()
        self._server.process.wait()
        self._start()
        self._join()

    def create_model(self, **fields):
        """The future of a new handle."""
        request = calls.training_pb2.CreateModelRequest(
            session_id=self.stubs.new_session(),
            model_seq_id=1,
            job_id="job",
            take_over=True,
            **fields,
        )
        return self.stubs.training.CreateModel.future(request)

    def attach(self):
        """A handle; the rank is told to reset for it."""
        created = self.create_model()
        self.answer("reset")
        self._model_id = created.result(LONG).model_id

    def begin_with(self, checkpoint):
        """The first handle, of a frozen job that begins with a checkpoint of
        another server."""
        there = self._state / "jobs" / "other" / "checkpoints" / "one"
        shutil.copytree(checkpoint, there)
        created = self.create_model(
            mode=calls.training_pb2.MODEL_MODE_FORWARD_ONLY,
            init_from={"ref": "jobs/other/checkpoints/one"},
        )
        self.answer("load_state", load_state=LOADED, version=7)
        self._model_id = created.result(LONG).model_id
        assert created.result().weight_version == 7

    @property
    def model(self):
        return calls.Model(self.stubs, self._model_id)

    def next(self):
        """The next command, without what belongs to it."""
        while True:
            command = self.rank.next(seconds=LONG)
            if command.WhichOneof("command") not in PAYLOAD:
                return command

    def answer(self, kind, **done):
        """Answers the next command, which is of this kind."""
        command = self.next()
        assert command.WhichOneof("command") == kind
        if kind == "forward":
            self.rank.send_logprobs(command.command_id, LOGPROBS)
            done["forward"] = operations_pb2.ForwardResult(datum_count=2)
        self.rank.send_done(command, **done)

    def fail(self, kind, reason, tainted):
        command = self.next()
        assert command.WhichOneof("command") == kind
        self.rank.send_done(command, error=error(reason), tainted=tainted)

    def save(self, step, place):
        """Answers a save: first that it is written, then that it is whole."""
        saved = operations_pb2.SaveStateResult(
            optimizer_step=step, weight_version=step
        )
        command = self.next()
        assert command.save_state.directory.endswith(place)
        for done in (command, None):
            done = done or self.rank.next("end_save")
            self.rank.send_done(done, step=step, version=step, save_state=saved)

    def await_point(self, number):
        """Until the database knows this checkpoint for recovery."""
        path = self._state / "gradwire.db"
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            with contextlib.closing(sqlite3.connect(path)) as database:
                query = "SELECT max(number) FROM recovery_points"
                if database.execute(query).fetchone()[0] == number:
                    return
        raise AssertionError(f"there is no checkpoint {number}")

    def log(self):
        """The names of its segments."""
        return sorted(path.name for path in self.log_folder().iterdir())

    def log_folder(self):
        return pathlib.Path(self._state) / "jobs" / "job" / "log"

    def step(self, step):
        """An optimizer step."""
        ref = self.model.optim_step()
        self.answer("optim_step", step=step, version=step)
        self.model.result(ref)

    def step_and_point(self, step):
        """An optimizer step, and the checkpoint that follows it."""
        ref = self.model.optim_step()
        self.answer("optim_step", step=step, version=step)
        self.save(step, f"recovery/{step}")
        self.model.result(ref)
        self.await_point(step)

    def operation(self, seq):
        return self.stubs.operations.GetOperation(
            operations_pb2.GetOperationRequest(
                model_id=self._model_id, seq_id=seq
            )
        )


def items_of(messages):
    return [item.datum_index for m in messages for item in m.chunk.items]


LOADED = operations_pb2.LoadStateResult()
LOGPROBS = [(0, [-1.0] * 4), (1, [-2.0] * 2)]


def test_a_failure_is_not_run_again_but_what_it_has_left(tmp_path):
    with Life(tmp_path) as life:
        life.attach()
        half = life.model.forward_backward(calls.batch(DATA))
        life.fail("forward", "NONFINITE_OUTPUT", tainted=True)
        assert calls.refusal(life.stubs, lambda: half).reason == (
            "NONFINITE_OUTPUT"
        )
        ends = ["lose_rank", "kill_server"]
        for end in ends:
            getattr(life, end)()
            for kind in ("reset", "taint"):
                life.answer(kind)
        step = life.model.optim_step()
        life.fail("optim_step", "GRADIENTS_TAINTED", tainted=False)
        calls.refusal(life.stubs, lambda: step)
        good = life.model.forward_backward(calls.batch(DATA))
        life.answer("forward")
        life.model.result(good)
        for end in ends:
            getattr(life, end)()
            for kind in ("reset", "taint", "zero_grad", "forward"):
                life.answer(kind)
        life.stubs.watch("job", lambda job: job.ready)
        assert life.operation(1).error.reason == "NONFINITE_OUTPUT"


def test_results_that_had_begun_are_told_once(tmp_path):
    with Life(tmp_path) as life:
        life.attach()
        ref = life.model.forward_backward(calls.batch(DATA))
        life.rank.send_logprobs(life.next().command_id, LOGPROBS[:1])
        messages = life.stubs.operations.FetchResult(
            operations_pb2.FetchResultRequest(op_id=ref.op_id)
        )
        first = next(messages)
        assert items_of([first]) == [0]
        life.lose_rank()
        life.answer("reset")
        life.answer("forward")
        assert items_of([first, *messages]) == [0, 1]
        life.model.logprobs(ref, len(DATA))


def saved_at(step):
    """What a rank says of a checkpoint and of a snapshot of this step."""
    state = operations_pb2.SaveStateResult(optimizer_step=step)
    snapshot = operations_pb2.SnapshotResult(optimizer_step=step, type="base")
    return {"save_state": state, "snapshot": snapshot}


# The call, the command, what has its result.
SAVES = {
    "checkpoint": ("save_state", "save_state", "save_state"),
    "snapshot": ("save_snapshot", "save_snapshot", "snapshot"),
}


@pytest.mark.parametrize("end", ["lose_rank", "kill_server"])
@pytest.mark.parametrize(
    "kinds",
    [("checkpoint",), ("snapshot",), ("checkpoint", "snapshot")],
    ids="-and-".join,
)
def test_a_save_that_was_interrupted_is_of_its_place(tmp_path, end, kinds):
    with Life(tmp_path) as life:
        life.attach()
        first = life.model.optim_step()
        life.answer("optim_step", step=1, version=1)
        life.model.result(first)
        saves = []
        for kind in kinds:
            call, command, _ = SAVES[kind]
            saves.append(getattr(life.model, call)("one"))
            assert life.next().HasField(command)
            zero = life.model.zero_grad()
            life.answer("zero_grad", step=1, version=1)
            life.model.result(zero)
        second = life.model.optim_step()
        life.answer("optim_step", step=2, version=2)
        life.model.result(second)
        getattr(life, end)()
        life.answer("reset")
        life.answer("optim_step", step=1, version=1)
        writing = []
        for kind in kinds:
            command = life.next()
            assert command.HasField(SAVES[kind][1])
            writing.append(command)
            life.answer("zero_grad", step=1, version=1)
        life.answer("optim_step", step=2, version=2)
        for kind, command in zip(kinds, writing, strict=True):
            field = SAVES[kind][2]
            saved = {field: saved_at(1)[field]}
            life.rank.send_done(command, step=1, version=1, **saved)
            ending = life.rank.next("end_save")
            assert ending.end_save.snapshot == (kind == "snapshot")
            life.rank.send_done(ending, step=2, version=2, **saved)
        for kind, save in zip(kinds, saves, strict=True):
            result = getattr(life.model.result(save), SAVES[kind][2])
            assert result.optimizer_step == 1


def test_a_checkpoint_for_recovery_waits_for_one_that_is_saved(tmp_path):
    """For as long again, before the training waits for it."""
    with Life(tmp_path, "--auto_checkpoint_steps=1") as life:
        life.attach()
        save = life.model.save_state("one")
        writing = life.next()
        life.step(1)
        life.step(2)
        zero = life.model.zero_grad()
        with pytest.raises(queue.Empty):
            life.rank.next(seconds=0.5)
        saved = {"save_state": saved_at(0)["save_state"]}
        life.rank.send_done(writing, **saved)
        life.answer("end_save", step=2, version=2, **saved)
        life.model.result(save)
        assert life.next().save_state.directory.endswith("recovery/1")
        life.answer("zero_grad", step=2, version=2)
        life.model.result(zero)


def test_a_checkpoint_for_recovery_waits_for_a_snapshot(tmp_path):
    """Else a snapshot that is interrupted could not begin again: the state
    that it is of would be older than where a recovery begins."""
    with Life(tmp_path, "--auto_checkpoint_steps=1") as life:
        life.attach()
        save = life.model.save_snapshot("one")
        writing = life.next()
        assert writing.HasField("save_snapshot")
        step = life.model.optim_step()
        life.answer("optim_step", step=1, version=1)
        life.model.result(step)
        zero = life.model.zero_grad()
        with pytest.raises(queue.Empty):
            life.rank.next(seconds=0.5)
        saved = {"snapshot": saved_at(0)["snapshot"]}
        life.rank.send_done(writing, **saved)
        life.rank.send_done(
            life.rank.next("end_save"), step=1, version=1, **saved
        )
        life.model.result(save)
        # A snapshot may begin while it is written, for it comes after it.
        writing = life.next()
        assert writing.save_state.directory.endswith("recovery/1")
        life.answer("zero_grad", step=1, version=1)
        life.model.result(zero)
        second = life.model.save_snapshot("two")
        snapshot = life.next()
        assert snapshot.HasField("save_snapshot")
        state = {"save_state": saved_at(1)["save_state"]}
        life.rank.send_done(writing, step=1, version=1, **state)
        life.answer("end_save", step=1, version=1, **state)
        life.await_point(1)
        life.lose_rank()
        life.answer("load_state", step=1, version=1, load_state=LOADED)
        life.answer("zero_grad", step=1, version=1)
        again = life.next()
        assert again.save_snapshot.directory == snapshot.save_snapshot.directory
        saved = {"snapshot": saved_at(1)["snapshot"]}
        life.rank.send_done(again, step=1, version=1, **saved)
        life.answer("end_save", step=1, version=1, **saved)
        assert life.model.result(second).snapshot.optimizer_step == 1


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", SAVES)
def test_a_save_that_ends_in_a_replay_tells_nothing_of_the_job(
    tmp_path, kind, fails
):
    call, command, field = SAVES[kind]
    with Life(tmp_path) as life:
        life.attach()
        life.step(1)
        save = getattr(life.model, call)("one")
        assert life.next().HasField(command)
        life.step(2)
        life.step(3)
        life.lose_rank()
        life.answer("reset")
        life.answer("optim_step", step=1, version=1)
        writing = life.next()
        assert writing.HasField(command)
        # Two are sent before one is answered, and the end of a save is one.
        second, third = life.next(), life.next()
        done = {field: saved_at(1)[field]}
        if fails:
            # Beside what a replay has left for now.
            done = {"error": error("STORAGE_FULL"), "tainted": True}
        life.rank.send_done(writing, step=1, version=1, **done)
        end = life.next()
        assert end.HasField("end_save")
        life.rank.send_done(second, step=2, version=2)
        life.rank.send_done(third, step=3, version=3)
        life.rank.send_done(end, step=3, version=3, **done)
        life.stubs.watch("job", lambda job: job.ready)
        if fails:
            assert calls.refusal(life.stubs, lambda: save).reason
        else:
            life.model.result(save)
        assert life.model.info().optimizer_step == 3
        life.kill_server()
        life.answer("reset")
        for step in (1, 2, 3):
            life.answer("optim_step", step=step, version=step)
        job = life.stubs.watch("job", lambda job: job.ready)
        assert job.optimizer_step == 3


@pytest.mark.parametrize("kind", SAVES)
@pytest.mark.parametrize("force", [False, True])
def test_a_job_is_deleted_when_its_saves_have_ended(tmp_path, kind, force):
    call, command, field = SAVES[kind]
    with Life(tmp_path) as life:
        life.attach()
        life.step(1)
        save = getattr(life.model, call)("one")
        writing = life.next()
        assert writing.HasField(command)
        request = calls.jobs_pb2.DeleteJobRequest(job_id="job", force=force)
        deleted = life.stubs.jobs.DeleteJob.future(request)
        if force:
            assert (
                calls.refusal(life.stubs, lambda: save).reason == "JOB_DELETED"
            )
        else:
            # Others go on meanwhile.
            life.step(2)
            assert not deleted.done()
            done = {field: saved_at(1)[field]}
            life.rank.send_done(writing, step=1, version=1, **done)
            life.answer("end_save", step=2, version=2, **done)
            life.model.result(save)
        state = deleted.result(LONG).state
        assert state == calls.jobs_pb2.JOB_STATE_DELETED


def test_a_job_is_deleted_when_an_interrupted_save_has_ended(tmp_path):
    call, command, field = SAVES["checkpoint"]
    with Life(tmp_path) as life:
        life.attach()
        life.step(1)
        getattr(life.model, call)("one")
        assert life.next().HasField(command)
        # Only what others ran behind is known to have begun.
        life.step(2)
        life.kill_server()
        request = calls.jobs_pb2.DeleteJobRequest(job_id="job")
        deleted = life.stubs.jobs.DeleteJob.future(request)
        life.answer("reset")
        life.answer("optim_step", step=1, version=1)
        writing = life.next()
        assert writing.HasField(command)
        life.answer("optim_step", step=2, version=2)
        assert not deleted.done()
        done = {field: saved_at(1)[field]}
        life.rank.send_done(writing, step=1, version=1, **done)
        life.answer("end_save", step=2, version=2, **done)
        state = deleted.result(LONG).state
        assert state == calls.jobs_pb2.JOB_STATE_DELETED


def test_a_save_before_numbers_that_were_closed_is_made_again(tmp_path):
    with Life(tmp_path, "--gap_timeout_seconds=0.1") as life:
        life.attach()
        save = life.model.save_snapshot("one")
        assert life.next().HasField("save_snapshot")
        late = life.model.zero_grad(seq=3)
        found = calls.refusal(life.stubs, lambda: late)
        assert found.reason == "SEQUENCE_GAP"
        life.kill_server()
        life.answer("reset")
        writing = life.next()
        done = {"snapshot": saved_at(0)["snapshot"]}
        life.rank.send_done(writing, **done)
        life.answer("end_save", **done)
        assert life.model.result(save).snapshot.type == "base"


@pytest.mark.parametrize("end", ["lose_rank", "kill_server"])
def test_a_save_of_who_was_taken_over_is_of_its_place(tmp_path, end):
    with Life(tmp_path) as life:
        life.attach()
        save = life.model.save_state("best", overwrite=True)
        assert life.next().HasField("save_state")
        life.attach()
        step = life.model.optim_step()
        life.answer("optim_step", step=1, version=1)
        life.model.result(step)
        getattr(life, end)()
        life.answer("reset")
        command = life.next()
        assert command.save_state.directory.endswith("checkpoints/best")
        life.answer("reset")
        life.answer("optim_step", step=1, version=1)
        saved = operations_pb2.SaveStateResult(optimizer_step=0)
        life.rank.send_done(command, save_state=saved)
        life.answer("end_save", save_state=saved, step=1, version=1)
        assert life.model.result(save).save_state.optimizer_step == 0


def test_what_was_running_comes_before_whoever_takes_over(tmp_path):
    with Life(tmp_path) as life:
        life.attach()
        step = life.model.optim_step()
        assert life.next().HasField("optim_step")
        created = life.create_model()
        assert life.next().HasField("reset")
        for _ in range(2):
            life.lose_rank()
            life.answer("reset")
            running = life.next()
            assert running.HasField("optim_step")
            attaching = life.next()
            assert attaching.HasField("reset")
        for command in (running, attaching):
            life.rank.send_done(command, step=1, version=1)
        life.model.result(step)
        assert created.result(LONG).optimizer_step == 1


def test_what_appears_on_the_disk_is_known_after_a_power_loss(tmp_path):
    with Life(tmp_path) as life:
        life.attach()
        forward = life.model.forward(calls.batch(DATA))
        life.answer("forward")
        life.model.result(forward)
        assert not life.operation(1).durable
        save = life.model.save_state("one")
        command = life.next()
        saved = operations_pb2.SaveStateResult()
        life.rank.send_done(command, save_state=saved)
        end = life.rank.next("end_save")
        assert life.operation(1).durable
        assert life.operation(2).state == operations_pb2.OPERATION_STATE_RUNNING
        life.rank.send_done(end, save_state=saved)
        life.model.result(save)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("cancelled", [False, True])
def test_what_is_replaced_is_of_no_more_use(tmp_path, overwrite, cancelled):
    """What is not recorded yet may be run again, and find another checkpoint
    under the name."""
    with small_disk(tmp_path), Life(tmp_path) as life:
        life.attach()
        # Its outcome takes more than may be left of a page.
        life.model.forward(calls.batch(sequences(VOCAB, [60] * 100)), seq=1)
        life.model.zero_grad(seq=2)
        forward, zero = life.next(), life.next()
        if cancelled:
            # What comes right before it is recorded early.
            ref = life.model.zero_grad(seq=3)
            request = operations_pb2.CancelOperationRequest(op_id=ref.op_id)
            ended = life.stubs.operations.CancelOperation(request)
            assert ended.state == operations_pb2.OPERATION_STATE_CANCELLED
        seq = 4 if cancelled else 3
        save = life.model.save_state("best", seq=seq, overwrite=overwrite)
        saved = operations_pb2.SaveStateResult()
        # Else what has run is recorded from it.
        (reserve,) = tmp_path.rglob("reserve")
        reserve.unlink()
        with full(tmp_path):
            logprobs = [(i, [-1.0] * 59) for i in range(100)]
            life.rank.send_logprobs(forward.command_id, logprobs)
            result = operations_pb2.ForwardResult(datum_count=100)
            life.rank.send_done(forward, forward=result)
            life.rank.send_done(zero)
            command = life.rank.next("save_state")
            life.rank.send_done(command, save_state=saved)
            if not overwrite:
                end = life.rank.next("end_save")
            else:
                with pytest.raises(queue.Empty):
                    life.rank.next(seconds=1)
        if overwrite:
            end = life.rank.next("end_save")
            done = operations_pb2.OPERATION_STATE_DONE
            assert life.operation(1).state == done
        life.rank.send_done(end, save_state=saved)
        life.model.result(save)


@pytest.mark.parametrize("end", ["lose_rank", "kill_server"])
def test_what_ends_beside_a_checkpoint_is_run_again(tmp_path, end):
    with Life(tmp_path, "--auto_checkpoint_steps=1") as life:
        life.attach()
        step = life.model.optim_step()
        life.answer("optim_step", step=1, version=1)
        life.model.result(step)
        writing = life.next()
        ref = life.model.forward_backward(calls.batch(DATA))
        life.answer("forward", step=1, version=1)
        life.model.result(ref)
        saved = operations_pb2.SaveStateResult(
            optimizer_step=1, weight_version=1
        )
        life.rank.send_done(writing, step=1, version=1, save_state=saved)
        life.answer("end_save", step=1, version=1, save_state=saved)
        life.await_point(1)
        getattr(life, end)()
        life.answer("load_state", step=1, version=1, load_state=LOADED)
        life.answer("forward", step=1, version=1)
        life.stubs.watch("job", lambda job: job.ready)


def test_a_checkpoint_after_a_failure_is_not_relied_on(tmp_path):
    """It lacks the gradients that a step which failed has left."""
    with Life(tmp_path, "--auto_checkpoint_steps=1") as life:
        life.attach()
        step = life.model.optim_step()
        life.fail("optim_step", "OUT_OF_MEMORY", tainted=True)
        calls.refusal(life.stubs, lambda: step)
        life.save(0, "recovery/1")
        # Answered, so that what follows the save has been seen.
        zero = life.model.zero_grad()
        life.answer("zero_grad")
        life.model.result(zero)
        life.kill_server()
        for kind in ("reset", "taint", "zero_grad"):
            life.answer(kind)
        life.stubs.watch("job", lambda job: job.ready)


def test_no_checkpoint_is_relied_on_while_activations_are_kept(tmp_path):
    with Life(tmp_path, "--auto_checkpoint_steps=1") as life:
        life.attach()
        ref = life.model.forward(calls.batch(DATA), retain=True)
        life.answer("forward")
        kept = life.model.result(ref).forward.activation_id
        # Skipped, so that they are of these weights still.
        life.model.optim_step(seq=2)
        life.model.zero_grad(seq=3)
        for kind in ("optim_step", "zero_grad"):
            life.answer(kind)
        life.kill_server()
        for kind in ("reset", "forward", "optim_step", "zero_grad"):
            life.answer(kind)
        parts = calls.gradient_parts([[0.0] * 4, [0.0] * 2])
        back = life.model.backward(kept, parts, seq=4)
        life.answer("backward")
        life.model.result(back)
        # Now there may be one.
        life.model.optim_step(seq=5)
        life.answer("optim_step", step=1, version=1)
        life.save(1, "recovery/1")
        life.await_point(1)


def test_what_the_log_has_let_go_is_told_all_the_same(tmp_path):
    with Life(tmp_path, "--auto_checkpoint_steps=1") as life:
        life.attach()
        for _ in range(3):
            ref = life.model.zero_grad()
            life.answer("zero_grad")
            told = life.model.result(ref)
        log = life.log()
        # Segments go as a whole, and every server begins one.
        life.kill_server()
        for kind in ("reset", *["zero_grad"] * 3):
            life.answer(kind)
        life.step_and_point(1)
        life.step_and_point(2)
        assert not set(log) & set(life.log())
        life.kill_server()
        life.answer("load_state", step=2, version=2, load_state=LOADED)
        life.stubs.watch("job", lambda job: job.ready)
        again = life.operation(3)
        for operation in (again, told):
            operation.ClearField("durable")
            operation.ClearField("durable_through_seq")
        assert again == told
        assert life.model.zero_grad(seq=3).op_id == ref.op_id, "a repetition"
        reused = calls.refusal(life.stubs, lambda: life.model.optim_step(seq=3))
        assert reused.reason == "SEQ_REUSED"
        assert life.model.due() == 6


def test_the_log_keeps_what_has_not_run(tmp_path):
    with Life(tmp_path, "--auto_checkpoint_steps=1") as life:
        life.attach()
        early = life.model.zero_grad(seq=4)
        log = life.log()
        life.kill_server()
        life.answer("reset")
        life.step_and_point(1)
        life.step_and_point(2)
        assert set(log) < set(life.log())
        life.kill_server()
        life.answer("load_state", step=2, version=2, load_state=LOADED)
        life.stubs.watch("job", lambda job: job.ready)
        life.model.zero_grad(seq=3)
        for _ in range(2):
            life.answer("zero_grad", step=2, version=2)
        life.model.result(early)


def test_the_log_keeps_arrays_that_can_be_fetched(tmp_path):
    with Life(tmp_path, "--auto_checkpoint_steps=1") as life:
        life.attach()
        ref = life.model.forward(calls.batch(DATA))
        life.answer("forward")
        want = life.model.logprobs(ref, len(DATA))
        life.kill_server()
        # A forward leaves nothing that a replay would need.
        life.answer("reset")
        life.step_and_point(1)
        life.step_and_point(2)
        life.kill_server()
        got = life.model.logprobs(ref, len(DATA))
        assert [x.tolist() for x in got] == [x.tolist() for x in want]


def test_the_log_may_let_the_beginning_go(new_client, tmp_path):
    """A frozen reference that has answered much still is what it was."""
    saved = new_client("llama").save_state("one").result()
    with Life(tmp_path, forward_only=True) as life:
        life.begin_with(saved.local_path)
        log = life.log()
        data = calls.batch(sequences(VOCAB, [60] * 2000))
        while set(log) <= set(life.log()):
            ref = life.model.forward(data)
            life.fail("forward", "OUT_OF_MEMORY", tainted=False)
            calls.refusal(life.stubs, lambda ref=ref: ref)
        for end in ("lose_rank", "kill_server", "kill_server"):
            getattr(life, end)()
            command = life.next()
            assert command.load_state.directory.endswith("loaded/1-0/one")
            life.rank.send_done(command, load_state=LOADED, version=7)
            life.stubs.watch("job", lambda job: job.ready)
        assert life.model.info().weight_version == 7


def test_the_log_keeps_what_no_checkpoint_has(new_client, tmp_path):
    """However long it has become since."""
    with Life(tmp_path) as life:
        life.attach()
        # Without a result that the log is kept for.
        first = life.model.zero_grad()
        life.answer("zero_grad")
        life.model.result(first)
        # In a segment of its own, so that it could go.
        life.kill_server()
        for kind in ("reset", "zero_grad"):
            life.answer(kind)
        begin = life.log()
        data = calls.batch(sequences(VOCAB, [60] * 2000))
        for _ in range(140):
            ref = life.model.forward(data)
            life.fail("forward", "OUT_OF_MEMORY", tainted=False)
            calls.refusal(life.stubs, lambda ref=ref: ref)
        assert sum(
            path.stat().st_size for path in life.log_folder().iterdir()
        ) > (256 << 20)
        assert set(begin) <= set(life.log())
        for end in ("lose_rank", "kill_server"):
            getattr(life, end)()
            for kind in ("reset", "zero_grad"):
                life.answer(kind)
            life.stubs.watch("job", lambda job: job.ready)


@pytest.mark.parametrize("reserve", [True, False])
def test_a_full_disk_only_makes_it_longer(tmp_path, reserve):
    """If at all: what has run is told, from the space that is kept for it."""
    with small_disk(tmp_path), Life(tmp_path) as life:
        life.attach()
        step = life.model.optim_step()
        command = life.next()
        # More than may be left of a page.
        large = calls.batch(sequences(VOCAB, [60] * 100))
        (kept,) = tmp_path.rglob("reserve")
        assert kept.stat().st_size >= 16 << 10
        if not reserve:
            kept.unlink()
        with full(tmp_path):
            refused = calls.refusal(
                life.stubs,
                lambda: life.model.forward_backward(large, seq=2),
            )
            assert refused.reason == "STORAGE_FULL"
            # Takes of the reserve what it needs.
            life.rank.send_done(command, step=1, version=1)
            request = operations_pb2.WaitOperationRequest(
                op_id=step.op_id, timeout_seconds=0.5
            )
            if reserve:
                assert life.model.result(step).durable
                # And nothing that could not be told is begun.
                small = calls.refusal(
                    life.stubs, lambda: life.model.zero_grad(seq=2)
                )
                assert small.reason == "STORAGE_FULL"
            else:
                waiting = life.stubs.operations.WaitOperation(request)
                assert waiting.state == operations_pb2.OPERATION_STATE_RUNNING
        assert life.model.result(step).durable
        # Its number is open.
        again = life.model.zero_grad(seq=2)
        life.answer("zero_grad", step=1, version=1)
        life.model.result(again)
        # For the next time.
        assert kept.stat().st_size >= 16 << 10
