# SPDX-License-Identifier: Apache-2.0
"""A server that has lost its state directory to another one, and does not know:
it was stopped, and the lock went with the network that the disk is on."""

import contextlib
import os
import pathlib
import signal
import time

import gradwire
import pytest
from processes import Server, ranks_of
from snapshot_calls import reason, save, start, step

JOBS = ("state", "overwrite", "snapshot", "delta", "step")


@contextlib.contextmanager
def stopped(server):
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


def names_under(state_dir):
    """Of all that could be mistaken for something of a client's, hidden ones
    included; recovery's own come and go."""
    return sorted(
        str(path.relative_to(state_dir))
        for folder in ("checkpoints", "snapshots", "models")
        for path in [
            *state_dir.glob(f"jobs/*/{folder}/*"),
            *state_dir.glob(f"{folder}/*"),
        ]
    )


@pytest.fixture
def taken_over(models, tmp_path):
    """(the old server's service, its jobs' clients, the new one's service)"""
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(Server(tmp_path, "--collect_seconds=0.1"))
        # It must not take the new one's ports.
        service = gradwire.ServiceClient(address=old.address)
        clients = {}
        for job in JOBS:
            clients[job] = start(service, models, job)
            step(clients[job], 1)
            clients[job].save_state("kept").result()
            save(clients[job], "base")
        with stopped(old):
            # As on a file system that forgot it.
            os.unlink(tmp_path / "LOCK")
            new = stack.enter_context(
                Server(tmp_path, "--max_recoveries=5", "--collect_seconds=3600")
            )
            successor = gradwire.ServiceClient(address=new.address)
            for job in JOBS:
                next(each for each in successor.watch_job(job) if each.ready)
            # From here on they have expired, and both know.
            successor.set_checkpoint_ttl("jobs/step/checkpoints/kept", 1e-3)
            successor.set_checkpoint_ttl("jobs/step/snapshots/base", 1e-3)
        yield service, clients, successor, (old, new)
        for each in (service, successor):
            with contextlib.suppress(gradwire.GradwireError):
                each.close(wait=False)


def test_a_server_that_was_taken_over_changes_nothing(
    taken_over, models, tmp_path
):
    service, clients, successor, servers = taken_over
    before = names_under(tmp_path)
    digests = {row.path: row.digest for row in successor.list_checkpoints()}
    assert len(digests) == 2 * len(JOBS)
    fenced = {
        "state": lambda client: client.save_state("new"),
        "overwrite": lambda client: client.save_state("kept", overwrite=True),
        "snapshot": lambda client: client.save_weights_for_sampler("new"),
        "delta": lambda client: client.save_weights_for_sampler(
            "new", type="delta"
        ),
        "step": lambda client: client.optim_step(gradwire.AdamParams()),
    }
    for job, call in fenced.items():
        assert reason(call, clients[job]) == "EPOCH_FENCED", job
    kept = "jobs/state/checkpoints/kept"
    base = "jobs/state/snapshots/base"
    for call in (
        lambda: service.delete_checkpoint(kept),
        lambda: service.delete_checkpoint(base),
        lambda: service.promote_checkpoint(base, "model"),
        lambda: service.set_checkpoint_ttl(kept, 5),
        lambda: service.delete_job("state"),
    ):
        assert reason(call) == "EPOCH_FENCED"
    # Time for what it would do by itself.
    time.sleep(0.5)
    assert names_under(tmp_path) == before
    assert digests == {
        row.path: row.digest for row in successor.list_checkpoints()
    }
    # The new one is not disturbed.
    for job in JOBS:
        info = successor.get_job(job)
        assert info.ready and info.optimizer_step == 1
        for kind in ("checkpoints/kept", "snapshots/base"):
            successor.verify_checkpoint(f"jobs/{job}/{kind}")
    trained = [start(successor, models, job, take_over=True) for job in JOBS]
    for client in trained:
        step(client, 2)
    # Nor is it when the old one ends: its ranks still reach it.
    old, new = servers
    old.process.terminate()
    old.process.wait()
    for rank in ranks_of(new.process.pid):
        os.kill(rank, signal.SIGKILL)
    for client in trained:
        step(client, 3)
    assert successor.promote_checkpoint(base, "model").bytes > 0
    successor.delete_checkpoint(kept)
    assert not pathlib.Path(tmp_path / kept).exists()
    new.process.terminate()
    new.process.wait()
    # What the old one has appended to the logs is none of them.
    with (
        Server(tmp_path) as third,
        gradwire.ServiceClient(address=third.address) as last,
    ):
        for job in JOBS:
            states = last.watch_job(job)
            info = next(x for x in states if x.ready or x.error.reason)
            assert info.ready and info.optimizer_step == 3, info
