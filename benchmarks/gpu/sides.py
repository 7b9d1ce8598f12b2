# SPDX-License-Identifier: Apache-2.0
"""Both sides of the step benchmark as processes that answer commands."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile


class Side:
    """A program that reads commands and answers each with a JSON line."""

    def __init__(
        self, name: str, command: list[str], env: dict[str, str] | None = None
    ):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=env,
        )
        self.about = self.ask("describe")

    def ask(self, command: str) -> dict:
        assert self._process.stdin and self._process.stdout
        line = ""
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise SideEnded(
                f"{self.name} has ended in '{command.split()[0]}': "
                f"{self._errors.read()[-2000:]}"
            )
        return json.loads(line)

    def seconds(self, command: str) -> float:
        return self.ask(command)["seconds"]

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()


class SideEnded(Exception):
    """With the last of what the program said."""


def gradwire(
    binary: pathlib.Path,
    directory: pathlib.Path,
    sequences: int,
    length: int,
    precision: str,
    *more: str,
    keep: bool = True,
) -> Side:
    """All of the batch is one micro-batch, whose activations are kept.

    Unless `keep`: then the planner says how many layers keep theirs. more:
    further arguments of the program.
    """
    tokens = sequences * length
    return Side(
        "gradwire",
        [
            str(binary),
            f"--model={directory}",
            f"--precision={precision}",
            f"--sequences={sequences}",
            f"--length={length}",
            f"--micro_batch={tokens}",
            f"--max_context={length}",
            f"--retained_tokens={tokens if keep else 0}",
            *more,
        ],
        libraries(),
    )


def libraries() -> dict[str, str] | None:
    """The environment with what packed programs are linked with.

    PyTorch's process does not get it, since it might load others than its own.
    """
    path = os.environ.get("GRADWIRE_GPU_LIBRARIES")
    return os.environ | {"LD_LIBRARY_PATH": path} if path else None


def torch(
    way: str,
    model: str,
    directory: pathlib.Path,
    batch: pathlib.Path,
    shape: tuple[int, int],
    device: str,
) -> Side:
    """One way of torch_peer.py."""
    return Side(
        f"PyTorch ({way})",
        [
            sys.executable,
            str(pathlib.Path(__file__).parent / "torch_peer.py"),
            f"--way={way}",
            f"--model={model}",
            f"--directory={directory}",
            f"--batch={batch}",
            f"--sequences={shape[0]}",
            f"--length={shape[1]}",
            f"--device={device}",
        ],
    )
