# SPDX-License-Identifier: Apache-2.0
"""Bases whose weights are in several files, as others read and write them."""

import json
import os
import pathlib
import subprocess
import sys

import huggingface_hub
import oracle
import pytest
import torch
from conftest import sequences
from gradwire.local_server import find_server
from safetensors import safe_open
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

INDEX = "model.safetensors.index.json"
# The tiny model takes several files.
SHARD_BYTES = 20_000
SHARD_FLAG = f"--snapshot_shard_bytes={SHARD_BYTES}"


def shards_of(result):
    names = sorted(os.listdir(result.local_path))
    return [name for name in names if name.endswith(".safetensors")]


def files_of(result):
    """All but what says when it was made, and of what."""
    return {
        name: content(result, name)
        for name in os.listdir(result.local_path)
        if name != "snapshot.json"
    }


def read_shards(result):
    """The tensors, in the order of the files, by the safetensors package."""
    tensors = {}
    for name in shards_of(result):
        with safe_open(pathlib.Path(result.local_path) / name, "pt") as file:
            for key in file.offset_keys():
                assert key not in tensors
                tensors[key] = file.get_tensor(key)
    return tensors


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_large_base_is_in_shards_that_others_read(
    models, tmp_path, world_size
):
    with serving(tmp_path, SHARD_FLAG) as (_, service):
        client = service.create_training_client(
            models["llama"], precision="f32", world_size=world_size
        )
        step(client, 1, learning_rate=1e-3)
        base = save(client, "base")
        data = sequences(VOCAB, (20, 9, 30))
        served = client.forward(data).result().logprobs
        row = service.verify_checkpoint(base.path)
    names = shards_of(base)
    assert len(names) > 3
    assert names == [
        f"model-{i + 1:05}-of-{len(names):05}.safetensors"
        for i in range(len(names))
    ]
    digests = "".join(dlt1.xxh128(content(base, n)).hex() for n in names)
    assert base.digest == dlt1.xxh128(digests.encode()).hex()
    assert base.bytes == sum(len(content(base, name)) for name in names)
    listed = {file.name: file for file in row.files}
    assert set(listed) == set(files_of(base))
    for name, data_ in files_of(base).items():
        assert listed[name].digest == dlt1.xxh128(data_).hex()

    # The index says what the files hold, as huggingface_hub would split them.
    tensors = read_shards(base)
    index = json.loads(content(base, INDEX))
    split_by_them = huggingface_hub.split_torch_state_dict_into_shards(
        tensors,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    assert index["weight_map"] == split_by_them.tensor_to_filename
    assert (
        index["metadata"]["total_size"] == split_by_them.metadata["total_size"]
    )
    # And in their words.
    model = oracle.load(base.local_path).float()
    theirs = tmp_path / "theirs"
    model.save_pretrained(theirs, max_shard_size=SHARD_BYTES)
    written = json.loads((theirs / INDEX).read_text())
    assert written["metadata"] == index["metadata"]
    assert set(written["weight_map"]) == set(index["weight_map"])
    assert (
        json.dumps(index, indent=2, sort_keys=True) + "\n"
        == content(base, INDEX).decode()
    )

    # transformers finds the weights that the server computes with.
    state = model.state_dict()
    assert set(state) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor), name

    def compute(judge):
        with torch.no_grad():
            found = [oracle.logprobs(judge, datum) for datum in data]
        return {str(i): values for i, values in enumerate(found)}

    exact, tolerance = oracle.with_tolerance(model.double(), compute)
    found = {str(i): values for i, values in enumerate(served)}
    assert oracle.worst_of(found, exact, tolerance) == {}


