# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and snapshots that outlast the server's disk."""

import contextlib
import hashlib
import json
import pathlib
import shutil
import subprocess
import threading
import time

import botocore.exceptions
import gradwire
import pytest
from conftest import MODELS, save_model, sequences
from gradwire import cli
from gradwire.local_server import find_server
from object_store import BUCKET, ObjectStore
from processes import Server

VOCAB = MODELS["llama"][1]["vocab_size"]
DATA = sequences(VOCAB, (9, 17, 5))
FLAG = f"--object_store=s3://{BUCKET}/team/a"


@pytest.fixture(scope="module")
def shared_bucket():
    with ObjectStore() as bucket:
        yield bucket


@pytest.fixture
def bucket(shared_bucket, monkeypatch):
    """An empty one, known to the servers of the test."""
    for key in shared_bucket.keys():
        shared_bucket.s3.delete_object(Bucket=BUCKET, Key=key)
    for name, value in shared_bucket.environment().items():
        monkeypatch.setenv(name, value)
    return shared_bucket


@contextlib.contextmanager
def serving(state_dir, *flags):
    state_dir.mkdir(exist_ok=True)
    with Server(state_dir, FLAG, *flags) as server:
        service = gradwire.ServiceClient(address=server.address)
        yield server, service
        # Not all calls were meant to succeed.
        with contextlib.suppress(gradwire.GradwireError):
            service.close(wait=False)


def train(client, steps):
    out = []
    for _ in range(steps):
        result = client.forward_backward(DATA, "cross_entropy").result()
        step = client.optim_step(
            gradwire.AdamParams(learning_rate=0.01)
        ).result()
        out.append(([x.tobytes() for x in result.logprobs], step.grad_norm))
    return out


def until(condition):
    end = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def stored(service, path):
    """The checkpoint's row, once there is a copy."""

    def look():
        row = service.get_checkpoint(path)
        return row if row.object_url else None

    return until(look)


def content(directory):
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in pathlib.Path(directory).iterdir()
    }


def refusal(call):
    with pytest.raises(gradwire.GradwireError) as caught:
        call()
    return caught.value


def test_a_training_goes_on_after_its_disk_is_lost(bucket, models, tmp_path):
    with serving(tmp_path / "one") as (server, service):
        client = service.create_training_client(models["llama"], job_id="job")
        train(client, 2)
        path = client.save_state("two").result().path
        want = train(client, 2)
        row = stored(service, path)
        assert row.object_url == (
            f"s3://{BUCKET}/team/a/jobs/job/checkpoints/two"
        )
        before = content(row.local_path)
        server.process.kill()
        server.process.wait()
    # What is stored is what was on the disk, and says so itself.
    prefix = "team/a/jobs/job/checkpoints/two"
    commit = json.loads(bucket.get(f"{prefix}/commit.json"))
    assert {f["name"]: f["sha256"] for f in commit["files"]} == before
    for file in commit["files"]:
        object_ = bucket.get(f"{prefix}/{commit['folder']}/{file['name']}")
        assert hashlib.sha256(object_).hexdigest() == file["sha256"]
        assert len(object_) == file["bytes"]
    shutil.rmtree(tmp_path / "one")
    with serving(tmp_path / "another") as (server, service):
        assert not service.list_checkpoints()
        (row,) = service.list_checkpoints(remote=True)
        assert (row.path, row.kind, row.local_path) == (path, "training", "")
        assert row.digest and row.bytes and row.object_url
        client = service.create_training_client(models["llama"])
        client.load_state_with_optimizer(path).result()
        assert train(client, 2) == want
        (row,) = service.list_checkpoints()
        assert content(row.local_path) == before
        assert service.verify_checkpoint(path).digest == row.digest


