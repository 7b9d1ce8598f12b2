# SPDX-License-Identifier: Apache-2.0
"""A user's training run, as a process that can be killed anywhere and started
again: it goes on from the step that the server names.

Whatever a step computes follows from its number. Each result becomes a line of
a journal, in a form in which equal means equal in every bit.
"""

import collections
import dataclasses
import hashlib
import json
import os
import sys
import time

import gradwire
import numpy as np
import torch

# Steps that are under way at once.
_DEPTH = 2
_VOCAB = 97
_SAVE_EVERY = 4
_BEST = "best"
_EXISTS = ("CHECKPOINT_EXISTS", "SNAPSHOT_EXISTS")
JOB = "run"


@dataclasses.dataclass
class Run:
    address: str
    model: str
    world_size: int
    steps: int
    journal: str
    log: str


def main(run):
    """The target of the process; its standard error goes to the log."""
    log = os.open(run.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    try:
        train(run)
    except BaseException as error:
        print(f"the script failed: {error!r}", file=sys.stderr, flush=True)
        raise


def train(run):
    journal = Journal(run.journal)
    with gradwire.ServiceClient(address=run.address) as service:
        wait_for(service)
        client = service.create_training_client(
            run.model,
            job_id=JOB,
            precision="f32",
            world_size=run.world_size,
            take_over=True,
        )
        begin = client.info().optimizer_step
        journal.write("begin", begin, {})
        pending = collections.deque()
        for step in range(begin, run.steps):
            pending.append((step, submit(client, step)))
            if len(pending) == _DEPTH:
                journal.read(*pending.popleft())
        while pending:
            journal.read(*pending.popleft())
        journal.read(run.steps, saves(client, "final"))


def wait_for(service):
    """This process may begin while the server is away."""
    while True:
        try:
            return service.get_server_info()
        except gradwire.UnreachableError:
            time.sleep(0.05)


def submit(client, step):
    """The calls of a step, by name; nothing is waited for."""
    calls = {}
    if step % _SAVE_EVERY == 0:
        calls.update(saves(client, str(step)))
        calls["best"] = client.save_state(_BEST, overwrite=True)
    if step == _SAVE_EVERY:
        # It is replaced later, whereas this is run again.
        calls["load"] = client.load_state_with_optimizer(_BEST)
    data = batch(step)
    calls["scores"] = client.forward(data[:2], top_k=5)
    if step % 3 == 1:
        calls["dropped"] = client.forward_backward(data, "cross_entropy")
        calls["zero"] = client.zero_grad()
    calls["first"] = client.forward_backward(data[:3], "cross_entropy")
    calls["second"] = client.forward_backward_custom(data[1:], loss)
    calls["update"] = client.optim_step(
        gradwire.AdamParams(
            learning_rate=1e-2 / (1 + step),
            weight_decay=0.1,
            grad_clip_norm=0.5,
        )
    )
    return calls


def saves(client, name):
    return {
        "state": client.save_state(f"state-{name}"),
        "weights": client.save_weights_for_sampler(f"weights-{name}"),
    }


def batch(step):
    rng = np.random.default_rng(step)
    return [
        gradwire.Datum.from_tokens(rng.integers(_VOCAB, size=n))
        for n in rng.integers(2, 24, size=5)
    ]


def loss(data, logprobs):
    total = sum((torch.exp(lp / 4) - lp).sum() for lp in logprobs)
    return total**2 / 100, {"total:mean": float(total.detach())}


class Journal:
    """One line a result, written at once: it is whole or absent."""

    def __init__(self, path):
        self._file = os.open(
            path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644
        )

    def write(self, name, step, value):
        entry = {"t": time.monotonic(), "step": step, "name": name, **value}
        os.write(self._file, json.dumps(entry).encode() + b"\n")

    def read(self, step, calls):
        """Waits for the calls' results and writes them down."""
        for name, future in calls.items():
            try:
                value = {"value": exact(future.result())}
            except gradwire.GradwireError as error:
                # An earlier process got this far.
                if error.reason not in _EXISTS:
                    raise
                value = {"exists": True}
            self.write(name, step, value)


def exact(value):
    """A result as what JSON can hold, without a loss of bits."""
    if isinstance(value, np.ndarray):
        return [
            str(value.dtype),
            list(value.shape),
            hashlib.sha256(value.tobytes()).hexdigest(),
        ]
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, list):
        return [exact(item) for item in value]
    if isinstance(value, dict):
        return {key: exact(item) for key, item in sorted(value.items())}
    if dataclasses.is_dataclass(value):
        fields = {f.name for f in dataclasses.fields(value)}
        # Where it lies, and how it came about, are not what it is.
        fields -= {"local_path", "reason", "recomputed"}
        return {name: exact(getattr(value, name)) for name in sorted(fields)}
    return value