def test_deltas_to_shards_are_a_base_byte_for_byte(models, tmp_path):
    with serving(tmp_path, SHARD_FLAG) as (_, service):
        client = start(service, models, "job")
        base = save(client, "s0")
        weights = {
            name: bytes(tensor.contiguous().view(torch.uint8).numpy())
            for name, tensor in read_shards(base).items()
        }
        for number in range(1, 4):
            step(client, number)
            delta = save(client, f"s{number}", type="delta")
            file = content(delta, "delta.safetensors")
            weights = dlt1.apply(file, weights)[1]
        full = save(client, "full")
        assert len(shards_of(full)) > 3
        assert full.weight_id == delta.weight_id
        for name, tensor in read_shards(full).items():
            as_saved = tensor.contiguous().view(torch.uint8).numpy()
            assert bytes(as_saved) == weights[name], name
        model = service.promote_checkpoint(delta.path, "in-shards")
        assert files_of(model) == files_of(full)
        assert model.weight_id == full.weight_id
        diff = service.diff_checkpoints(base.path, delta.path)
        assert 0 < diff.changed < diff.elements
        assert diff.full_bytes == base.bytes
        assert not service.diff_checkpoints(full.path, delta.path).changed
        # A job on the shards has the same weights.
        other = start_on(service, model, "other")
        assert save(other, "first").weight_id == full.weight_id
    # A server with another limit reads them, and goes on.
    with serving(tmp_path) as (_, service):
        client = start(service, models, "job", take_over=True)
        for path in (base.path, delta.path, full.path):
            service.verify_checkpoint(path)
        whole = save(client, "whole")
        assert shards_of(whole) == ["model.safetensors"]
        assert whole.weight_id == full.weight_id
        one = service.promote_checkpoint(delta.path, "in-one")
        assert files_of(one) == files_of(whole)
        step(client, 9)
        last = save(client, "last", type="delta", parent="full")
        assert last.parent == "full"
        assert service.verify_checkpoint(last.path).weight_id == last.weight_id
        service.delete_checkpoint(last.path)
        service.delete_checkpoint(full.path)
        assert not os.path.exists(full.local_path)


def start_on(service, model, job):
    return service.create_training_client(
        model.local_path, job_id=job, precision="bf16"
    )


def test_shards_that_are_not_as_saved_are_refused(models, tmp_path):
    with serving(tmp_path, SHARD_FLAG) as (_, service):
        client = start(service, models, "job")
        base = save(client, "base")
        step(client, 1)
        delta = save(client, "delta", type="delta")
        folder = pathlib.Path(base.local_path)
        first, second, *_ = shards_of(base)
        good = files_of(base)

        def refused():
            found = reason(service.verify_checkpoint, base.path)
            assert found == "CHECKPOINT_CORRUPT"
            for call in (
                lambda: service.verify_checkpoint(delta.path),
                lambda: service.promote_checkpoint(delta.path, "model"),
                lambda: service.diff_checkpoints(base.path, delta.path),
            ):
                assert reason(call) == "CHECKPOINT_CORRUPT"
            found = reason(client.save_weights_for_sampler, "x", type="delta")
            assert found == "DELTA_PARENT_UNAVAILABLE"
            for name in set(os.listdir(folder)) - set(good):
                if name != "snapshot.json":
                    (folder / name).unlink()
            for name, data in good.items():
                (folder / name).write_bytes(data)
            service.verify_checkpoint(delta.path)

        for name in (first, second, INDEX):
            damage(base, name)
            refused()
            (folder / name).write_bytes(good[name][:-1])
            refused()
            (folder / name).unlink()
            refused()
        (folder / first).write_bytes(good[second])
        (folder / second).write_bytes(good[first])
        refused()
        # transformers would take it for the weights.
        (folder / "model.safetensors").write_bytes(good[first])
        refused()
        # What auto does then.
        damage(base, second)
        last = save(client, "auto", type="auto")
        assert last.type == "base" and "CHECKPOINT_CORRUPT" in last.reason


@pytest.mark.parametrize("value", ["0", "-1", "1000000000000001", "5GB"])
def test_a_size_of_shards_that_cannot_be_meant_is_refused(tmp_path, value):
    done = subprocess.run(
        [
            find_server(),
            f"--state_dir={tmp_path}",
            "--listen=127.0.0.1:0",
            "--metrics_listen=127.0.0.1:0",
            f"--snapshot_shard_bytes={value}",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    said = done.stdout + done.stderr
    assert "snapshot_shard_bytes" in said
    assert value == "5GB" or "from 1 to 1e+15" in said
