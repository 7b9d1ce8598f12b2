# SPDX-License-Identifier: Apache-2.0
"""Snapshots as users reach them. The judge of deltas is a reader that was
written from docs/delta.md alone, and shares no code with the server."""

import contextlib
import io
import itertools
import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time

import gradwire
import numpy as np
import pytest
import torch
import transformers
import zstandard
from conftest import sequences
from gradwire import cli
from processes import ranks_by_number
from snapshot_calls import (
    VOCAB,
    content,
    damage,
    reason,
    save,
    serving,
    start,
    step,
)

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "delta"))
import dlt1  # noqa: E402


def split(file):
    """What stands before a safetensors file's data, and its tensors' bytes."""
    (length,) = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + length])
    header.pop("__metadata__", None)
    data = file[8 + length :]
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = data[begin:end]
    return file[: 8 + length], header, tensors


def join(prefix, header, tensors):
    order = sorted(header, key=lambda name: header[name]["data_offsets"])
    return prefix + b"".join(tensors[name] for name in order)


@pytest.mark.parametrize(
    ("precision", "world_size"), [("bf16", 1), ("bf16", 2), ("f32", 2)]
)
def test_thirty_deltas_are_the_full_export_byte_for_byte(
    new_client, service, precision, world_size
):
    client = new_client("llama", precision=precision, world_size=world_size)
    base = save(client, "s0")
    assert (base.type, base.parent) == ("base", "")
    prefix, header, weights = split(content(base))
    ids = [base.weight_id]
    for number in range(1, 31):
        step(client, number)
        delta = save(client, f"s{number}", type="delta")
        assert (delta.type, delta.parent) == ("delta", f"s{number - 1}")
        assert delta.optimizer_step == number
        file = content(delta, "delta.safetensors")
        assert delta.bytes == len(file)
        assert delta.digest == dlt1.xxh128(file).hex()
        described, weights = dlt1.apply(file, weights)
        assert described["prev_id"] == ids[-1]
        assert described["base_id"] == ids[0]
        ids.append(delta.weight_id)
        assert described["id"] == delta.weight_id
    assert len(set(ids)) == 31
    full = save(client, "full")
    assert full.weight_id == ids[-1]
    assert join(prefix, header, weights) == content(full)
    # The server's own reader gets there as well, and from the middle.
    assert service.verify_checkpoint(delta.path).weight_id == ids[-1]
    model = service.promote_checkpoint(delta.path, f"{client.job_id}-30")
    assert model.weight_id == ids[-1]
    assert content(model) == content(full)
    assert set(os.listdir(model.local_path)) == set(os.listdir(full.local_path))
    # And the same bytes are the same weights to what serves them.
    for directory in (full.local_path, model.local_path):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto"
        )
        for name, tensor in loaded.state_dict().items():
            as_saved = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert as_saved == weights[name], name


def test_any_number_of_ranks_makes_the_same_delta(new_client):
    results = []
    for world_size in (1, 3):
        client = new_client("llama", precision="bf16", world_size=world_size)
        save(client, "base")
        # Weights that do not depend on the order of sums: none but moments.
        results.append(save(client, "same", type="delta"))
    assert results[0].weight_id == results[1].weight_id
    _, header, _ = split(content(results[0], "delta.safetensors"))
    assert header == {}


def test_auto_says_what_it_made_and_why(new_client):
    client = new_client("llama", precision="bf16")
    first = save(client, "a", type="auto")
    assert (first.type, first.reason) == ("base", "the first snapshot")
    step(client, 1)
    second = save(client, "b", type="auto")
    assert (second.type, second.parent) == ("delta", "a")
    assert second.reason == "smaller than a base"
    # The model is tiny: what describes a delta is soon half of it.
    kinds = []
    for number in range(40):
        step(client, number)
        kinds.append(save(client, f"c{number}", type="auto"))
        if kinds[-1].type == "base":
            break
    assert kinds[-1].type == "base"
    assert kinds[-1].reason in (
        "the chain has 25 deltas",
        "the chain's deltas exceed half of its base",
    )
    # A parent that cannot be used.
    damage(kinds[-1], "model.safetensors")
    last = save(client, "d", type="auto")
    assert last.type == "base" and "CHECKPOINT_CORRUPT" in last.reason