def test_what_is_replaced_here_is_replaced_there(bucket, models, tmp_path):
    with serving(tmp_path / "one") as (server, service):
        client = service.create_training_client(models["llama"], job_id="job")
        path = client.save_state("best").result().path
        stored(service, path)
        prefix = "team/a/jobs/job/checkpoints/best/"
        # Several in a row, each of which is what the row tells of; the last
        # one while the store is away.
        for number in range(4):
            train(client, 1)
            if number == 3:
                bucket.stop()
            try:
                saved = client.save_state(
                    "best", overwrite=True, user_metadata={"n": str(number)}
                ).result()
                if number == 3:
                    assert not service.get_checkpoint(path).object_url
            finally:
                bucket.go_on()

            def is_there(digest=saved.digest):
                commit = json.loads(bucket.get(f"{prefix}commit.json"))
                return commit["digest"] == digest and commit

            commit = until(is_there)
            assert stored(service, path).digest == saved.digest
        want = train(client, 2)
        local = content(saved.local_path)
        server.process.kill()
        server.process.wait()
    # Of the others nothing is left.
    folder = commit["folder"]
    until(
        lambda: (
            bucket.keys(prefix)
            == sorted(
                [f"{prefix}commit.json"]
                + [f"{prefix}{folder}/{n}" for n in local]
            )
        )
    )
    shutil.rmtree(tmp_path / "one")
    with serving(tmp_path / "another") as (server, service):
        # A job may begin with what is there alone.
        client = service.create_training_client(
            models["llama"], init_from=path, with_optimizer=True
        )
        assert client.info().optimizer_step == 4
        assert train(client, 2) == want
        assert dict(service.get_checkpoint(path).user_metadata) == {"n": "3"}
        assert content(service.get_checkpoint(path).local_path) == local


def test_a_server_replaces_only_what_is_its_own(bucket, models, tmp_path):
    with serving(tmp_path / "one") as (server, service):
        client = service.create_training_client(models["llama"], job_id="job")
        path = client.save_state("best").result().path
        first = stored(service, path)
    with serving(tmp_path / "two") as (server, service):
        client = service.create_training_client(models["llama"], job_id="job")
        train(client, 1)
        client.save_state("best").result()
        train(client, 1)
        client.save_state("best", overwrite=True).result()

        def refused():
            error = service.get_checkpoint(path).upload_error
            return error.reason == "REMOTE_CHECKPOINT_EXISTS"

        until(refused)
    commit = json.loads(
        bucket.get("team/a/jobs/job/checkpoints/best/commit.json")
    )
    assert commit["digest"] == first.digest


def test_what_another_server_stored_is_not_replaced_by_what_replaces_it_here(
    bucket, models, tmp_path
):
    with serving(tmp_path / "one") as (_, service):
        client = service.create_training_client(models["llama"], job_id="job")
        path = client.save_state("best").result().path
        stored(service, path)
    shutil.rmtree(tmp_path / "one")
    with serving(tmp_path / "another") as (_, service):
        client = service.create_training_client(
            models["llama"], job_id="job", init_from=path
        )
        before = bucket.keys("team/a/jobs/job/")
        train(client, 1)
        client.save_state("best", overwrite=True).result()
        until(lambda: service.get_checkpoint(path).HasField("upload_error"))
        error = service.get_checkpoint(path).upload_error
        assert error.reason == "REMOTE_CHECKPOINT_EXISTS"
        assert bucket.keys("team/a/jobs/job/") == before


def test_a_delta_comes_back_with_its_chain(bucket, models, tmp_path):
    with serving(tmp_path / "one") as (server, service):
        client = service.create_training_client(models["llama"], job_id="job")
        # All are there before the first is stored; in the order of names,
        # deltas come first.
        bucket.stop()
        try:
            client.save_weights_for_sampler("z", type="base").result()
            for name in "yxw":
                train(client, 1)
                saved = client.save_weights_for_sampler(name, type="delta")
                path = saved.result().path
        finally:
            bucket.go_on()
        # A copy is made of parents first.
        seen = ""
        while "w" not in seen:
            prefix = "team/a/jobs/job/snapshots/"
            keys = bucket.keys(prefix)
            seen = "".join(
                name for name in "zyxw" if f"{prefix}{name}/commit.json" in keys
            )
            assert "zyxw".startswith(seen)
        stored(service, path)
        weight_id = service.verify_checkpoint(path).weight_id
    shutil.rmtree(tmp_path / "one")
    with serving(tmp_path / "two") as (server, service):
        base = "gradwire://jobs/job/snapshots/z"
        # Nothing that is needed goes, though no delta is on this disk.
        error = refusal(lambda: service.delete_checkpoint(base))
        assert error.reason == "SNAPSHOT_HAS_CHILDREN"
        row = service.fetch_checkpoint(path)
        assert row.weight_id == weight_id
        assert service.verify_checkpoint(path).weight_id == weight_id
        names = [row.name for row in service.list_checkpoints("job")]
        assert sorted(names) == ["w", "x", "y", "z"]
        # Again, it is there.
        assert service.fetch_checkpoint(path).weight_id == weight_id


