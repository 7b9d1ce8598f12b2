# SPDX-License-Identifier: Apache-2.0
"""What the tests of snapshots ask of a server and of files."""

import contextlib
import pathlib

import gradwire
import pytest
from conftest import MODELS, sequences
from processes import Server

VOCAB = MODELS["llama"][1]["vocab_size"]


def step(client, number, learning_rate=1e-4):
    data = sequences(VOCAB, (9, 12), seed=number)
    client.forward_backward(data, "cross_entropy")
    client.optim_step(gradwire.AdamParams(learning_rate=learning_rate)).result()


def save(client, name, **options):
    return client.save_weights_for_sampler(name, **options).result(60)


def reason(call, *arguments, **options):
    with pytest.raises(gradwire.GradwireError) as caught:
        result = call(*arguments, **options)
        if isinstance(result, gradwire.Future):
            result.result(60)
    return caught.value.reason


def content(result, name="model.safetensors"):
    return (pathlib.Path(result.local_path) / name).read_bytes()


def damage(result, name, at=None):
    path = pathlib.Path(result.local_path) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 16
    path.write_bytes(data)


@contextlib.contextmanager
def serving(state_dir, *flags):
    with Server(state_dir, *flags) as server:
        service = gradwire.ServiceClient(address=server.address)
        yield server, service
        # Not all calls were meant to succeed.
        with contextlib.suppress(gradwire.GradwireError):
            service.close(wait=False)


def start(service, models, job, **options):
    return service.create_training_client(
        str(models["llama"]), job_id=job, precision="bf16", **options
    )
