# SPDX-License-Identifier: Apache-2.0
"""Ranks on several hosts, started by somebody else: network namespaces, whose
links can be cut."""

import contextlib
import json
import os
import pathlib
import subprocess
import time

import pytest
from conftest import MODELS
from gradwire.local_server import find_server
from hosts import Driver, Hosts

VOCAB = MODELS["llama"][1]["vocab_size"]
TOKEN = "0123456789abcdef0123456789abcdef"
# Seconds after which a silent rank is hung, and a peer no longer waited for.
TIMEOUT = 3


class Cluster:
    """A server on host 0, and ranks wherever they are started."""

    def __init__(self, hosts, folder):
        self.hosts = hosts
        self._folder = pathlib.Path(folder)
        self._token = self._folder / "join.token"
        self._token.write_text(TOKEN)
        self._token.chmod(0o600)
        self.ranks = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        ports = self._folder / "ports.json"
        self.server = self.hosts.start(
            0,
            find_server(),
            f"--state_dir={self._folder / 'state'}",
            f"--port_file={ports}",
            "--listen=127.0.0.1:0",
            "--metrics_listen=127.0.0.1:0",
            "--launch=external",
            f"--rank_listen={self.hosts.address(0)}:0",
            "--rank_insecure",
            f"--join_token_file={self._token}",
            f"--rank_timeout_seconds={TIMEOUT}",
            f"--collective_timeout_seconds={TIMEOUT}",
            "--max_recoveries=0",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        while "serves on" not in (line := self.server.stdout.readline()):
            assert line, f"gradwired ended with {self.server.wait()}"
        found = json.loads(ports.read_text())
        self._rank_address = found["rank"]
        self.driver = self._stack.enter_context(
            Driver(self.hosts, 0, found["grpc"])
        )
        return self

    def __exit__(self, *_):
        self._stack.close()
        self.server.terminate()
        self.server.stdout.read()
        self.server.wait()
        for process in self.ranks.values():
            process.kill()
            process.wait()

    def start_ranks(self, job, world_size, blind=()):
        """`blind` ones do not see the server's state directory."""
        for rank in range(world_size):
            hide = f"mount -t tmpfs none {self._folder / 'state'}"
            apart = ["unshare", "-m", "sh", "-c", f'{hide} && exec "$0" "$@"']
            self.ranks[rank] = self.hosts.start(
                rank % self.hosts.count,
                *(apart if rank in blind else ()),
                find_server().with_name("gradwire_rank"),
                f"--supervisor={self._rank_address}",
                f"--job_id={job}",
                f"--rank={rank}",
                f"--world_size={world_size}",
                f"--join_token_file={self._token}",
                "--rank_insecure",
                "--threads=1",
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def await_ends(self):
        for process in self.ranks.values():
            process.wait(TIMEOUT + 30)


def start_and_train(cluster, models, count):
    """Three steps of a new job's; the losses."""
    # Ranks may come before their job.
    cluster.start_ranks("job", count)
    cluster.driver.ask(
        "start",
        job="job",
        base_model=str(models["llama"]),
        precision="f32",
        world_size=count,
    )
    assert cluster.driver.ask("settle", job="job")["ready"]
    losses = cluster.driver.ask("train", job="job", vocab=VOCAB, steps=3)
    assert losses[2] < losses[0]
    return losses


def fail_in_a_step(cluster, cut):
    """The state of the job whose network `cut` breaks in the middle of a long
    run of steps."""
    cluster.driver.tell("train", job="job", vocab=VOCAB, steps=1_000_000)
    time.sleep(0.5)
    cut()
    began = time.monotonic()
    failed = cluster.driver.answer()
    assert time.monotonic() - began < 2 * TIMEOUT + 5
    reasons = ("RANK_HUNG", "COLLECTIVE_TIMEOUT")
    assert failed["error"] in (*reasons, "RANK_LOST", "JOB_FAILED")
    state = cluster.driver.ask("failed", job="job")
    assert state["reason"] in reasons
    return state


def start_again(cluster, count):
    """By the operator and by the scheduler; the losses of three more steps."""
    cluster.await_ends()
    cluster.driver.ask("restart", job="job")
    cluster.start_ranks("job", count)
    assert cluster.driver.ask("settle", job="job")["ready"]
    losses = cluster.driver.ask("train", job="job", vocab=VOCAB, steps=3)
    cluster.driver.ask("delete", job="job")
    cluster.await_ends()
    return losses


@pytest.mark.parametrize("count", [2, 3])
def test_hosts_train_and_a_cut_link_ends_in_a_clear_state(
    tmp_path, models, count
):
    with Hosts(count) as hosts, Cluster(hosts, tmp_path) as cluster:
        first = start_and_train(cluster, models, count)
        state = fail_in_a_step(
            cluster, lambda: hosts.set_link(count - 1, up=False)
        )
        assert state["metadata"]["rank"] == str(count - 1)
        hosts.set_link(count - 1, up=True)
        # It goes on where it was, below where it began.
        assert max(start_again(cluster, count)) < first[0]


# Networks are the same to a sanitizer, and take their time.
@pytest.mark.skipif(
    "GRADWIRE_SANITIZED" in os.environ, reason="run without sanitizers"
)
# From and to; the server and rank 0 are on host 0. Between two hosts nobody can
# tell which is to blame.
@pytest.mark.parametrize("sender, receiver", [(1, 0), (0, 1), (1, 2)])
def test_what_one_host_sends_another_is_lost(
    tmp_path, models, sender, receiver
):
    with Hosts(3) as hosts, Cluster(hosts, tmp_path) as cluster:
        first = start_and_train(cluster, models, 3)
        state = fail_in_a_step(
            cluster, lambda: hosts.set_path(sender, receiver, up=False)
        )
        assert int(state["metadata"]["rank"]) in (sender, receiver)
        hosts.set_path(sender, receiver, up=True)
        assert max(start_again(cluster, 3)) < first[0]


def test_a_state_directory_that_is_not_shared_is_said(tmp_path, models):
    with Hosts(2) as hosts, Cluster(hosts, tmp_path) as cluster:
        driver = cluster.driver
        cluster.start_ranks("job", 2)
        start = {"base_model": str(models["llama"]), "precision": "f32"}
        driver.ask("start", job="job", world_size=2, **start)
        assert driver.ask("settle", job="job")["ready"]
        saved = driver.ask("save", job="job", name="shared")
        assert saved["path"].endswith("jobs/job/checkpoints/shared")
        driver.ask("delete", job="job")
        cluster.await_ends()

        cluster.start_ranks("apart", 2, blind=[1])
        driver.ask("start", job="apart", world_size=2, **start)
        assert driver.ask("settle", job="apart")["ready"]
        for call in (
            {"call": "save", "name": "mine"},
            {"call": "load", "path": saved["path"]},
        ):
            failed = driver.ask(call.pop("call"), job="apart", **call)
            assert failed["error"] == "STATE_DIRECTORY_NOT_SHARED"
            assert failed["metadata"]["value"] == "1"
        # Nothing is left of it, and the job trains on.
        folder = tmp_path / "state" / "jobs" / "apart" / "checkpoints"
        assert list(folder.iterdir()) == []
        assert len(driver.ask("train", job="apart", vocab=VOCAB, steps=2)) == 2
        driver.ask("delete", job="apart")
        cluster.await_ends()