def test_what_a_delta_in_the_store_needs_stays_there(bucket, models, tmp_path):
    often = "--collect_seconds=0.2"
    with serving(tmp_path / "one", often) as (_, service):
        client = service.create_training_client(models["llama"], job_id="job")
        base = client.save_weights_for_sampler("base", type="base").result()
        train(client, 1)
        saved = client.save_weights_for_sampler("delta", type="delta")
        delta = saved.result().path
        stored(service, delta)
        service.set_checkpoint_ttl(base.path, 2)
        weight_id = service.verify_checkpoint(delta).weight_id
        expiry = service.get_checkpoint(base.path).expire_time
    until(lambda: time.time() > expiry.ToSeconds() + 1)
    prefix = "team/a/jobs/job/snapshots"
    with serving(tmp_path / "two", often) as (_, service):
        # Of both, on a disk without the delta: what has expired goes from it.
        service.fetch_checkpoint(base.path)
        service.set_checkpoint_ttl(base.path, 2)
        folder = tmp_path / "two" / "jobs" / "job" / "snapshots" / "base"
        until(lambda: not folder.exists())
        error = refusal(lambda: service.delete_checkpoint(base.path))
        assert error.reason == "SNAPSHOT_HAS_CHILDREN"
        assert service.fetch_checkpoint(delta).weight_id == weight_id
        assert service.verify_checkpoint(delta).weight_id == weight_id
        # When the disk has lost it, it comes back with what needs it.
        shutil.rmtree(folder)
        service.fetch_checkpoint(delta)
        assert service.verify_checkpoint(delta).weight_id == weight_id
        # It has come back, and stays, though nothing needs it any more.
        service.delete_checkpoint(delta)
        until(lambda: not bucket.keys(f"{prefix}/delta/"))
        time.sleep(1)
        assert bucket.keys(f"{prefix}/base/")
        assert service.verify_checkpoint(base.path).weight_id == base.weight_id
        service.set_checkpoint_ttl(base.path, 2)
        until(lambda: not bucket.keys(prefix))
    with serving(tmp_path / "three") as (_, service):
        path = service.create_training_client(models["llama"], job_id="job")
        base = path.save_weights_for_sampler("base", type="base").result()
        train(path, 1)
        saved = path.save_weights_for_sampler("delta", type="delta").result()
        stored(service, saved.path)
    with serving(tmp_path / "four") as (_, service):
        service.fetch_checkpoint(base.path)
        error = refusal(lambda: service.delete_checkpoint(base.path))
        assert error.reason == "SNAPSHOT_HAS_CHILDREN"
        assert service.verify_checkpoint(base.path).weight_id == base.weight_id
        assert service.fetch_checkpoint(saved.path).weight_id == saved.weight_id


