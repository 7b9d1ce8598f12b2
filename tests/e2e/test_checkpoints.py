# SPDX-License-Identifier: Apache-2.0
"""save_state and load_state through the client. The judge of a job that goes on
from a checkpoint is one that was never disturbed, bit by bit."""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

import gradwire
import numpy as np
import pytest
import torch
from conftest import MODELS, sequences
from gradwire import cli
from gradwire._proto.gradwire.v1 import (
    checkpoints_pb2,
    checkpoints_pb2_grpc,
    jobs_pb2,
)
from processes import Server, Watched, ranks_by_number

VOCAB = MODELS["llama"][1]["vocab_size"]
LENGTHS = (9, 17, 5, 12)


def loss_of(data, logprobs):
    answers = [d.response(lp) for d, lp in zip(data, logprobs, strict=True)]
    loss = sum((torch.exp(a / 4) - a).sum() for a in answers)
    return loss, {"mean": float(loss.detach())}


def steps(client, begin, end):
    """Training steps by number; all that they gave, as comparable values."""
    out = []
    for step in range(begin, end):
        data = sequences(VOCAB, LENGTHS, seed=step)
        built_in = client.forward_backward(data, "cross_entropy")
        custom = client.forward_backward_custom(data[:2], loss_of)
        update = client.optim_step(
            gradwire.AdamParams(learning_rate=1e-2, weight_decay=0.1)
        ).result()
        out.append(
            (
                [lp.tobytes() for lp in built_in.result().logprobs],
                custom.result().metrics["mean"],
                update.grad_norm,
                update.optimizer_step,
                update.weight_version,
            )
        )
    return out


_numbers = itertools.count()


def weights_of(client):
    """The digest of the weights as they would be served."""
    name = f"weights-{next(_numbers)}"
    return client.save_weights_for_sampler(name).result().digest


def reason(future):
    with pytest.raises(gradwire.GradwireError) as caught:
        future.result(60)
    return caught.value.reason


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_training_goes_on_as_if_it_had_never_stopped(
    new_client, precision, world_size
):
    options = {"precision": precision, "world_size": world_size}
    undisturbed = new_client("llama", **options)
    want = steps(undisturbed, 0, 6)
    client = new_client("llama", **options)
    assert steps(client, 0, 3) == want[:3]
    saved = client.save_state("middle").result()
    assert saved.optimizer_step == 3 and saved.weight_version == 3
    assert saved.path == f"gradwire://jobs/{client.job_id}/checkpoints/middle"
    # Elsewhere meanwhile.
    assert steps(client, 10, 14) != want[3:]
    loaded = client.load_state_with_optimizer("middle").result()
    assert loaded.optimizer and loaded.optimizer_step == 3
    assert steps(client, 3, 6) == want[3:]
    assert weights_of(client) == weights_of(undisturbed)
    # In another job, by its full name.
    other = new_client("llama", **options)
    other.load_state_with_optimizer(saved.path).result()
    assert steps(other, 3, 6) == want[3:]
    assert weights_of(other) == weights_of(undisturbed)


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_any_number_of_ranks_loads_what_any_number_has_saved(
    new_client, precision
):
    first = new_client("llama", precision=precision, world_size=3)
    steps(first, 0, 2)
    saved = first.save_state("three").result()
    want = weights_of(first)
    for world_size in (1, 2, 4):
        other = new_client("llama", precision=precision, world_size=world_size)
        other.load_state_with_optimizer(saved.path).result()
        assert weights_of(other) == want
        # Moments as well: what is saved again is the same, elements and all.
        again = other.save_state("again").result()
        assert elements(again.local_path) == elements(saved.local_path)


def test_replicas_save_once(new_client):
    one = new_client("llama", world_size=2)
    two = new_client("llama", world_size=4, replicas=2)
    for client in (one, two):
        steps(client, 0, 1)
    saved = two.save_state("replicas").result()
    assert saved.bytes == one.save_state("plain").result().bytes
    want = weights_of(two)
    one.load_state_with_optimizer(saved.path).result()
    assert weights_of(one) == want
    steps(two, 1, 2)
    two.load_state_with_optimizer("replicas").result()
    assert weights_of(two) == want


