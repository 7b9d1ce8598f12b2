# SPDX-License-Identifier: Apache-2.0
"""Requests that a power loss of the server's machine could still undo."""

from __future__ import annotations

import threading
from typing import Protocol

# What one training client keeps; the oldest go first. A million tokens take
# about 16 MB, and an optimizer step lets go of all before it.
LIMIT_BYTES = 512 << 20


class Request(Protocol):
    width: int  # how many numbers it takes

    def size(self) -> int:
        """Bytes that keeping it costs."""

    def send_again(self, seq: int) -> None:
        """Sends it under the number that it had; the server knows it, or runs
        it anew."""


class Unsynced:
    """Answered requests by number, until the server's disk has them too.

    Thread-safe.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES):
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()  # guards the three below
        self._requests: dict[int, tuple[Request, int]] = {}
        self._bytes = 0
        self._synced_through = 0

    def keep(self, seq: int, request: Request) -> None:
        size = request.size()
        with self._lock:
            if seq + request.width - 1 <= self._synced_through:
                return
            self._drop(seq)
            self._requests[seq] = request, size
            self._bytes += size
            while self._bytes > self._limit_bytes:
                self._drop(min(self._requests))

    def synced_through(self, seq: int) -> None:
        """All numbers up to this one survive a power loss."""
        with self._lock:
            self._synced_through = max(self._synced_through, seq)
            for first, (request, _) in list(self._requests.items()):
                if first + request.width - 1 <= seq:
                    self._drop(first)

    def since(self, seq: int) -> list[tuple[int, Request]]:
        """What has a number from this one on, in order."""
        with self._lock:
            return sorted(
                (first, request)
                for first, (request, _) in self._requests.items()
                if first + request.width > seq
            )

    def _drop(self, seq: int) -> None:
        """REQUIRES: the lock is held."""
        if seq in self._requests:
            self._bytes -= self._requests.pop(seq)[1]