def test_what_cannot_be_a_parent(new_client, service):
    client, other = new_client("llama"), new_client("llama")
    snapshot = client.save_weights_for_sampler
    assert reason(snapshot, "x", type="delta") == "DELTA_PARENT_UNAVAILABLE"
    base = save(client, "base")
    foreign = save(other, "base")
    for parent, want in (
        ("nothing", "DELTA_PARENT_UNAVAILABLE"),
        (foreign.path, "DELTA_PARENT_UNAVAILABLE"),
        ("..", "INVALID_NAME"),
        ("../base", "INVALID_NAME"),
        (f"jobs/{client.job_id}/checkpoints/base", "INVALID_NAME"),
        (f"jobs/{client.job_id}/snapshots/../x", "INVALID_NAME"),
    ):
        assert reason(snapshot, "x", type="delta", parent=parent) == want
    assert reason(snapshot, "x", parent="base") == "UNSUPPORTED_OPTION"
    assert reason(snapshot, "x", ttl=-1.0) == "OPTION_OUT_OF_RANGE"
    assert reason(snapshot, "x", type="lora") == "UNSUPPORTED_OPTION"
    assert reason(snapshot, "latest") == "INVALID_NAME"
    step(client, 1)
    named = save(client, "named", type="delta", parent=base.path)
    assert named.parent == "base"
    assert reason(snapshot, "named") == "SNAPSHOT_EXISTS"
    # Weights of another dtype, and damage.
    half = new_client("llama", precision="bf16")
    mine = save(half, "base")
    shutil.rmtree(mine.local_path)
    shutil.copytree(base.local_path, mine.local_path)
    found = reason(half.save_weights_for_sampler, "x", type="delta")
    assert found == "DELTA_PARENT_MISMATCH"
    damage(named, "delta.safetensors")
    assert reason(snapshot, "x", type="delta") == "DELTA_PARENT_UNAVAILABLE"
    assert save(client, "x", type="delta", parent="base").parent == "base"
    assert not [
        name
        for name in os.listdir(pathlib.Path(base.local_path).parent)
        if name.startswith(".")
    ]


