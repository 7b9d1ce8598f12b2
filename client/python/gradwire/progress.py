# SPDX-License-Identifier: Apache-2.0
"""A line on standard error while something starts."""

from __future__ import annotations

from typing import Any


class Progress:
    """Shown on terminals alone."""

    def __init__(self, what: str):
        from rich.console import Console

        self._what = what
        console = Console(stderr=True)
        self._status: Any = (
            console.status(what) if console.is_terminal else None
        )

    def update(self, phase: str, share: float) -> None:
        if self._status is not None:
            self._status.update(f"{self._what}: {phase} {share:.0%}")

    def __enter__(self) -> Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._status is not None:
            self._status.stop()
