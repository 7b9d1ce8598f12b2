# SPDX-License-Identifier: Apache-2.0
"""A server whose file calls are counted, and one of which fails."""

import ctypes
import json
import mmap
import os
import pathlib
import signal
import subprocess
import sys
import time

import grpc
from gradwire._proto.gradwire.v1 import (
    checkpoints_pb2_grpc,
    jobs_pb2_grpc,
    operations_pb2_grpc,
    sessions_pb2_grpc,
    training_pb2_grpc,
)
from gradwire.local_server import find_server

sys.path.append(str(pathlib.Path(__file__).parents[1] / "e2e"))
import calls  # noqa: E402

# In the order of fault_shim.cc.
FAULTS = ("kill", "kill_after", "full", "error", "short", "no_input")
KILLS = FAULTS[:2]
# The status after SIGTERM: there are jobs that the next server goes on with, or
# none.
STOPPED = (143, 0)
# Of whatever is waited for; all of it takes a second or two.
PATIENCE = 60
SHIM = "libfault_shim.so"


class Broken(AssertionError):
    """A promise that was not kept."""


def find_shim():
    """The library to preload, beside the server or in the build; or None."""
    folder = find_server().parent
    for path in (folder / SHIM, folder.parent / "tests" / "faults" / SHIM):
        if path.is_file():
            return path
    return None


class _Control(ctypes.Structure):
    """As fault_shim.cc has it."""

    _fields_ = (
        ("armed", ctypes.c_int64),
        ("fault", ctypes.c_int64),
        ("at", ctypes.c_int64),
        ("calls", ctypes.c_int64 * len(FAULTS)),
        ("fired", ctypes.c_int64),
        ("what", ctypes.c_char * 216),
        ("resynced", ctypes.c_int64),
    )


class Fault:
    """What is to happen at which call of which program; `at` 0 only counts."""

    def __init__(self, path, kind="kill", at=0, program="gradwired"):
        self.program = program
        self.path = path
        self.kind = kind
        self.at = at
        with open(path, "w+b") as file:
            file.truncate(mmap.PAGESIZE)
            self._memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self._control = _Control.from_buffer(self._memory)
        self._control.fault = FAULTS.index(kind)
        self._control.at = at

    def arm(self):
        self._control.armed = 1

    @property
    def ends_server(self):
        """Whether it did."""
        return self.fired and self.kind in KILLS and self.program == "gradwired"

    @property
    def fired(self):
        return bool(self._control.fired)

    @property
    def what(self):
        return self._control.what.decode() if self.fired else "nothing"

    @property
    def resynced(self):
        return bool(self._control.resynced)

    @property
    def calls(self):
        """How many calls each kind could have met."""
        return dict(zip(FAULTS, self._control.calls, strict=True))

    def __str__(self):
        return f"{self.kind} at call {self.at} ({self.what})"


class Server:
    """gradwired on a state directory; `fault` is what it suffers."""

    def __init__(self, state, log, fault=None):
        self.log = log
        self._ports = pathlib.Path(state) / "ports.json"
        self._ports.unlink(missing_ok=True)
        environment = dict(os.environ)
        if fault is not None:
            environment["LD_PRELOAD"] = str(find_shim())
            environment["GRADWIRE_FAULT_CONTROL"] = str(fault.path)
            environment["GRADWIRE_FAULT_UNDER"] = os.path.realpath(state)
            environment["GRADWIRE_FAULT_IN"] = fault.program
        self._begin = log.stat().st_size if log.exists() else 0
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                [
                    find_server(),
                    f"--state_dir={state}",
                    f"--port_file={self._ports}",
                    "--listen=127.0.0.1:0",
                    "--metrics_listen=127.0.0.1:0",
                    "--threads=1",
                    "--auto_checkpoint_steps=2",
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def said(self):
        text = self.log.read_bytes()[self._begin :]
        return text.decode(errors="replace").splitlines()

    def serves(self):
        """Waits until it does; False if it has ended instead."""
        end = time.monotonic() + PATIENCE
        while not self._ports.exists():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                raise Broken("it neither serves nor ends")
            time.sleep(0.005)
        self.address = json.loads(self._ports.read_text())["grpc"]
        return True

    def ended(self):
        """Its status; it is about to end, or was told to."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Broken("it does not end") from None

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.ended()


class Stubs(calls.Stubs):
    """Whose calls have deadlines."""

    def __init__(self, address):
        super().__init__(address)
        channel = grpc.intercept_channel(self.channel, _Deadlines())
        self.jobs = jobs_pb2_grpc.JobServiceStub(channel)
        self.sessions = sessions_pb2_grpc.SessionServiceStub(channel)
        self.training = training_pb2_grpc.TrainingServiceStub(channel)
        self.operations = operations_pb2_grpc.OperationServiceStub(channel)
        self.checkpoints = checkpoints_pb2_grpc.CheckpointServiceStub(channel)


class _Deadlines(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
):
    def _call(self, proceed, details, request):
        return proceed(_Details(details), request)

    intercept_unary_unary = _call
    intercept_unary_stream = _call
    intercept_stream_unary = _call


class _Details(grpc.ClientCallDetails):
    def __init__(self, details):
        self.method = details.method
        self.timeout = PATIENCE
        self.metadata = details.metadata
        self.credentials = details.credentials
        self.wait_for_ready = details.wait_for_ready
        self.compression = details.compression