def test_snapshots_are_listed_verified_and_deleted(new_client, service):
    client = new_client("llama", precision="bf16", world_size=2)
    base = save(client, "z-first", ttl=3600)
    state = client.save_state("state", ttl=60).result()
    step(client, 1)
    delta = save(client, "a-second", type="delta")
    rows = service.list_checkpoints(client.job_id)
    assert [row.path for row in rows] == [base.path, state.path, delta.path]
    first, training, second = rows
    assert [row.kind for row in rows] == ["base", "training", "delta"]
    for row, want in zip(rows, (base, state, delta), strict=True):
        assert service.get_checkpoint(row.path) == row
        assert service.verify_checkpoint(row.path) == row
        assert row.local_path == want.local_path
        assert row.optimizer_step == want.optimizer_step
        assert row.resumable == (row.kind == "training")
        assert row.servable == row.promotable == (row.kind != "training")
    for row, want in ((first, base), (second, delta)):
        assert row.weight_id == want.weight_id
        assert row.dtype == "BF16" and len(row.digest) == 32
        assert row.operation
        assert row.attributes["base_model"]
        files = {file.name: file for file in row.files}
        on_disk = set(os.listdir(want.local_path))
        assert set(files) == on_disk - {"snapshot.json"}
        for name, file in files.items():
            data = content(want, name)
            assert file.bytes == len(data)
            assert file.digest == dlt1.xxh128(data).hex()
        assert row.bytes == sum(file.bytes for file in row.files)
    assert (second.parent, second.parent_id) == ("z-first", base.weight_id)
    assert (second.chain_length, first.child) == (1, "a-second")
    lives = first.expire_time.ToDatetime() - first.create_time.ToDatetime()
    assert lives.total_seconds() == 3600
    lives = (
        training.expire_time.ToDatetime() - training.create_time.ToDatetime()
    )
    assert lives.total_seconds() == 60
    assert not second.HasField("expire_time")

    with pytest.raises(gradwire.GradwireError) as caught:
        service.delete_checkpoint(base.path)
    assert caught.value.reason == "SNAPSHOT_HAS_CHILDREN"
    assert caught.value.metadata["child"] == "a-second"
    damage(delta, "delta.safetensors")
    assert service.get_checkpoint(delta.path) == second
    assert reason(service.verify_checkpoint, delta.path) == "CHECKPOINT_CORRUPT"
    damage(delta, "snapshot.json")
    rows = service.list_checkpoints(client.job_id)
    errors = {row.name: row.error.reason for row in rows}
    assert errors["a-second"] == "CHECKPOINT_CORRUPT"
    assert errors["z-first"] == errors["state"] == ""
    assert service.delete_checkpoint(delta.path).path == delta.path
    damage(base, "config.json")
    assert reason(service.verify_checkpoint, base.path) == "CHECKPOINT_CORRUPT"
    assert service.delete_checkpoint(base.path).weight_id == base.weight_id
    for call in (
        service.get_checkpoint,
        service.verify_checkpoint,
        service.delete_checkpoint,
    ):
        assert reason(call, base.path) == "CHECKPOINT_NOT_FOUND"
    assert os.listdir(pathlib.Path(base.local_path).parent) == []
    save(client, "z-first")
    # Neither is the other.
    assert reason(client.load_state, base.path) == "CHECKPOINT_KIND_MISMATCH"


def test_no_path_leads_elsewhere(new_client, service, models):
    client = new_client("llama")
    base = save(client, "base")
    state = client.save_state("state").result()
    for path in (
        "",
        "base",
        "..",
        f"jobs/{client.job_id}/snapshots/..",
        f"jobs/{client.job_id}/snapshots/.base.pending",
        f"jobs/{client.job_id}/models/base",
        "jobs/../snapshots/x",
        f"/jobs/{client.job_id}/snapshots/base",
        str(models["llama"]),
    ):
        for call in (service.get_checkpoint, service.delete_checkpoint):
            assert reason(call, path) == "INVALID_NAME", path
        found = reason(service.promote_checkpoint, path, "model")
        assert found == "INVALID_NAME"
        found = reason(service.diff_checkpoints, base.path, path)
        assert found == "INVALID_NAME"
    for model_id in ("", "..", "a/b", "A", "-a", "a.b", "x" * 64, "é"):
        found = reason(service.promote_checkpoint, base.path, model_id)
        assert found == "INVALID_NAME", model_id
    mismatch = "CHECKPOINT_KIND_MISMATCH"
    assert reason(service.promote_checkpoint, state.path, "x") == mismatch
    found = reason(service.diff_checkpoints, base.path, state.path)
    assert found == mismatch
    absent = f"jobs/{client.job_id}/snapshots/nothing"
    not_found = "CHECKPOINT_NOT_FOUND"
    assert reason(service.promote_checkpoint, absent, "x") == not_found
    assert reason(service.diff_checkpoints, absent, base.path) == not_found


