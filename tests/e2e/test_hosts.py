# SPDX-License-Identifier: Apache-2.0
"""Ranks on several hosts, started by somebody else: network namespaces, whose
links can be cut."""

import contextlib
import json
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

    def start_ranks(self, job, world_size):
        for rank in range(world_size):
            self.ranks[rank] = self.hosts.start(
                rank % self.hosts.count,
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


@pytest.mark.parametrize("count", [2, 3])
def test_hosts_train_and_a_cut_link_ends_in_a_clear_state(
    tmp_path, models, count
):
    with Hosts(count) as hosts, Cluster(hosts, tmp_path) as cluster:
        driver = cluster.driver
        # Ranks may come before their job.
        cluster.start_ranks("job", count)
        driver.ask(
            "start",
            job="job",
            base_model=str(models["llama"]),
            precision="f32",
            world_size=count,
        )
        assert driver.ask("settle", job="job")["ready"]
        first = driver.ask("train", job="job", vocab=VOCAB, steps=3)
        assert first[2] < first[0]

        # In the middle of a long run of steps.
        driver.tell("train", job="job", vocab=VOCAB, steps=1_000_000)
        time.sleep(0.5)
        hosts.set_link(count - 1, up=False)
        began = time.monotonic()
        failed = driver.answer()
        assert time.monotonic() - began < 2 * TIMEOUT + 5
        assert failed["error"] in ("RANK_HUNG", "RANK_LOST", "JOB_FAILED")
        state = driver.ask("failed", job="job")
        assert state["reason"] in ("RANK_HUNG", "COLLECTIVE_TIMEOUT")
        assert state["metadata"]["rank"] == str(count - 1)
        hosts.set_link(count - 1, up=True)
        cluster.await_ends()

        # Started again, by the operator and by the scheduler.
        driver.ask("restart", job="job")
        cluster.start_ranks("job", count)
        assert driver.ask("settle", job="job")["ready"]
        again = driver.ask("train", job="job", vocab=VOCAB, steps=3)
        assert again == first
        driver.ask("delete", job="job")
        cluster.await_ends()
