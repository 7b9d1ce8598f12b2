# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that take the place of others, and what was loaded from those.
How they come through any kill is in tests/faults and checkpoint/."""

import os
import pathlib
import signal
import threading
import time

import calls
import gradwire
import pytest
from disks import full, small_disk
from few_steps import DATA, train
from gradwire._proto.gradwire.v1 import checkpoints_pb2, jobs_pb2
from processes import Server, ranks_of

BIT_IDENTICAL = jobs_pb2.REPLAY_FIDELITY_BIT_IDENTICAL


def reason(future):
    with pytest.raises(gradwire.GradwireError) as caught:
        future.result(60)
    return caught.value.reason


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_newest_has_the_name(new_client, service, world_size):
    client = new_client("llama", world_size=world_size)
    train(client)
    first = client.save_state("best", user_metadata={"loss": "1.5", "a": "b"})
    second = client.save_state("best")
    assert reason(second) == "CHECKPOINT_EXISTS"
    row = service.get_checkpoint(first.result().path)
    assert dict(row.user_metadata) == {"loss": "1.5", "a": "b"}
    assert set(row.attributes) == {"base_model", "precision", "version"}
    train(client)
    third = client.save_state(
        "best", overwrite=True, ttl=3600, user_metadata={"loss": "1.25"}
    ).result()
    assert third.path == first.result().path
    assert third.digest != first.result().digest
    (row,) = service.list_checkpoints(client.job_id)
    assert row.digest == third.digest and row.optimizer_step == 2
    assert dict(row.user_metadata) == {"loss": "1.25"}
    assert row.HasField("expire_time")
    assert service.verify_checkpoint(third.path) == row
    # Nothing else is left of the first one.
    folder = pathlib.Path(third.local_path).parent
    assert [path.name for path in folder.iterdir()] == ["best"]
    want = train(client, 2)
    train(client)
    loaded = client.load_state_with_optimizer("best").result()
    assert loaded.optimizer_step == 2
    assert train(client, 2) == want


def test_where_there_is_none_it_is_a_save(new_client, service):
    client = new_client("llama")
    saved = client.save_state("best", overwrite=True).result()
    assert service.delete_checkpoint(saved.path)
    assert client.save_state("best", overwrite=True).result() == saved


def test_a_damaged_one_gives_way(new_client, service):
    client = new_client("llama")
    saved = client.save_state("best").result()
    (pathlib.Path(saved.local_path) / "manifest.json").write_text("{")
    assert reason(client.load_state("best")) == "CHECKPOINT_CORRUPT"
    client.save_state("best", overwrite=True).result()
    assert service.verify_checkpoint(saved.path).digest == saved.digest


def test_a_repetition_is_answered_with_the_first_result(stubs, models):
    job = stubs.create_job(base_model=str(models["llama"]), precision="f32")
    model = calls.Model(stubs, stubs.attach(job))
    first = model.save_state("best", seq=1, overwrite=True)
    result = model.result(first)
    model.result(model.forward_backward(calls.batch(DATA), seq=2))
    model.result(model.optim_step(seq=3))
    later = model.result(model.save_state("best", seq=4, overwrite=True))
    assert later.save_state.digest != result.save_state.digest
    again = model.save_state("best", seq=1, overwrite=True)
    assert again.op_id == first.op_id
    assert model.result(again).save_state == result.save_state
    refused = calls.refusal(stubs, lambda: model.save_state("best", seq=1))
    assert refused.reason == "SEQ_REUSED"
    # It was not run again.
    row = stubs.checkpoints.GetCheckpoint(
        checkpoints_pb2.CheckpointRequest(path=result.save_state.path)
    )
    assert row.digest == later.save_state.digest
    stubs.delete_job(job)


@pytest.mark.parametrize(
    "metadata",
    [
        {"": "x"},
        {"n" * 129: "x"},
        {f"n{i}": "" for i in range(65)},
        {"n": "x" * (16 << 10)},
    ],
)
def test_metadata_have_their_limits(new_client, metadata):
    client = new_client("llama")
    future = client.save_state("best", user_metadata=metadata)
    with pytest.raises(gradwire.GradwireError) as caught:
        future.result(60)
    assert caught.value.reason == "OPTION_OUT_OF_RANGE"
    assert caught.value.metadata["field"] == "user_metadata"
    largest = {f"{i:02}": "x" for i in range(63)}
    largest["n" * 128] = "x" * ((16 << 10) - 128 - 63 * 3)
    client.save_state("best", user_metadata=largest).result()


def test_other_names_of_a_checkpoint(new_client, service):
    one, two = new_client("llama"), new_client("llama")
    saved = one.save_state("best").result()
    for path in (
        saved.path,
        f"jobs/{one.job_id}/checkpoints/best",
        f"cross_job://{one.job_id}/best",
    ):
        assert two.load_state(path).result().path == saved.path
        assert service.get_checkpoint(path).path == saved.path
    assert reason(two.load_state("best")) == "CHECKPOINT_NOT_FOUND"
    assert reason(two.load_state("latest")) == "CHECKPOINT_NOT_FOUND"
    for path in (
        "cross_job://",
        "cross_job://best",
        f"cross_job://{one.job_id}/a/b",
        f"cross_job://{one.job_id}/..",
        f"cross_job://../{one.job_id}",
        f"gradwire://cross_job://{one.job_id}/best",
    ):
        assert reason(two.load_state(path)) == "INVALID_NAME", path


def test_whoever_looks_sees_one_of_them(new_client, service):
    """While it is replaced again and again."""
    client, reader = new_client("llama"), new_client("llama")
    path = client.save_state("best").result().path
    stop = threading.Event()
    seen, failures = [], []

    def look():
        try:
            while not stop.is_set():
                (row,) = service.list_checkpoints(client.job_id)
                assert not row.HasField("error"), row.error
                seen.append(service.verify_checkpoint(path).optimizer_step)
                loaded = reader.load_state_with_optimizer(path).result()
                seen.append(loaded.optimizer_step)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(25):
        train(client)
        client.save_state("best", overwrite=True).result()
    stop.set()
    thread.join()
    assert not failures
    assert len(seen) > 10 and seen == sorted(seen)


def test_pages_go_on_where_they_were(new_client, service):
    client = new_client("llama")
    for name in "abcd":
        client.save_state(name).result()
    checkpoints = service._checkpoints

    def page(token):
        request = checkpoints_pb2.ListCheckpointsRequest(
            job_id=client.job_id, page_size=2, page_token=token
        )
        return service.call(checkpoints.ListCheckpoints, request)

    first = page("")
    assert [row.name for row in first.checkpoints] == ["a", "b"]
    # The last one of the page becomes the newest of all.
    client.save_state("b", overwrite=True).result()
    second = page(first.next_page_token)
    assert [row.name for row in second.checkpoints] == ["c", "d"]
    third = page(second.next_page_token)
    assert [row.name for row in third.checkpoints] == ["b"]
    assert not third.next_page_token
    # It may as well have gone.
    service.delete_checkpoint(first.checkpoints[0].path)
    service.delete_checkpoint(first.checkpoints[1].path)
    assert [row.name for row in page(first.next_page_token).checkpoints] == [
        "c",
        "d",
    ]


def test_a_full_disk_leaves_the_old_one(models, tmp_path):
    with (
        small_disk(tmp_path, megabytes=8),
        Server(tmp_path) as server,
        calls.Stubs(server.address) as stubs,
    ):
        model = new_model(stubs, models)
        first = model.result(model.save_state("best")).save_state
        steps(model, 1)
        # Enough for the log, and not for a checkpoint.
        with full(tmp_path, left=first.bytes // 4):
            found = calls.refusal(
                stubs, lambda: model.save_state("best", overwrite=True)
            )
            assert found.reason == "STORAGE_FULL"
            request = checkpoints_pb2.CheckpointRequest(path=first.path)
            row = stubs.checkpoints.VerifyCheckpoint(request)
            assert row.digest == first.digest
        steps(model, 1)
        second = model.result(model.save_state("best", overwrite=True))
        row = stubs.checkpoints.VerifyCheckpoint(request)
        assert row.digest == second.save_state.digest
        assert row.optimizer_step == 2
        folder = pathlib.Path(row.local_path).parent
        assert [path.name for path in folder.iterdir()] == ["best"]


# ---- What was loaded ----


def new_model(stubs, models):
    stubs.create_job("job", base_model=str(models["llama"]), precision="f32")
    return calls.Model(stubs, stubs.attach("job"))


def steps(model, count):
    for _ in range(count):
        model.result(model.forward_backward(calls.batch(DATA)))
        model.result(model.optim_step(learning_rate=0.01))


def logprobs_now(model):
    ref = model.forward(calls.batch(DATA))
    return [x.tobytes() for x in model.logprobs(ref, len(DATA))]


@pytest.mark.parametrize("change", ["overwrite", "delete", "expire"])
@pytest.mark.parametrize("end", ["rank", "server"])
def test_what_was_loaded_is_loaded_again(models, tmp_path, change, end):
    """A replay finds it, whatever has become of its name."""
    recovery = tmp_path / "jobs" / "job" / "recovery"
    loaded = tmp_path / "jobs" / "job" / "loaded"
    flags = ("--max_recoveries=5", "--auto_checkpoint_steps=4")
    with (
        Server(tmp_path, *flags) as server,
        calls.Stubs(server.address) as stubs,
    ):
        model = new_model(stubs, models)
        steps(model, 1)
        ttl = 1e-3 if change == "expire" else 0
        path = model.result(model.save_state("best")).save_state.path
        steps(model, 1)
        # No checkpoint for recovery can be written, so that all is run again.
        recovery.write_text("")
        model.result(model.load_state("best", optimizer=True))
        assert [p.name for p in loaded.iterdir()]
        request = checkpoints_pb2.CheckpointRequest(path=path)
        if change == "overwrite":
            model.result(model.save_state("best", overwrite=True))
            steps(model, 1)
            model.result(model.save_state("best", overwrite=True))
        elif change == "delete":
            stubs.checkpoints.DeleteCheckpoint(request)
            steps(model, 1)
        else:
            model.result(
                model.save_state("best", overwrite=True, ttl_seconds=ttl)
            )
            steps(model, 1)
        want = logprobs_now(model)
        if end == "rank":
            for rank in ranks_of(server.process.pid):
                os.kill(rank, signal.SIGKILL)
            job = stubs.watch("job", lambda job: job.recoveries and job.ready)
            assert job.last_recovery.fidelity == BIT_IDENTICAL
            assert logprobs_now(model) == want
        server.process.kill()
        server.process.wait()
    recovery.unlink()
    with (
        Server(tmp_path, *flags) as server,
        calls.Stubs(server.address) as stubs,
    ):
        job = stubs.watch("job", lambda job: job.ready or job.HasField("error"))
        assert job.last_recovery.fidelity == BIT_IDENTICAL, job.error
        assert job.last_recovery.restored_from == "base model"
        model = calls.Model(stubs, model.model_id)
        assert logprobs_now(model) == want
        # Until it is of no more use.
        steps(model, 4)
        end_of_wait = time.monotonic() + 60
        while list(loaded.iterdir()):
            assert time.monotonic() < end_of_wait
            time.sleep(0.02)
        stubs.delete_job("job")
        assert not loaded.exists()


def test_a_load_that_fails_keeps_nothing(models, tmp_path):
    with Server(tmp_path) as server, calls.Stubs(server.address) as stubs:
        model = new_model(stubs, models)
        saved = model.result(model.save_state("best")).save_state
        data = pathlib.Path(saved.local_path) / "rank-00000.data"
        data.write_bytes(data.read_bytes()[:-1])
        for name, want in (
            ("best", "CHECKPOINT_CORRUPT"),
            ("none", "CHECKPOINT_NOT_FOUND"),
        ):
            ref = model.load_state(name)
            found = calls.refusal(stubs, lambda ref=ref: ref)
            assert found.reason == want
        loaded = tmp_path / "jobs" / "job" / "loaded"
        end = time.monotonic() + 60
        while loaded.exists() and list(loaded.iterdir()):
            assert time.monotonic() < end
            time.sleep(0.02)
