# SPDX-License-Identifier: Apache-2.0
"""The result of a call that is still on its way."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import queue
import threading
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_log = logging.getLogger("gradwire")


class Future(Generic[T]):
    """Read it with result() or await.

    A failure that nobody read is logged when the future is collected, or
    later, when the call has failed, and raised by the check() and close() of
    the client that made it.
    """

    def __init__(self, what: str = "operation"):
        self._inner: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._what = what
        self._outcome = Outcome(self._inner, what)
        self._on_cancel: Callable[[], bool] | None = None

    def result(self, timeout: float | None = None) -> T:
        """Waits for the result; raises the call's failure or TimeoutError.

        A timeout ends the waiting, not the work.
        """
        try:
            return self._inner.result(timeout)
        except BaseException as error:
            # It may have failed while this wait was timed out.
            if self._inner.done() and error is self._inner.exception():
                self._outcome.read = True
            elif isinstance(error, concurrent.futures.TimeoutError):
                raise TimeoutError(
                    f"{self._what} is not done after {timeout} s"
                ) from error
            raise

    def done(self) -> bool:
        return self._inner.done()

    def cancel(self) -> bool:
        """Removes the operation if it is still queued; True if it was."""
        if self._inner.done() or self._on_cancel is None:
            return False
        return self._on_cancel()

    def __await__(self) -> Generator[Any, None, T]:
        waiting = asyncio.wrap_future(self._inner)
        try:
            return (yield from asyncio.shield(waiting).__await__())
        finally:
            # A wait that was cancelled has read nothing.
            if self._inner.done():
                self._outcome.read = True

    def __del__(self) -> None:
        outcome = getattr(self, "_outcome", None)
        if outcome is not None and not outcome.read:
            outcome.inner.add_done_callback(outcome.note.tell_if_unread)


class Outcome:
    """What a client keeps of a future: whether a failure was read."""

    def __init__(self, inner: concurrent.futures.Future[Any], what: str):
        self.inner = inner
        self.what = what
        self.note = _Note(what)

    @property
    def read(self) -> bool:
        return self.note.read

    @read.setter
    def read(self, read: bool) -> None:
        self.note.read = read

    def failed(self) -> bool:
        return self.inner.done() and self.inner.exception() is not None

    def settled(self) -> bool:
        return self.inner.done()

    def tell_if_unread(self) -> None:
        if self.settled():
            self.note.tell_if_unread(self.inner)

    def raise_if_unread(self) -> None:
        if not self.read and self.failed():
            self.read = True
            error = self.inner.exception()
            assert error is not None
            raise error


class _Note:
    """What was read and told of a future; without it, so that a result goes
    when nobody has the future any more."""

    def __init__(self, what: str):
        self.read = False
        self._what = what
        self._told = False

    def tell_if_unread(self, inner: concurrent.futures.Future[Any]) -> None:
        """Logs the failure of a call that is done, once."""
        error = inner.exception()
        if error is None or self.read or self._told:
            return
        # Whoever has closed the client knows.
        if getattr(error, "reason", "") == "CLIENT_CLOSED":
            return
        self._told = True
        _log.error("%s failed and nobody read it: %s", self._what, error)


_thread = threading.local()


def in_worker() -> bool:
    """Whether this thread executes a call, and the loss of one."""
    return getattr(_thread, "is_worker", False)


class Workers:
    """Daemon threads that take work in the order it was given.

    Threads of concurrent.futures would keep a process alive that waits for a
    server. A thread ends after `idle` seconds without work.
    """

    def __init__(self, limit: int, idle: float = 5):
        self._limit = limit
        self._idle = idle
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._pending = 0

    def submit(self, work: Callable[[], None]) -> None:
        with self._lock:
            self._pending += 1
            start = self._threads < min(self._limit, self._pending)
            self._threads += start
            self._work.put(work)
        if start:
            threading.Thread(
                target=self._run, name="gradwire-worker", daemon=True
            ).start()

    def _run(self) -> None:
        _thread.is_worker = True
        while True:
            try:
                work = self._work.get(timeout=self._idle)
            except queue.Empty:
                with self._lock:
                    if not self._work.empty():
                        continue
                    self._threads -= 1
                    return
            try:
                work()
            finally:
                with self._lock:
                    self._pending -= 1
