# SPDX-License-Identifier: Apache-2.0
"""Waiting for a server that is away, so that a training script need not."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc

from gradwire.errors import GradwireError, closed, from_rpc

DEFAULT_SECONDS = 600.0
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0
# Said by the connection, or by a server that is about to go.
_AWAY = {
    "SERVER_UNREACHABLE",
    "SERVER_DRAINING",
    "SERVER_STOPPED",
    "STREAM_ENDED",
    # Codes without a reason: a call that a stopping server let go of, and one
    # whose answer did not come in time.
    "CANCELLED",
    "DEADLINE_EXCEEDED",
}
_log = logging.getLogger("gradwire")


class Patience:
    """Repeats what can be repeated; one for all calls of a ServiceClient.

    A call is given up once it has failed for `seconds` without a success. The
    first contact is not repeated: that nothing answers at an address is said
    at once. Requests that change something carry a key by which the server
    tells a repetition. Thread-safe.
    """

    def __init__(self, address: str, seconds: float):
        self.address = address
        self.seconds = seconds
        self.closed = threading.Event()
        self._lock = threading.Lock()  # guards the four below
        self._outages = 0
        self._met = False
        self._lost_at: float | None = None
        self._found_at = 0.0

    @property
    def outages(self) -> int:
        """How often the server has gone away."""
        with self._lock:
            return self._outages

    def run(self, attempt: Callable[[], Any]) -> Any:
        """What `attempt` returns; failures become GradwireError."""
        attempts = Attempts(self)
        while True:
            try:
                value = attempt()
            except (grpc.RpcError, GradwireError, ValueError) as error:
                attempts.failed(error)
            else:
                attempts.answered()
                return value

    def translate(self, error: Exception) -> Exception:
        """The GradwireError for what a call has raised, if there is one."""
        if isinstance(error, grpc.RpcError):
            error = from_rpc(error, self.address)
        elif isinstance(error, ValueError):
            # grpc's word for a channel that has been closed.
            return closed() if "closed channel" in str(error) else error
        if self.closed.is_set() and is_away(error):
            return closed()
        return error

    def away_for(self) -> float:
        """Seconds since the server has gone away; 0 if it has not."""
        with self._lock:
            lost_at = self._lost_at
        return 0.0 if lost_at is None else time.monotonic() - lost_at

    def has_met(self) -> bool:
        with self._lock:
            return self._met

    def found(self, began: float) -> None:
        """The server has answered a call that began then."""
        with self._lock:
            self._met = True
            lost_at = self._lost_at
            if lost_at is None or began < lost_at:
                return
            self._lost_at = None
            self._found_at = time.monotonic()
        seconds = time.monotonic() - lost_at
        _log.warning(
            "the server at %s is back after %.1f s", self.address, seconds
        )

    def lost(self, began: float, error: GradwireError) -> None:
        """The server has not answered a call that began then."""
        with self._lock:
            if self._lost_at is not None or began < self._found_at:
                return
            self._lost_at = time.monotonic()
            self._outages += 1
        _log.warning(
            "the server at %s is away (%s); calls wait for it, for up to "
            "%.0f s each",
            self.address,
            error.reason,
            self.seconds,
        )


class Attempts:
    """The attempts at one call, or at one stream."""

    def __init__(self, patience: Patience):
        self._patience = patience
        self._began = time.monotonic()
        self._failing_since: float | None = None
        self._failures = 0

    def answered(self) -> None:
        self._failing_since, self._failures = None, 0
        self._patience.found(self._began)

    def failed(self, failure: Exception) -> None:
        """Returns when it is time for the next attempt, or raises."""
        patience = self._patience
        error = patience.translate(failure)
        if not isinstance(error, GradwireError):
            raise error
        if is_away(error):
            if not patience.has_met():
                raise error from None
            patience.lost(self._began, error)
        elif not error.final and error.reason != "CLIENT_CLOSED":
            patience.found(self._began)
        if not _can_be_repeated(error):
            raise error from None
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        left = self._failing_since + patience.seconds - now
        if left <= 0:
            error.message += f"; tried for {now - self._failing_since:.0f} s"
            raise error from None
        pause = error.retry_after or min(
            _FIRST_PAUSE * 2**self._failures, _LONGEST_PAUSE
        ) * random.uniform(0.5, 1.0)
        self._failures = min(self._failures + 1, 16)
        _log.debug("again in %.2f s: %s", pause, error)
        if patience.closed.wait(min(pause, left)):
            raise closed() from None
        self._began = time.monotonic()


def is_away(error: Exception) -> bool:
    """Whether it says that the server has gone, and nothing of the request."""
    return (
        isinstance(error, GradwireError)
        and not error.final
        and error.reason in _AWAY
    )


def _can_be_repeated(error: GradwireError) -> bool:
    if error.final:
        return False
    return (
        is_away(error)
        or error.code == grpc.StatusCode.UNAVAILABLE
        or (
            error.code == grpc.StatusCode.RESOURCE_EXHAUSTED
            and error.retry_after is not None
        )
    )