def test_a_base_in_shards_comes_back_with_all_of_them(bucket, models, tmp_path):
    flag = "--snapshot_shard_bytes=20000"
    with serving(tmp_path / "one", flag) as (_, service):
        client = service.create_training_client(models["llama"], job_id="job")
        base = client.save_weights_for_sampler("base", type="base").result()
        train(client, 1)
        saved = client.save_weights_for_sampler("delta", type="delta")
        path = saved.result().path
        stored(service, path)
        before = content(base.local_path)
        shards = [name for name in before if name.startswith("model-")]
        assert len(shards) > 3
    prefix = "team/a/jobs/job/snapshots/base"
    commit = json.loads(bucket.get(f"{prefix}/commit.json"))
    assert {f["name"]: f["sha256"] for f in commit["files"]} == before
    shutil.rmtree(tmp_path / "one")
    # Whatever the limit of the server that reads it.
    with serving(tmp_path / "two") as (_, service):
        weight_id = service.fetch_checkpoint(path).weight_id
        assert service.verify_checkpoint(path).weight_id == weight_id
        row = service.get_checkpoint(base.path)
        assert content(row.local_path) == before
    for name in (shards[1], "model.safetensors.index.json"):
        key = f"{prefix}/{commit['folder']}/{name}"
        good = bucket.get(key)
        bucket.put(key, good[:-1] + bytes([good[-1] ^ 1]))
        with serving(tmp_path / name) as (_, service):
            error = refusal(lambda: service.fetch_checkpoint(path))
            assert error.reason == "OBJECT_CORRUPT"
            assert error.metadata["file"] == name
            assert not service.list_checkpoints()
        bucket.put(key, good)


def test_large_files_travel_in_parts(bucket, tmp_path):
    model = save_model("llama", tmp_path / "model", vocab_size=30011)
    with serving(tmp_path / "one", "--object_store_part_mib=5") as (_, service):
        client = service.create_training_client(model, job_id="job")
        path = client.save_state("large").result().path
        row = stored(service, path)
        before = content(row.local_path)
        sizes = [
            f.stat().st_size for f in pathlib.Path(row.local_path).iterdir()
        ]
        assert max(sizes) > 5 << 20
    (data,) = [k for k in bucket.keys() if k.endswith("rank-00000.data")]
    head = bucket.s3.head_object(Bucket=BUCKET, Key=data)
    assert head["ETag"].strip('"').endswith("-2")  # two parts
    with serving(tmp_path / "two", "--object_store_part_mib=5") as (_, service):
        assert content(service.fetch_checkpoint(path).local_path) == before


def test_what_is_deleted_is_deleted_there_as_well(bucket, models, tmp_path):
    with serving(tmp_path / "one", "--collect_seconds=0.1") as (_, service):
        client = service.create_training_client(models["llama"], job_id="job")
        kept = client.save_state("kept").result().path
        gone = client.save_state("gone").result().path
        stored(service, kept)
        stored(service, gone)
        service.delete_checkpoint(gone)
        until(lambda: not bucket.keys("team/a/jobs/job/checkpoints/gone/"))
        assert bucket.keys("team/a/jobs/job/checkpoints/kept/")
        # The name is free, and what is saved under it is copied again.
        stored(service, client.save_state("gone").result().path)
        brief = client.save_state("brief").result().path
        stored(service, brief)
        service.set_checkpoint_ttl(brief, 0.1)
        until(lambda: not bucket.keys("team/a/jobs/job/checkpoints/brief/"))
    shutil.rmtree(tmp_path / "one")
    with serving(tmp_path / "two") as (_, service):
        service.delete_checkpoint(kept)
        assert not bucket.keys("team/a/jobs/job/checkpoints/kept/")
        error = refusal(lambda: service.delete_checkpoint(kept))
        assert error.reason == "CHECKPOINT_NOT_FOUND"
        error = refusal(lambda: service.fetch_checkpoint(kept))
        assert error.reason == "REMOTE_CHECKPOINT_NOT_FOUND"


def test_what_expires_while_the_store_is_away_goes_from_it_later(
    bucket, models, tmp_path, monkeypatch
):
    state = tmp_path / "one"
    prefix = "team/a/jobs/job"
    with serving(state) as (_, service):
        client = service.create_training_client(models["llama"], job_id="job")
        stay = client.save_state("stay").result().path
        gone = client.save_state("gone").result().path
        snapshot = client.save_weights_for_sampler("gone", type="base")
        paths = [stay, gone, snapshot.result().path]
        for path in paths:
            stored(service, path)
    with monkeypatch.context() as away:
        away.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with serving(state, "--collect_seconds=0.1") as (server, service):
            for path in paths[1:]:
                service.set_checkpoint_ttl(path, 1e-3)
            until(lambda: len(service.list_checkpoints("job")) == 1)
            server.process.kill()
            server.process.wait()
    assert bucket.keys(f"{prefix}/checkpoints/gone/")
    with serving(state):
        until(lambda: not bucket.keys(f"{prefix}/checkpoints/gone/"))
        until(lambda: not bucket.keys(f"{prefix}/snapshots/gone/"))
        assert bucket.keys(f"{prefix}/checkpoints/stay/")


