# SPDX-License-Identifier: Apache-2.0
"""How many operations an optimizer step has to find in the accumulator."""

from __future__ import annotations

from gradwire.errors import GradwireError

# Of the end of a window: failures that leave no gradients.
_DROPS_GRADIENTS = {
    "ACCUMULATION_MISMATCH",
    "GRADIENTS_TAINTED",
    "NONFINITE_GRADIENT",
}


class Window:
    """Gradients between two optimizer steps; counts the announced ones."""

    def __init__(self) -> None:
        self.ops = 0
        self._goes_on: Window | None = None

    def fail(self) -> None:
        """One that was counted is not there, here or where it went."""
        window = self
        while window._goes_on is not None:
            window = window._goes_on
        window.ops -= 1

    def go_on(self, following: Window) -> None:
        """Its gradients are those of the next window that has not failed to
        end, too: its own end has failed."""
        while following._goes_on is not None:
            following = following._goes_on
        following.ops += self.ops
        self._goes_on = following


def drops_gradients(error: BaseException) -> bool:
    """Whether the failed end of a window has left no gradients."""
    return isinstance(error, GradwireError) and error.reason in _DROPS_GRADIENTS
