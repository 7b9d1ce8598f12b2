# SPDX-License-Identifier: Apache-2.0
"""One life of a job: its server, its ranks, its client; their violent ends,
and an operator who starts again what has ended."""

import contextlib
import functools
import json
import multiprocessing
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import training_script
from gradwire.local_server import find_server

sys.path.append(str(pathlib.Path(__file__).parents[1] / "e2e"))
from processes import Watched, ranks_by_number  # noqa: E402

# Of waits that end early where all is well.
LONG = 60
# "restart" is an operator's SIGTERM, which is waited for; "preempted" one of a
# machine that is taken away, with SIGKILL when its grace is over. Others are
# SIGKILL.
KINDS = ("client", "rank", "supervisor", "all", "restart", "preempted")
# Seconds.
GRACES = (0, 0.001, 0.003, 0.01, 0.03, 0.1, 1, 5, 25)
# Clients are forked from a process that has imported what takes long.
_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(["torch", "gradwire"])


class Broken(AssertionError):
    """Something did not come back; says what the processes said last."""


def free_port():
    """A port below those that outgoing connections take, for it must still be
    free when its server is away."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with contextlib.closing(socket.socket()) as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


@functools.cache
def recovers(binary):
    """Whether this server rebuilds a job after a crash."""
    known = subprocess.run(
        [binary, "--help"], capture_output=True, text=True, check=False
    )
    return "auto_checkpoint_steps" in known.stdout


class Life:
    """`with` ends everything."""

    def __init__(self, folder, model, world_size, steps, binary="gradwired"):
        self.folder = pathlib.Path(folder)
        self.state = self.folder / "state"
        self.state.mkdir(parents=True)
        self.binary = find_server().with_name(binary)
        self._flags = []
        if recovers(self.binary):
            # So that there is more to recovery than a log.
            self._flags.append("--auto_checkpoint_steps=3")
        self.server = None
        self.client = None
        self.kills = []  # (kind, seconds to the next result)
        self.port = free_port()
        self._run = training_script.Run(
            address=f"127.0.0.1:{self.port}",
            model=str(model),
            world_size=world_size,
            steps=steps,
            journal=str(self.folder / "journal.jsonl"),
            log=str(self.folder / "client.log"),
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.client is not None:
            self.client.kill()
            self.client.join()
        if self.server is not None:
            self.server.kill()
            self.server.wait()

    def reach_server_through(self, port):
        """Of clients that start from now on."""
        self._run.address = f"127.0.0.1:{port}"

    def start_server(self, failpoint=""):
        """Starts it, if it is not running, and does not wait for it."""
        if self.server is not None and self.server.poll() is None:
            return
        environment = dict(os.environ)
        if failpoint:
            environment["GRADWIRE_FAILPOINT"] = failpoint
        with open(self.folder / "gradwired.log", "ab") as log:
            self.server = subprocess.Popen(
                [
                    self.binary,
                    f"--state_dir={self.state}",
                    f"--listen=127.0.0.1:{self.port}",
                    "--metrics_listen=127.0.0.1:0",
                    "--threads=1",
                    *self._flags,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def start_client(self):
        """Starts it, unless it is running or has come to its end."""
        if self.client is not None and self.client.exitcode in (None, 0):
            return
        self.client = _fork.Process(
            target=training_script.main, args=(self._run,), daemon=True
        )
        self.client.start()

    def kill(self, kind, rng):
        """Ends processes and waits for their end: the moment of it."""
        ranks = self.ranks(at_least=1 if kind == "rank" else 0)
        pids, orphans = [], []
        if kind == "rank":
            pids = [rng.choice(ranks)]
        elif kind == "all":
            pids = ranks
        elif kind != "client":
            orphans = ranks
        if kind in ("client", "all"):
            pids.append(self.client.pid)
        if kind in ("supervisor", "all", "restart", "preempted"):
            pids.append(self.server.pid)
        stops = kind in ("restart", "preempted")
        number = signal.SIGTERM if stops else signal.SIGKILL
        with contextlib.ExitStack() as stack:
            ending = []
            for pid in pids + orphans:
                with contextlib.suppress(ProcessLookupError):
                    ending.append(stack.enter_context(Watched(pid)))
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if kind == "preempted":
                with Watched(self.server.pid) as server:
                    if not server.has_ended(rng.choice(GRACES)):
                        self.server.kill()
            for process in ending:
                if not process.has_ended(LONG):
                    told = f"process {process.pid} outlives the end of {kind}"
                    raise Broken(self.tell(told))
        if kind in ("client", "all"):
            self.client.join()
        return time.monotonic()

    def ranks(self, at_least):
        end = time.monotonic() + LONG
        while True:
            found = sorted(ranks_by_number(self.server.pid).values())
            if len(found) >= at_least:
                return found
            self.check(end, "no rank is there to be killed")
            time.sleep(0.01)

    def entries(self):
        """What the clients have written down so far."""
        journal = pathlib.Path(self._run.journal)
        text = journal.read_text() if journal.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def next_result(self, moment):
        """When the first result after the moment came; None if the run ended
        without one."""
        end = time.monotonic() + LONG
        while True:
            ended = not self.client.is_alive()
            times = [
                e["t"]
                for e in self.entries()
                if e["t"] > moment and e["name"] != "begin"
            ]
            if times:
                return min(times)
            if ended:
                return None
            self.check(end, "no result came")
            time.sleep(0.005)

    def check(self, end, what):
        """Fails if time is up, or if a process has ended by itself."""
        if self.client is not None and self.client.exitcode not in (
            None,
            0,
            -signal.SIGKILL,
        ):
            raise Broken(self.tell("the script failed"))
        if self.server.poll() not in (None, -signal.SIGKILL):
            raise Broken(self.tell("the server ended"))
        if time.monotonic() > end:
            raise Broken(self.tell(f"{what} within {LONG} s"))

    def wait_for_death(self):
        """Waits for the end of a server that kills itself."""
        end = time.monotonic() + LONG
        while self.server.poll() is None:
            if not self.client.is_alive():
                raise Broken(self.tell("the run ended, the server did not"))
            self.check(end, "the server did not come to its failpoint")
            time.sleep(0.005)

    def finish(self):
        """Waits for the end of the script."""
        end = time.monotonic() + LONG
        while self.client.is_alive():
            self.check(end, "the script did not end")
            self.client.join(0.05)
        if self.client.exitcode != 0:
            raise Broken(self.tell("the script failed"))

    def tell(self, what):
        lines = [what]
        for name in ("client.log", "gradwired.log"):
            path = self.folder / name
            if path.exists():
                last = path.read_text(errors="replace").splitlines()[-15:]
                lines += [f"--- {name}", *last]
        return "\n".join(lines)

    def files(self):
        """What the run has saved: name -> bytes."""
        job = self.state / "jobs" / training_script.JOB
        found = {}
        for folder, pattern in (("snapshots", "*"), ("checkpoints", "*.data")):
            for path in sorted((job / folder).glob(f"*/{pattern}")):
                if path.name == "snapshot.json":  # when, and by which call
                    continue
                found[str(path.relative_to(job))] = path.read_bytes()
        return found