@pytest.mark.parametrize("restart", [False, True])
def test_what_was_replaced_does_not_come_back_when_its_successor_expires(
    bucket, models, tmp_path, restart
):
    """Nobody could tell the store, neither of the one nor of the other."""
    state = tmp_path / "one"
    folder = "team/a/jobs/job/checkpoints/best/"
    flags = ["--collect_seconds=0.1"]
    with contextlib.ExitStack() as stack:
        _, service = stack.enter_context(serving(state, *flags))
        client = service.create_training_client(models["llama"], job_id="job")
        path = client.save_state("best").result().path
        first = stored(service, path).digest
        if restart:
            # What the store has, the next server learns from it, too late.
            stack.close()
        bucket.stop()
        try:
            if restart:
                _, service = stack.enter_context(serving(state, *flags))
                client = service.create_training_client(
                    models["llama"], job_id="job", take_over=True
                )
            for _ in range(3):
                train(client, 1)
                saved = client.save_state("best", overwrite=True).result()
            assert saved.digest != first
            assert not service.get_checkpoint(path).object_url
            service.set_checkpoint_ttl(path, 1e-3)
            until(lambda: not service.list_checkpoints("job"))
        finally:
            bucket.go_on()
        until(lambda: not bucket.keys(folder))
        assert not service.list_checkpoints("job", remote=True)


def test_a_name_is_not_stored_while_what_had_it_is_removed(
    bucket, models, tmp_path
):
    """Else files of the one go with those of the other."""
    with serving(tmp_path / "one") as (_, service):
        client = service.create_training_client(models["llama"], job_id="job")
        path = client.save_state("best").result().path
        stored(service, path)
        train(client, 1)
        bucket.delay(DELETE=2, PUT=3)
        try:
            deletion = threading.Thread(
                target=service.delete_checkpoint, args=(path,)
            )
            deletion.start()
            until(lambda: not service.list_checkpoints("job"))
            saved = client.save_state("best").result()
            deletion.join()
        finally:
            bucket.delay()
        stored(service, path)
        local = content(saved.local_path)
    with serving(tmp_path / "another") as (_, service):
        service.fetch_checkpoint(path)
        assert content(service.get_checkpoint(path).local_path) == local


def test_what_is_removed_while_it_is_stored_is_no_half_copy(
    bucket, models, tmp_path
):
    with serving(tmp_path / "one") as (_, service):
        client = service.create_training_client(models["llama"], job_id="job")
        bucket.delay(PUT=60)
        try:
            saved = client.save_state("best").result()
            # All but what makes it visible.
            until(lambda: len(bucket.keys()) == len(content(saved.local_path)))
            service.delete_checkpoint(saved.path)
            # The same bytes, and so the same files of the copy.
            assert client.save_state("best").result().digest == saved.digest
        finally:
            bucket.delay()
        stored(service, saved.path)
        local = content(saved.local_path)
        assert len(bucket.keys()) == 1 + len(local)
    with serving(tmp_path / "another") as (_, service):
        service.fetch_checkpoint(saved.path)
        row = service.get_checkpoint(saved.path)
        assert content(row.local_path) == local


def test_a_job_that_is_deleted_has_its_checkpoints_stored(
    bucket, models, tmp_path
):
    with serving(tmp_path / "one") as (_, service):
        client = service.create_training_client(models["llama"], job_id="job")
        bucket.delay(PUT=60)
        try:
            saved = client.save_state("last").result()
            until(lambda: len(bucket.keys()) == len(content(saved.local_path)))
            links = [
                name
                for name in pathlib.Path(saved.local_path).parent.iterdir()
                if name.name.endswith("~storing.pending")
            ]
            assert links
            service.delete_job("job")
            assert all(link.exists() for link in links)
        finally:
            bucket.delay()
        stored(service, saved.path)


