# SPDX-License-Identifier: Apache-2.0
"""What the quickstart says and writes while it trains."""

import collections
import sys
import time

import gradwire
from gradwire.quickstart.evaluate import token_ids


def say(text):
    """Standard error is for people; files are for scripts."""
    print(text, file=sys.stderr, flush=True)


class Journal:
    """Reads results two steps behind, so that the server never waits."""

    _DEPTH = 2

    def __init__(self, path, steps):
        self._writer = gradwire.logging.JsonlLogger(path)
        self._steps = steps
        self._step = 0
        self._pending = collections.deque()
        self._phase = ""
        self._since = 0.0
        self.tokens = 0  # trained on
        self.seconds = 0.0  # spent on it

    def start(self, phase):
        self._phase = phase
        self._since = time.monotonic()

    def add(self, *step):
        self._pending.append(step)
        if len(self._pending) > self._DEPTH:
            self._read()

    def drain(self):
        while self._pending:
            self._read()

    def close(self):
        self._writer.close()

    def _read(self):
        batch, learning_rate, result, update = self._pending.popleft()
        result, update = result.result(), update.result()
        now = time.monotonic()
        tokens = sum(len(token_ids(datum)) for datum in batch)
        seconds, self._since = now - self._since, now
        self.tokens += tokens
        self.seconds += seconds
        self._step += 1
        loss = result.metrics["loss:sum"]
        self._writer.log(
            {
                **result.metrics,
                "phase": self._phase,
                "loss": loss,
                "grad_norm": update.grad_norm,
                "learning_rate": learning_rate,
                "tokens": tokens,
                "tokens_per_second": tokens / seconds,
            },
            step=self._step,
        )
        if self._step % 4 == 1 or self._step == self._steps:
            say(
                f"step {self._step:3d}/{self._steps}  {self._phase}  "
                f"loss {loss:.3f}  grad norm {update.grad_norm:.2f}  "
                f"{self.tokens / self.seconds:.0f} tokens/s"
            )
