# SPDX-License-Identifier: Apache-2.0
"""Processes of a server, and their ends, awaited without polling."""

import json
import os
import pathlib
import select
import subprocess
import threading

from gradwire.local_server import find_server


def ranks_of(pid):
    """The process ids of the ranks that `pid` has started."""
    found = set()
    for folder in pathlib.Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            name, fields = (folder / "stat").read_text().rsplit(")", 1)
        except OSError:  # it has ended meanwhile
            continue
        state, parent = fields.split()[:2]
        if int(parent) == pid and "rank" in name and state != "Z":
            found.add(int(folder.name))
    return found


def arguments_of(pid):
    line = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    return line.decode().split("\0")


def ranks_by_number(pid):
    """The ranks that `pid` has started, whatever program they are."""
    found = {}
    for folder in pathlib.Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) != pid or fields[0] == "Z":
                continue
            for argument in arguments_of(folder.name):
                if argument.startswith("--rank="):
                    rank = int(argument.removeprefix("--rank="))
                    found[rank] = int(folder.name)
        except OSError:  # it has ended meanwhile
            continue
    return found


class Watched:
    """A process that need not be a child."""

    def __init__(self, pid):
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def has_ended(self, seconds):
        """Waits for the end; False if it has not come by then."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def close(self):
        os.close(self._fd)


class Server:
    """gradwired with any flags; ready once it says where it serves.

    A job fails with its first rank, unless the flags say otherwise.
    """

    def __init__(self, state_dir, *flags, binary=None):
        port_file = pathlib.Path(state_dir) / "ports.json"
        self.process = subprocess.Popen(
            [
                binary or find_server(),
                f"--state_dir={state_dir}",
                f"--port_file={port_file}",
                "--listen=127.0.0.1:0",
                "--metrics_listen=127.0.0.1:0",
                "--threads=1",
                "--max_recoveries=0",
                *flags,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        while "serves on" not in (line := self.process.stdout.readline()):
            assert line, f"gradwired ended with {self.process.wait()}"
        # Its later lines must not fill the pipe.
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        ports = json.loads(port_file.read_text())
        self.address = ports["grpc"]
        self.metrics_address = ports["metrics"]
        self.rank_address = ports.get("rank")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