def elements(directory):
    """A checkpoint's vectors, put together by what docs/checkpoints.md says of
    the files."""
    directory = pathlib.Path(directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    vectors = {}
    for rank in range(len(manifest["ranks"])):
        stem = directory / f"rank-{rank:05}"
        table = json.loads(stem.with_suffix(".json").read_text())
        data = stem.with_suffix(".data").read_bytes()
        for piece in table["pieces"]:
            width = {"f32": 4, "bf16": 2}[piece["dtype"]]
            begin, end = (
                width * n
                for n in (piece["begin"], piece["begin"] + piece["count"])
            )
            vector = vectors.setdefault(
                piece["vector"],
                bytearray(width * manifest["num_parameters"]),
            )
            vector[begin:end], data = data[: end - begin], data[end - begin :]
        assert not data
    return {
        name: hashlib.sha256(vector).hexdigest()
        for name, vector in vectors.items()
    }


def test_weights_alone_begin_a_new_optimizer(new_client):
    client = new_client("llama")
    steps(client, 0, 2)
    client.save_state("two").result()
    want = weights_of(client)
    steps(client, 2, 4)
    loaded = client.load_state("two").result()
    assert not loaded.optimizer
    assert loaded.optimizer_step == 0 and loaded.weight_version == 2
    assert weights_of(client) == want
    # As a job would that begins with these weights: same first step.
    fresh = new_client("llama")
    fresh.load_state(f"jobs/{client.job_id}/checkpoints/two").result()
    assert steps(client, 5, 7) == steps(fresh, 5, 7)


def test_before_the_first_step(new_client):
    client = new_client("llama")
    client.save_state("fresh").result()
    want = steps(client, 0, 2)
    client.load_state_with_optimizer("fresh").result()
    assert steps(client, 0, 2) == want


def test_a_save_leaves_gradients_and_a_load_drops_them(new_client):
    data = sequences(VOCAB, LENGTHS)
    plain = new_client("llama")
    plain.forward_backward(data, "cross_entropy")
    want = plain.optim_step().result()
    client = new_client("llama")
    client.forward_backward(data, "cross_entropy")
    client.save_state("pending")
    assert client.optim_step().result().grad_norm == want.grad_norm
    assert weights_of(client) == weights_of(plain)
    client.forward_backward(data, "cross_entropy")
    client.forward_backward(data, "cross_entropy")
    assert client.load_state("pending").result().dropped_ops == 2
    assert client.optim_step().result().skipped
    # One that cannot be loaded drops nothing.
    client.forward_backward(data, "cross_entropy")
    assert reason(client.load_state("nothing")) == "CHECKPOINT_NOT_FOUND"
    update = client.optim_step().result()
    assert not update.skipped and update.grad_norm == want.grad_norm


def test_names(new_client, service):
    client = new_client("llama")
    assert reason(client.save_state("latest")) == "INVALID_NAME"
    for name in ("", "..", "a/b", ".hidden", "a\0b", "é", "x" * 129):
        assert reason(client.save_state(name)) == "INVALID_NAME"
        assert reason(client.load_state(name)) == "INVALID_NAME"
    for path in (
        "gradwire://name",
        "jobs/x/models/name",
        "jobs/../checkpoints/name",
        f"jobs/{client.job_id}/checkpoints/..",
        f"/jobs/{client.job_id}/checkpoints/name",
    ):
        assert reason(client.load_state(path)) == "INVALID_NAME"
    saved = client.save_state("once").result()
    assert reason(client.save_state("once")) == "CHECKPOINT_EXISTS"
    assert reason(client.save_state("ttl", ttl=-1)) == "OPTION_OUT_OF_RANGE"
    # The one that was there is as it was.
    assert client.load_state_with_optimizer(saved.path).result()
    # And outlives its job.
    service.delete_job(client.job_id)
    other = new_client("llama")
    assert other.load_state(saved.path).result().weight_version == 0


def test_what_does_not_fit_is_refused_and_changes_nothing(new_client):
    llama, qwen = new_client("llama"), new_client("qwen3")
    steps(llama, 0, 1)
    saved = llama.save_state("llama").result()
    before = weights_of(qwen)
    assert reason(qwen.load_state(saved.path)) == "CHECKPOINT_INCOMPATIBLE"
    snapshot = llama.save_weights_for_sampler("served").result()
    shutil.copytree(
        snapshot.local_path, pathlib.Path(saved.local_path).with_name("served")
    )
    assert reason(llama.load_state("served")) == "CHECKPOINT_KIND_MISMATCH"
    assert weights_of(qwen) == before
    # f32 and bf16 jobs hold the same master.
    half = new_client("llama", precision="bf16")
    half.load_state_with_optimizer(saved.path).result()
    again = half.save_state("again").result()
    assert elements(again.local_path) == elements(saved.local_path)


@pytest.mark.parametrize("world_size", [1, 2])
def test_damage_is_found_before_a_weight_is_used(new_client, world_size):
    client = new_client("llama", world_size=world_size)
    steps(client, 0, 2)
    saved = client.save_state("good").result()
    want = weights_of(client)
    folder = pathlib.Path(saved.local_path)
    rng = np.random.default_rng(1)
    for file in sorted(folder.iterdir()):
        for where in (0, file.stat().st_size - 1, None):
            copy = folder.with_name("bad")
            shutil.copytree(folder, copy)
            data = bytearray((copy / file.name).read_bytes())
            at = int(rng.integers(len(data))) if where is None else where
            data[at] ^= 1 << int(rng.integers(8))
            (copy / file.name).write_bytes(data)
            found = reason(client.load_state_with_optimizer("bad"))
            assert found in ("CHECKPOINT_CORRUPT", "STATE_VERSION"), file
            shutil.rmtree(copy)
        copy = folder.with_name("bad")
        shutil.copytree(folder, copy)
        (copy / file.name).unlink()
        found = reason(client.load_state("bad"))
        assert found in ("CHECKPOINT_CORRUPT", "CHECKPOINT_KIND_MISMATCH")
        shutil.rmtree(copy)
    assert weights_of(client) == want
    assert client.load_state_with_optimizer("good").result()


def test_checkpoints_are_listed_verified_and_deleted(new_client, service):
    client = new_client("llama", world_size=2)
    other = new_client("qwen3")
    assert service.list_checkpoints(client.job_id) == []
    saved = client.save_state("zero").result()
    steps(client, 0, 1)
    second = client.save_state("a-later-one").result()
    foreign = other.save_state("zero").result()

    rows = service.list_checkpoints(client.job_id)
    assert [row.path for row in rows] == [saved.path, second.path]
    for row, want in zip(rows, (saved, second), strict=True):
        assert row.local_path == want.local_path
        assert (row.bytes, row.digest) == (want.bytes, want.digest)
        assert row.optimizer_step == want.optimizer_step
        assert row.weight_version == want.weight_version
        assert row.has_optimizer == (want.optimizer_step > 0)
        assert row.world_size == 2
        assert row.attributes["precision"] == "f32"
        assert row.attributes["base_model"]
        assert service.get_checkpoint(row.path) == row
        assert service.verify_checkpoint(row.path) == row
    size = sum(
        p.stat().st_size for p in pathlib.Path(saved.local_path).iterdir()
    )
    assert saved.bytes == size
    everywhere = [row.path for row in service.list_checkpoints()]
    assert {saved.path, second.path, foreign.path} <= set(everywhere)

    # Damage that only reading all of it finds.
    data = max(pathlib.Path(second.local_path).glob("*.data"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    assert service.get_checkpoint(second.path).digest == second.digest
    with pytest.raises(gradwire.GradwireError) as caught:
        service.verify_checkpoint(second.path)
    assert caught.value.reason == "CHECKPOINT_CORRUPT"
    # And damage that is found at once does not hide the others.
    (pathlib.Path(second.local_path) / "manifest.json").write_text("{}")
    rows = service.list_checkpoints(client.job_id)
    assert [row.error.reason for row in rows] == ["", "CHECKPOINT_CORRUPT"]

    assert service.delete_checkpoint(second.path).path == second.path
    for call in (
        service.get_checkpoint,
        service.verify_checkpoint,
        service.delete_checkpoint,
    ):
        with pytest.raises(gradwire.GradwireError) as caught:
            call(second.path)
        assert caught.value.reason == "CHECKPOINT_NOT_FOUND"
    assert reason(client.load_state("a-later-one")) == "CHECKPOINT_NOT_FOUND"
    assert os.listdir(pathlib.Path(saved.local_path).parent) == ["zero"]
    # The name is free.
    client.save_state("a-later-one").result()


def test_paths_and_pages_of_the_catalogue(new_client, service):
    client = new_client("llama")
    saves = [client.save_state(f"n-{index}") for index in range(7)]
    paths = [save.result().path for save in saves]
    stub = checkpoints_pb2_grpc.CheckpointServiceStub(service._channel)

    def page(**fields):
        return service.call(
            stub.ListCheckpoints,
            checkpoints_pb2.ListCheckpointsRequest(
                job_id=client.job_id, **fields
            ),
        )

    found, token = [], ""
    while True:
        got = page(page_size=3, page_token=token)
        assert 0 < len(got.checkpoints) <= 3
        found += [row.path for row in got.checkpoints]
        token = got.next_page_token
        if not token:
            break
    assert found == paths
    for fields, want in (
        ({"page_size": 201}, "OPTION_OUT_OF_RANGE"),
        ({"page_size": -1}, "OPTION_OUT_OF_RANGE"),
        ({"page_token": "elsewhere"}, "PAGE_TOKEN_INVALID"),
    ):
        with pytest.raises(gradwire.GradwireError) as caught:
            page(**fields)
        assert caught.value.reason == want
    for job, want in (
        ("no-such-job", "JOB_NOT_FOUND"),
        ("../..", "INVALID_NAME"),
        ("A", "INVALID_NAME"),
    ):
        with pytest.raises(gradwire.GradwireError) as caught:
            service.list_checkpoints(job)
        assert caught.value.reason == want
    for path in (
        "",
        "n-0",
        "..",
        f"jobs/{client.job_id}/checkpoints/..",
        f"jobs/{client.job_id}/checkpoints/.n-0.pending",
        "jobs/../checkpoints/x",
        f"gradwire://gradwire://jobs/{client.job_id}/checkpoints/n-0",
        "/etc/passwd",
    ):
        for call in (service.get_checkpoint, service.delete_checkpoint):
            with pytest.raises(gradwire.GradwireError) as caught:
                call(path)
            assert caught.value.reason == "INVALID_NAME", path
    with pytest.raises(gradwire.GradwireError) as caught:
        service.get_checkpoint("n-0")
    assert caught.value.metadata["field"] == "path"
    assert "jobs/JOB/checkpoints/NAME" in caught.value.message


def test_the_command_line_knows_checkpoints(
    new_client, server, monkeypatch, capsys
):
    monkeypatch.setenv("GRADWIRE_ADDRESS", server.address)
    client = new_client("llama")
    saved = client.save_state("mine").result()
    assert cli.main(["checkpoint", "list", client.job_id, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["path"] == saved.path and row["digest"] == saved.digest
    assert cli.main(["checkpoint", "list", client.job_id]) == 0
    assert "/checkpoints/mine" in capsys.readouterr().err
    assert cli.main(["checkpoint", "verify", saved.path]) == 0
    assert capsys.readouterr().err.startswith("verified jobs/")
    assert cli.main(["checkpoint", "get"]) == 2
    assert "PATH" in capsys.readouterr().err
    assert cli.main(["checkpoint", "delete", saved.path]) == 0
    assert not os.path.exists(saved.local_path)
    assert cli.main(["checkpoint", "get", saved.path]) == 1
    assert "CHECKPOINT_NOT_FOUND" in capsys.readouterr().err


@contextlib.contextmanager
def serving(state_dir):
    """A server of its own, and a client of it."""
    with Server(state_dir) as server:
        service = gradwire.ServiceClient(address=server.address)
        yield server, service
        # Not all calls were meant to succeed.
        with contextlib.suppress(gradwire.GradwireError):
            service.close(wait=False)


def start(service, models, job, **options):
    return service.create_training_client(
        str(models["llama"]), job_id=job, precision="f32", **options
    )


def test_what_a_killed_server_leaves_is_no_checkpoint(models, tmp_path):
    # Gone by the time of the second server: its job, which it does not start
    # then, would go on with its saves.
    base = shutil.copytree(models["llama"], tmp_path / "base")
    with serving(tmp_path) as (server, service):
        client = start(service, {"llama": base}, "job")
        steps(client, 0, 1)
        client.save_state("done").result()
        want = weights_of(client)
        saves = [client.save_state(f"more-{index}") for index in range(50)]
        saves[5].result()
        server.process.kill()
        server.process.wait()
    shutil.rmtree(base)
    checkpoints = tmp_path / "jobs" / "job" / "checkpoints"
    with serving(tmp_path) as (server, service):
        names = sorted(os.listdir(checkpoints))
        assert "done" in names and "more-5" in names and len(names) < 52
        assert not [name for name in names if name.startswith(".")]
        client = start(service, models, "again")
        for name in names:
            path = f"jobs/job/checkpoints/{name}"
            client.load_state_with_optimizer(path).result()
            assert weights_of(client) == want


def test_a_full_disk_is_said_and_loses_nothing(models, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "none", tmp_path]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted: not root")
    try:
        with serving(tmp_path) as (server, service):
            client = start(service, models, "job", world_size=2)
            steps(client, 0, 1)
            names = []
            with pytest.raises(gradwire.GradwireError) as caught:
                for index in range(80):
                    client.save_state(f"state-{index}").result()
                    names.append(f"state-{index}")
            assert caught.value.reason == "STORAGE_FULL"
            folder = tmp_path / "jobs" / "job" / "checkpoints"
            assert sorted(os.listdir(folder)) == sorted(names) and names
            # With some room, for the server's own checkpoint after the load as
            # well, the job is there, and trains on.
            for name in names[:4]:
                shutil.rmtree(folder / name)
            steps(client, 1, 2)
            client.load_state_with_optimizer(names[-1]).result()
            client.save_state("room").result()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def files_of(saved):
    return {
        file.name: file.read_bytes()
        for file in pathlib.Path(saved.local_path).iterdir()
    }


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_save_beside_the_training_has_the_same_bytes(
    new_client, precision, world_size
):
    options = {
        "precision": precision,
        "moment_precision": precision,
        "world_size": world_size,
    }
    still, moving = (
        new_client("llama", **options),
        new_client("llama", **options),
    )
    assert steps(still, 0, 2) == steps(moving, 0, 2)
    beside = moving.save_state("two")
    data = sequences(VOCAB, LENGTHS, seed=2)
    # None of this waits for the save.
    moving.forward_backward(data, "cross_entropy")
    moving.optim_step(gradwire.AdamParams(learning_rate=1e-2))
    want = still.save_state("two").result()
    assert files_of(beside.result()) == files_of(want)
    assert beside.result().digest == want.digest
    assert beside.result().optimizer_step == 2
    still.forward_backward(data, "cross_entropy")
    still.optim_step(gradwire.AdamParams(learning_rate=1e-2))
    assert steps(still, 3, 5) == steps(moving, 3, 5)
    # What comes after a save and a load in one breath is loaded from it.
    moving.save_state("five")
    loaded = moving.load_state_with_optimizer("five")
    assert loaded.result().optimizer_step == 5
    assert weights_of(moving) == weights_of(still)


def test_a_rank_that_is_killed_while_it_saves_leaves_no_half(models, tmp_path):
    folder = tmp_path / "jobs" / "job" / "checkpoints"
    with serving(tmp_path) as (server, service):
        client = start(service, models, "job", world_size=2)
        steps(client, 0, 2)
        want = weights_of(client)
        for number in range(6):
            client.save_state(f"try-{number}")
            client.forward_backward(
                sequences(VOCAB, LENGTHS, seed=number), "cross_entropy"
            )
            time.sleep(number * 0.004)
            killed = Watched(ranks_by_number(server.process.pid)[number % 2])
            os.kill(killed.pid, signal.SIGKILL)
            assert killed.has_ended(60)
            killed.close()
            for job in service.watch_job("job"):
                if job.state == jobs_pb2.JOB_STATE_FAILED:
                    break
            service.restart_job("job")
            client = start(service, models, "job", world_size=2, take_over=True)
            assert weights_of(client) == want
            # Nor is the folder there if the first was not begun.
            if not (folder / f"try-{number}").exists():
                # The name is free, and what was begun is gone.
                client.save_state(f"try-{number}").result()
            for name in os.listdir(folder):
                if name.startswith("."):
                    continue
                client.load_state_with_optimizer(name).result()
                assert weights_of(client) == want


def test_a_failed_job_goes_on_from_its_checkpoint(models, tmp_path):
    with serving(tmp_path) as (server, service):
        undisturbed = start(service, models, "undisturbed", world_size=2)
        want = steps(undisturbed, 0, 4)
        service.delete_job("undisturbed")
        client = start(service, models, "job", world_size=2)
        assert steps(client, 0, 2) == want[:2]
        client.save_state("two").result()
        os.kill(ranks_by_number(server.process.pid)[1], signal.SIGKILL)
        with pytest.raises(gradwire.GradwireError):
            steps(client, 2, 4)
        service.restart_job("job")
        client = start(service, models, "job", world_size=2, take_over=True)
        client.load_state_with_optimizer("two").result()
        assert steps(client, 2, 4) == want[2:]
