# SPDX-License-Identifier: Apache-2.0
"""A server of one's own, for the life of a `with` block."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
from typing import Any

from gradwire.errors import ServerError, UserError

_START_SECONDS = 60.0
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.02


def find_server() -> pathlib.Path:
    """gradwired of GRADWIRE_BIN_DIR, of PATH, or of this source tree."""
    folder = os.environ.get("GRADWIRE_BIN_DIR")
    tree = pathlib.Path(__file__).resolve().parents[3]
    built = tree / "bazel-bin" / "server" / "gradwired"
    if folder:
        candidate = pathlib.Path(folder) / "gradwired"
        if candidate.is_file():
            return candidate
    else:
        found = shutil.which("gradwired")
        if found:
            return pathlib.Path(found)
        if built.is_file():
            return built
    raise UserError(
        "gradwired was not found; build it with `bazel build "
        "//server:gradwired //server:gradwire_rank`, or set GRADWIRE_BIN_DIR "
        "to its folder",
        reason="SERVER_NOT_FOUND",
    )


class LocalServer:
    """Starts gradwired on free ports; `with` waits until it serves.

    state_dir: kept if it is given, else a temporary folder.
    threads: of each rank; None means the server's default.
    """

    def __init__(
        self,
        state_dir: str | os.PathLike[str] | None = None,
        threads: int | None = None,
    ):
        self._state_dir = None if state_dir is None else pathlib.Path(state_dir)
        self._threads = threads
        self._own: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.address = ""
        self.metrics_address = ""

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server has not been started"
        return self._process.pid

    @property
    def state_dir(self) -> pathlib.Path:
        assert self._state_dir is not None, "the server has not been started"
        return self._state_dir

    def start(self) -> LocalServer:
        binary = find_server()
        if self._state_dir is None:
            self._own = tempfile.TemporaryDirectory(prefix="gradwire-")
            self._state_dir = pathlib.Path(self._own.name)
        self._state_dir.mkdir(parents=True, exist_ok=True)
        port_file = self._state_dir / "ports.json"
        port_file.unlink(missing_ok=True)
        log = self._state_dir / "gradwired.log"
        command = [
            str(binary),
            f"--state_dir={self._state_dir}",
            "--listen=127.0.0.1:0",
            "--metrics_listen=127.0.0.1:0",
            f"--port_file={port_file}",
        ]
        if self._threads is not None:
            command.append(f"--threads={self._threads}")
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the caller, who ends the server in turn.
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        try:
            while not port_file.exists():
                status = self._process.poll()
                if status is not None or time.monotonic() > deadline:
                    what = (
                        f"ended with status {status}"
                        if status is not None
                        else f"did not serve within {_START_SECONDS:.0f} s"
                    )
                    lines = log.read_text(errors="replace").splitlines()
                    last = lines[-1] if lines else "it wrote nothing"
                    raise ServerError(
                        f"gradwired {what}: {last}",
                        reason="SERVER_NOT_STARTED",
                    )
                time.sleep(_POLL_SECONDS)
            ports = json.loads(port_file.read_text(encoding="utf-8"))
        except BaseException:
            self.stop()
            raise
        self.address = ports["grpc"]
        self.metrics_address = ports["metrics"]
        return self

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._own is not None:
            self._own.cleanup()
            self._own = None

    def __enter__(self) -> LocalServer:
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.stop()