def test_what_is_fetched_is_as_old_as_it_was(bucket, models, tmp_path):
    with serving(tmp_path / "one") as (_, service):
        client = service.create_training_client(models["llama"], job_id="job")
        path = client.save_state("state", ttl=3600).result().path
        want = stored(service, path)
    with serving(tmp_path / "two") as (_, service):
        got = service.fetch_checkpoint(path)
        # It was brought back by somebody, and stays until somebody says when
        # it goes: that may have been changed, and the copy does not know.
        assert got.create_time == want.create_time
        assert not got.HasField("expire_time")
        assert service.get_checkpoint(path) == got


@pytest.mark.parametrize("how", ["flipped", "cut", "missing", "commit"])
def test_a_damaged_copy_is_refused(bucket, models, tmp_path, how):
    with serving(tmp_path / "one") as (_, service):
        client = service.create_training_client(models["llama"], job_id="job")
        path = client.save_state("state").result().path
        stored(service, path)
    end = "/commit.json" if how == "commit" else "rank-00000.data"
    (key,) = [k for k in bucket.keys() if k.endswith(end)]
    old = bucket.get(key)
    if how == "missing":
        bucket.s3.delete_object(Bucket=BUCKET, Key=key)
    elif how == "cut":
        bucket.put(key, old[:-1])
    else:
        bucket.put(key, old[:100] + bytes([old[100] ^ 1]) + old[101:])
    with serving(tmp_path / "two") as (_, service):
        client = service.create_training_client(models["llama"])
        error = refusal(lambda: client.load_state(path).result())
        assert error.reason == "OBJECT_CORRUPT", error
        # Nothing of it is on the disk, and the job goes on.
        assert not service.list_checkpoints()
        folder = tmp_path / "two" / "jobs" / "job" / "checkpoints"
        assert not list(folder.iterdir() if folder.exists() else ())
        train(client, 1)
        # It is listed, and can be deleted.
        (row,) = service.list_checkpoints(remote=True)
        assert row.path == path
        assert row.HasField("error") == (how == "commit")
        service.delete_checkpoint(path)
        assert not bucket.keys("team/a/jobs/job/")


def test_a_store_that_is_away_holds_nothing_up(bucket, models, tmp_path):
    with serving(tmp_path / "one") as (_, service):
        client = service.create_training_client(models["llama"], job_id="job")
        bucket.stop()
        try:
            path = client.save_state("state").result(60).path
            train(client, 2)
            assert not service.get_checkpoint(path).object_url
        finally:
            bucket.go_on()
        stored(service, path)


def test_a_server_that_is_killed_stores_again(bucket, models, tmp_path):
    state = tmp_path / "one"
    paths = []
    with serving(state) as (server, service):
        client = service.create_training_client(models["llama"], job_id="job")
        paths.append(client.save_state("s0").result().path)
        until(lambda: bucket.keys())
        bucket.stop()
        try:
            for number in range(1, 6):
                paths.append(client.save_state(f"s{number}").result().path)
            server.process.kill()
            server.process.wait()
        finally:
            bucket.go_on()
    # Of an upload that a life before has begun.
    server_id = None
    for key in bucket.keys():
        if "/commit" not in key:
            server_id = key.split("/")[-2].split("-")[0]
    left = f"team/a/jobs/job/checkpoints/s5/{server_id}-0-0123456789abcdef/x"
    bucket.put(left, b"x")
    other = "team/a/jobs/job/checkpoints/s5/0123456789ab-0-0123456789abcdef/x"
    bucket.put(other, b"x")
    with serving(state) as (_, service):
        for path in paths:
            stored(service, path)
        assert left not in bucket.keys()
        # Another server's is not ours to remove.
        assert other in bucket.keys()
    for number in range(6):
        prefix = f"team/a/jobs/job/checkpoints/s{number}/"
        folder = json.loads(bucket.get(f"{prefix}commit.json"))["folder"]
        rest = {key.split("/")[-2] for key in bucket.keys(prefix)}
        assert rest - {f"s{number}", folder} <= {other.split("/")[-2]}