def test_a_promoted_model_needs_nothing_of_its_job(new_client, service):
    client = new_client("llama", precision="bf16")
    save(client, "base")
    step(client, 1, learning_rate=1e-2)
    delta = save(client, "next", type="delta")
    other = save(client, "other", type="delta")
    service.delete_job(client.job_id)
    # The job is gone; what it saved is not.
    name = f"{client.job_id}-model"
    model = service.promote_checkpoint(delta.path, name)
    assert service.promote_checkpoint(delta.path, name) == model
    found = reason(service.promote_checkpoint, other.path, name)
    assert found == "MODEL_EXISTS"
    for snapshot in (other, delta):
        service.delete_checkpoint(snapshot.path)
    assert service.promote_checkpoint(delta.path, name) == model
    with service.create_training_client(
        model.local_path, precision="bf16"
    ) as again:
        assert save(again, "first").weight_id == delta.weight_id
        service.delete_job(again.job_id)


def test_differences_are_counted_and_exported(new_client, service):
    client = new_client("llama", precision="bf16")
    one = save(client, "one")
    step(client, 1, learning_rate=1e-3)
    two = save(client, "two", type="delta")
    diff = service.diff_checkpoints(one.path, two.path)
    prefix, header, before = split(content(one))
    after = split(content(service.promote_checkpoint(two.path, "diffed")))[2]
    shutil.rmtree(pathlib.Path(one.local_path).parents[3] / "models" / "diffed")
    changed = {}
    for name in header:
        old, new = (
            np.frombuffer(side[name], "<u2") for side in (before, after)
        )
        changed[name] = int((old != new).sum())
    want = {name: count for name, count in changed.items() if count}
    assert {t.name: t.changed for t in diff.tensors} == want
    assert diff.changed == sum(want.values()) > 0
    assert diff.elements == sum(len(data) // 2 for data in before.values())
    assert diff.delta_bytes == two.bytes
    assert diff.full_bytes == len(content(one))
    assert diff.from_weight_id == one.weight_id
    assert diff.to_weight_id == two.weight_id
    same = service.diff_checkpoints(two.path, two.path)
    assert same.changed == 0 and not same.tensors

    files = {}
    for kind in ("dlt1", "xor", "sparse"):
        buffer = io.BytesIO()
        size = service.export_diff(one.path, two.path, buffer, kind)
        files[kind] = buffer.getvalue()
        assert size == len(files[kind]) > 0
    assert dlt1.apply(files["dlt1"], before)[1] == after
    made = dict(before)
    for name, frame in split(files["xor"])[2].items():
        size = len(before[name])
        bits = zstandard.ZstdDecompressor().decompress(frame, size)
        old = np.frombuffer(before[name], np.uint8)
        made[name] = (old ^ np.frombuffer(bits, np.uint8)).tobytes()
    assert made == after
    made = dict(before)
    sparse = split(files["sparse"])[2]
    for name in want:
        values = np.frombuffer(before[name], "<u2").copy()
        indices = np.frombuffer(sparse[name + ".indices"], "<i4")
        values[indices] = np.frombuffer(sparse[name + ".values"], "<u2")
        made[name] = values.tobytes()
    assert made == after
    # Backwards is a difference, too.
    buffer = io.BytesIO()
    service.export_diff(two.path, one.path, buffer)
    assert dlt1.apply(buffer.getvalue(), after)[1] == before
    found = reason(service.export_diff, one.path, two.path, buffer, "arc")
    assert found == "UNSUPPORTED_OPTION"


def test_the_command_line_knows_snapshots(
    new_client, server, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("GRADWIRE_ADDRESS", server.address)
    client = new_client("llama", precision="bf16")
    one = save(client, "one", ttl=86400)
    step(client, 1)
    two = save(client, "two", type="auto")

    def run(*arguments, status=0):
        assert cli.main(["checkpoint", *arguments]) == status
        return capsys.readouterr()

    rows = json.loads(run("list", client.job_id, "--json").out)
    assert [row["kind"] for row in rows] == ["base", "delta"]
    assert rows[1]["parent"] == "one"
    assert len(rows[0]["create_time"]) == len("2026-01-31T23:59:59.000001Z")
    assert rows[0]["create_time"] < rows[1]["create_time"]
    lines = run("list", client.job_id).err.splitlines()
    assert "expires" in lines[0] and "kept for two" in lines[0]
    assert "delta" in lines[1] and "to one" in lines[1]
    assert run("verify", two.path).err.startswith("verified jobs/")
    assert "SNAPSHOT_HAS_CHILDREN" in run("delete", one.path, status=1).err
    assert " elements (" in run("diff", one.path, two.path).err
    diff = json.loads(run("diff", one.path, two.path, "--json").out)
    assert 0 < diff["share"] < 1 and diff["delta_bytes"] == two.bytes
    target = tmp_path / "change.safetensors"
    run("diff", one.path, two.path, "--export", str(target))
    assert dlt1.apply(target.read_bytes(), split(content(one))[2])
    nowhere = str(tmp_path / "none" / "x")
    run("diff", one.path, two.path, "--export", nowhere, status=1)
    bad = run("diff", one.path, "x", "--export", str(target), status=1)
    assert "INVALID_NAME" in bad.err
    assert os.listdir(tmp_path) == ["change.safetensors"]
    name = f"{client.job_id}-cli"
    model = json.loads(run("promote", two.path, name, "--json").out)
    assert model["weight_id"] == two.weight_id
    assert model["local_path"] in run("promote", two.path, name).err
    assert "MODEL_ID" in run("promote", two.path, status=2).err
    assert "PATH" in run("diff", two.path, status=2).err
    run("delete", two.path)
    run("delete", one.path)
    assert not os.path.exists(one.local_path)


def test_what_a_killed_server_leaves_is_whole(models, tmp_path):
    with serving(tmp_path) as (server, service):
        client = start(service, models, "job")
        save(client, "base")
        saves = []
        for number in range(40):
            client.forward_backward(
                sequences(VOCAB, (9,), seed=number), "cross_entropy"
            )
            client.optim_step()
            saves.append(
                client.save_weights_for_sampler(f"n-{number}", type="delta")
            )
        saves[3].result()
        server.process.kill()
        server.process.wait()
    folder = tmp_path / "jobs" / "job" / "snapshots"
    # And of a removal that was interrupted: of a parent, and of no parent.
    os.rename(folder / "n-1", folder / ".n-1~removed")
    shutil.copytree(folder / "base", folder / ".gone~removed")
    with serving(tmp_path) as (server, service):
        names = set(os.listdir(folder))
        assert {"base", "n-0", "n-1", "n-2", "n-3"} <= names
        assert not [name for name in names if name.endswith("~removed")]
        # What was queued goes on, until another handle takes over.
        again = start(service, models, "job", take_over=True)
        # A rank that begins anew goes on with the chain, from the disk.
        step(again, 1)
        last = save(again, "after", type="delta")
        names = {n for n in os.listdir(folder) if not n.startswith(".")}
        rows = service.list_checkpoints("job")
        assert {row.name for row in rows} == names
        for row in rows[:5] + rows[-2:]:
            assert (
                service.verify_checkpoint(row.path).weight_id == row.weight_id
            )
        assert rows[-1].name == "after"
        assert last.parent == rows[-2].name
        assert save(again, "full").weight_id == last.weight_id
        service.verify_checkpoint(last.path)


def test_a_job_that_is_deleted_leaves_no_half_snapshot(new_client, service):
    client = new_client("llama")
    base = save(client, "base")
    folder = os.path.dirname(base.local_path)
    # As a rank leaves it that ends while it writes.
    half = os.path.join(folder, ".half~base.pending")
    os.makedirs(half)
    assert reason(service.delete_checkpoint, base.path) == (
        "SNAPSHOT_HAS_CHILDREN"
    )
    service.delete_job(client.job_id)
    assert not os.path.exists(half)
    service.delete_checkpoint(base.path)


def test_a_rank_that_is_killed_leaves_no_half_snapshot(models, tmp_path):
    with serving(tmp_path) as (server, service):
        client = start(service, models, "job", world_size=2)
        save(client, "base")
        saves = [
            client.save_weights_for_sampler(f"n-{n}", type="delta")
            for n in range(60)
        ]
        saves[2].result()
        os.kill(ranks_by_number(server.process.pid)[0], signal.SIGKILL)
        with pytest.raises(gradwire.GradwireError):
            saves[-1].result(60)
        for other in saves:
            with contextlib.suppress(gradwire.GradwireError):
                other.result(60)
        for row in service.list_checkpoints("job"):
            service.verify_checkpoint(row.path)
        service.restart_job("job")
        client = start(service, models, "job", world_size=2, take_over=True)
        save(client, "again", type="delta")
        # Also under a name that was being written.
        with contextlib.suppress(gradwire.GradwireError):
            save(client, "n-59", type="delta")
        for row in service.list_checkpoints("job"):
            service.verify_checkpoint(row.path)


def test_what_has_expired_goes_but_for_a_parent(models, tmp_path):
    with serving(tmp_path, "--collect_seconds=0.05") as (_, service):
        client = start(service, models, "job")
        save(client, "parent", ttl=0.001)
        with contextlib.suppress(gradwire.GradwireError):
            # It may be gone already.
            save(client, "child", type="delta", parent="parent")
        save(client, "p", ttl=3600)
        save(client, "c", type="delta", parent="p")
        service.set_checkpoint_ttl("jobs/job/snapshots/p", 3)
        save(client, "leaf", type="delta", parent="c", ttl=0.5)
        client.save_state("state", ttl=0.5).result()
        client.save_state("kept").result()

        def names():
            return {row.name for row in service.list_checkpoints("job")}

        until(lambda: not {"leaf", "state"} & names())
        p = service.get_checkpoint("jobs/job/snapshots/p")
        expiry = p.expire_time.ToDatetime()
        until(lambda: now(service, client) > expiry)
        assert {"p", "c", "kept"} <= names()
        assert ("parent" in names()) == ("child" in names())
        for row in service.list_checkpoints("job"):
            service.verify_checkpoint(row.path)
        service.delete_checkpoint("jobs/job/snapshots/c")
        until(lambda: "p" not in names())
        assert "kept" in names()


def test_when_something_expires_can_be_changed(models, tmp_path, monkeypatch):
    with serving(tmp_path) as (server, service):
        client = start(service, models, "job")
        long = save(client, "long", ttl=3600).path
        kept = save(client, "kept").path
        state = client.save_state("state", ttl=3600).result().path
        before = {path: service.get_checkpoint(path) for path in (long, state)}
        for path, ttl in ((long, None), (kept, 86400), (state, 7200.5)):
            row = service.set_checkpoint_ttl(path, ttl)
            assert row == service.get_checkpoint(path)
            assert row.HasField("expire_time") == (ttl is not None)
        for path, row in before.items():
            # Nothing else has changed, the time of its making least of all.
            now = service.get_checkpoint(path)
            now.expire_time.CopyFrom(row.expire_time)
            assert now == row
        want = {row.path: row for row in service.list_checkpoints("job")}
        assert len(want) == 3
        server.process.kill()
        server.process.wait()
    # A file's time is a matter of who has touched it.
    for path in (long, kept, state):
        folder = pathlib.Path(want[path].local_path)
        for file in folder.iterdir():
            os.utime(file, (1e9, 1e9))
        os.utime(folder, (1e9, 1e9))
    with serving(tmp_path, "--collect_seconds=0.1") as (server, service):
        rows = {row.path: row for row in service.list_checkpoints("job")}
        assert rows == want
        lives = (
            rows[state].expire_time.ToDatetime()
            - rows[state].create_time.ToDatetime()
        )
        assert lives.total_seconds() == 7200.5
        # What is taken from it goes at once, and nothing else does.
        for path in (kept, state):
            service.set_checkpoint_ttl(path, 1e-3)

        def names():
            return {row.name for row in service.list_checkpoints("job")}

        until(lambda: names() == {"long"})
        # The name is free, for one that stays.
        client = start(service, models, "job", take_over=True)
        again = service.get_checkpoint(client.save_state("state").result().path)
        assert not again.HasField("expire_time")
        assert again.create_time.ToDatetime() > (
            want[state].create_time.ToDatetime()
        )

        set_ttl = service.set_checkpoint_ttl
        assert reason(set_ttl, kept, 5) == "CHECKPOINT_NOT_FOUND"
        for wrong in (0, -1, float("nan"), 1e12):
            assert reason(set_ttl, long, wrong) == "OPTION_OUT_OF_RANGE"
        assert reason(set_ttl, "../x", 5) == "INVALID_NAME"
        monkeypatch.setenv("GRADWIRE_ADDRESS", server.address)
        assert cli.main(["checkpoint", "ttl", long, "90"]) == 0
        assert service.get_checkpoint(long).HasField("expire_time")
        assert cli.main(["checkpoint", "ttl", long, "never"]) == 0
        assert not service.get_checkpoint(long).HasField("expire_time")
        assert cli.main(["checkpoint", "ttl", long, "soon"]) != 0


def until(condition):
    """Asks the server again and again; it answers at its own pace."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline


_numbers = itertools.count()


def now(service, client):
    """The server's time, as a snapshot that it saves has it."""
    path = save(client, f"clock-{next(_numbers)}").path
    saved = service.get_checkpoint(path).create_time.ToDatetime()
    service.delete_checkpoint(path)
    return saved


def test_no_delta_loses_its_parent_to_a_deletion_beside_it(new_client, service):
    client = new_client("llama", precision="bf16")
    save(client, "s0")
    end = threading.Event()

    def delete_all():
        with gradwire.ServiceClient(address=service.address) as other:
            while not end.is_set():
                for row in other.list_checkpoints(client.job_id):
                    with contextlib.suppress(gradwire.GradwireError):
                        other.delete_checkpoint(row.path)

    thread = threading.Thread(target=delete_all)
    thread.start()
    made = lost = 0
    try:
        for number in range(1, 60):
            try:
                save(client, f"s{number}", type="auto")
                made += 1
            except gradwire.GradwireError as error:
                assert error.reason == "DELTA_PARENT_UNAVAILABLE"
                lost += 1
    finally:
        end.set()
        thread.join()
    assert made > 10
    for row in service.list_checkpoints(client.job_id):
        assert row.error.reason == ""
        service.verify_checkpoint(row.path)


def test_a_full_disk_is_said_and_loses_nothing(models, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted: not root")
    try:
        with serving(tmp_path) as (_, service):
            client = start(service, models, "job", world_size=2)
            names = []
            with pytest.raises(gradwire.GradwireError) as caught:
                for index in range(100):
                    save(client, f"n-{index}")
                    names.append(f"n-{index}")
            assert caught.value.reason == "STORAGE_FULL" and names
            folder = tmp_path / "jobs" / "job" / "snapshots"
            assert sorted(os.listdir(folder)) == sorted(names)
            found = reason(
                service.promote_checkpoint,
                f"jobs/job/snapshots/{names[0]}",
                "m",
            )
            assert found == "STORAGE_FULL"
            assert os.listdir(tmp_path / "models") == []
            # The job is there, and with some room it trains on.
            assert service.get_job("job").ready
            service.delete_checkpoint(f"jobs/job/snapshots/{names[0]}")
            step(client, 1)
            save(client, "room")
            rows = service.list_checkpoints("job")
            for row in rows:
                service.verify_checkpoint(row.path)
            assert rows[-1].name == "room"
    finally:
        subprocess.run(["umount", tmp_path], check=True)