def test_two_servers_of_one_prefix_do_not_mix(bucket, models, tmp_path):
    with serving(tmp_path / "one") as (_, service):
        client = service.create_training_client(models["llama"], job_id="job")
        stored(service, client.save_state("same").result().path)
    with serving(tmp_path / "two") as (_, service):
        client = service.create_training_client(models["llama"], job_id="job")
        train(client, 1)
        path = client.save_state("same").result().path

        def failed():
            row = service.get_checkpoint(path)
            return row if row.HasField("upload_error") else None

        row = until(failed)
        assert row.upload_error.reason == "REMOTE_CHECKPOINT_EXISTS"
        assert not row.object_url


def test_two_that_commit_at_once_are_told_apart(bucket, tmp_path):
    theirs = {
        "format": 1,
        "epoch": 1,
        "folder": "theirs",
        "digest": "another",
        "parent": "",
        "created_micros": 0,
        "files": [],
    }
    model = save_model("llama", tmp_path / "model", vocab_size=30011)
    with serving(tmp_path / "one", "--object_store_part_mib=5") as (_, service):
        client = service.create_training_client(model, job_id="job")
        for number in range(20):
            path = client.save_state(f"s{number}").result().path
            prefix = f"team/a/jobs/job/checkpoints/s{number}/"
            # Between its first file and its commit there are large ones.
            until(lambda prefix=prefix: bucket.keys(prefix))
            try:
                bucket.s3.put_object(
                    Bucket=BUCKET,
                    Key=f"{prefix}commit.json",
                    Body=json.dumps(theirs),
                    IfNoneMatch="*",
                )
                break
            except botocore.exceptions.ClientError:
                continue  # It was faster.
        else:
            pytest.fail("never between the two")

        def told():
            row = service.get_checkpoint(path)
            return row if row.object_url or row.HasField("upload_error") else 0

        row = until(told)
        assert row.upload_error.reason == "REMOTE_CHECKPOINT_EXISTS"
        assert json.loads(bucket.get(f"{prefix}commit.json")) == theirs
        assert bucket.keys(prefix) == [f"{prefix}commit.json"]


def run_server(tmp_path, *flags, **environment):
    return subprocess.run(
        [
            find_server(),
            f"--state_dir={tmp_path}",
            "--listen=127.0.0.1:0",
            "--metrics_listen=127.0.0.1:0",
            *flags,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin", **environment},
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--object_store=weights"], "must be s3://"),
        (["--object_store=s3://"], "must be s3://"),
        (["--object_store=s3://a/../b"], "must be s3://"),
        ([FLAG, "--object_store_endpoint=ftp://x"], "must be https://"),
        ([FLAG, "--object_store_endpoint=http://10.0.0.1:9"], "without TLS"),
        ([FLAG, "--object_store_part_mib=1"], "from 5 to 5120"),
        ([FLAG, "--object_store_ca=/none.pem"], "no file that can be read"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_the_start(tmp_path, flags, said):
    done = run_server(
        tmp_path, *flags, AWS_ACCESS_KEY_ID="k", AWS_SECRET_ACCESS_KEY="s"
    )
    assert done.returncode == 2
    assert said in done.stdout + done.stderr


def test_wrong_keys_and_buckets_are_refused_at_the_start(bucket, tmp_path):
    right = bucket.environment()
    done = run_server(tmp_path, FLAG, AWS_ENDPOINT_URL=bucket.endpoint)
    assert done.returncode == 2
    assert "AWS_ACCESS_KEY_ID" in done.stdout + done.stderr
    done = run_server(
        tmp_path, FLAG, **{**right, "AWS_SECRET_ACCESS_KEY": "wrong"}
    )
    assert done.returncode == 2
    assert "SignatureDoesNotMatch" in done.stdout + done.stderr
    done = run_server(tmp_path, "--object_store=s3://nobodys", **right)
    assert done.returncode == 2
    assert "NoSuchBucket" in done.stdout + done.stderr


def there_and_back(service, model):
    client = service.create_training_client(model, job_id="job")
    path = client.save_state("state").result().path
    row = stored(service, path)
    shutil.rmtree(row.local_path)
    service.fetch_checkpoint(path)
    assert service.get_checkpoint(path).local_path == row.local_path


def test_a_store_behind_tls(pki, models, tmp_path, monkeypatch):
    with ObjectStore(pki) as bucket:
        for name, value in bucket.environment().items():
            monkeypatch.setenv(name, value)
        ca = f"--object_store_ca={pki}/ca.pem"
        with serving(tmp_path / "known", ca) as (_, service):
            there_and_back(service, models["llama"])
        # Whoever has another's certificate gets no weights.
        before = bucket.keys()
        other = f"--object_store_ca={pki}/other.pem"
        with serving(tmp_path / "other", other) as (_, service):
            client = service.create_training_client(
                models["llama"], job_id="another"
            )
            path = client.save_state("state").result().path

            def told():
                row = service.get_checkpoint(path)
                return row.HasField("upload_error") and row.upload_error

            error = until(told)
            assert error.reason == "STORAGE_UNREACHABLE"
            assert "certificate" in error.message
        assert bucket.keys() == before


def test_keys_for_a_session(models, tmp_path, monkeypatch):
    with ObjectStore(temporary=True) as bucket:
        right = bucket.environment()
        for name, value in right.items():
            monkeypatch.setenv(name, value)
        with serving(tmp_path / "one") as (_, service):
            there_and_back(service, models["llama"])
        for token, said in (
            ("of another session", "InvalidToken"),
            ("", "InvalidAccessKeyId"),
        ):
            done = run_server(
                tmp_path / "two", FLAG, **{**right, "AWS_SESSION_TOKEN": token}
            )
            assert done.returncode == 2
            assert said in done.stdout + done.stderr


def test_without_a_store_that_is_said(models, tmp_path, capsys, monkeypatch):
    with Server(tmp_path) as server:
        service = gradwire.ServiceClient(address=server.address)
        path = "gradwire://jobs/job/checkpoints/x"
        for call in (
            lambda: service.fetch_checkpoint(path),
            lambda: service.list_checkpoints(remote=True),
        ):
            assert refusal(call).reason == "OBJECT_STORE_MISSING"
        service.close(wait=False)
        monkeypatch.setenv("GRADWIRE_ADDRESS", server.address)
        assert cli.main(["checkpoint", "list", "--remote"]) == 1
        assert "OBJECT_STORE_MISSING" in capsys.readouterr().err


def test_the_command_line_shows_where_copies_are(
    bucket, models, tmp_path, capsys, monkeypatch
):
    with serving(tmp_path / "one") as (_, service):
        client = service.create_training_client(models["llama"], job_id="job")
        path = client.save_state("state").result().path
        stored(service, path)
    shutil.rmtree(tmp_path / "one")
    with serving(tmp_path / "two") as (server, _):
        monkeypatch.setenv("GRADWIRE_ADDRESS", server.address)
        assert cli.main(["checkpoint", "list", "--remote"]) == 0
        assert f"only at s3://{BUCKET}/team/a" in capsys.readouterr().err
        assert cli.main(["checkpoint", "fetch", path]) == 0
        assert "fetched jobs/job/checkpoints/state" in capsys.readouterr().err
        assert cli.main(["checkpoint", "list", "job"]) == 0
        assert f"  at s3://{BUCKET}/team/a" in capsys.readouterr().err


def test_a_stop_does_not_wait_for_the_store(bucket, models, tmp_path):
    with serving(tmp_path / "one") as (_, service):
        client = service.create_training_client(models["llama"], job_id="job")
        path = client.save_state("state").result().path
        stored(service, path)
    with serving(tmp_path / "two", "--drain_seconds=0") as (server, service):
        bucket.stop()
        try:
            threading.Thread(
                target=lambda: refusal(lambda: service.fetch_checkpoint(path)),
                daemon=True,
            ).start()
            time.sleep(0.5)
            server.process.terminate()
            assert server.process.wait(15) == 0
        finally:
            bucket.go_on()
