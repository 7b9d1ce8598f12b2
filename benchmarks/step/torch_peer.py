# SPDX-License-Identifier: Apache-2.0
"""The same step by PyTorch, in a process of its own.

A process of its own, so that its peak of resident memory (VmHWM) is of this
model alone. One JSON command a line in, one JSON answer a line out.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
import time

# PyTorch's ways to a precision: how it computes, and whether it is compiled.
WAYS = {
    "f32": ["f32 eager", "f32 compile"],
    "bf16": [
        "bf16-autocast eager",
        "bf16-autocast compile",
        "bf16-weights eager",
        "bf16-weights compile",
    ],
}


class TorchPeer:
    """One way of PyTorch on one model."""

    def __init__(self, way: str, model: str, directory: str, threads: int):
        self.way = way
        arguments = [way, model, directory, str(threads)]
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "step.torch_peer", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=pathlib.Path(__file__).parents[1],
        )
        self.peak = 0
        start = time.perf_counter()
        self.logprob_sum = self.step()[1]
        self.first_seconds = time.perf_counter() - start

    def _ask(self, **command) -> dict:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise SystemExit(
                f"PyTorch's process ({self.way}) has ended: "
                f"{self._errors.read()[-2000:]}"
            )
        return json.loads(line)

    def step(self) -> tuple[float, float]:
        """Seconds of a forward and backward, and the sum of its logprobs."""
        answer = self._ask(command="step")
        self.peak = answer["peak"]
        return answer["seconds"], answer["logprob_sum"]

    def save_gradient(self, path: str) -> None:
        """Writes the gradient of one step as safetensors, by name."""
        self._ask(command="gradient", path=path)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()


def _serve(way: str, name: str, directory: str, threads: int) -> None:
    import safetensors.torch
    import torch
    import transformers
    from common import peak_bytes

    from step.models import MODELS

    dtype, mode = way.split()
    torch.set_num_threads(threads)
    ids = torch.stack([torch.from_numpy(row) for row in MODELS[name].ids()])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16 if dtype == "bf16-weights" else torch.float32,
    )

    def forward(ids):
        with torch.autocast(
            "cpu", dtype=torch.bfloat16, enabled=dtype == "bf16-autocast"
        ):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        logprobs = torch.log_softmax(logits.float(), -1)
        return logprobs.gather(-1, ids[:, 1:, None])[..., 0]

    if mode == "compile":
        forward = torch.compile(forward)
    for line in sys.stdin:
        command = json.loads(line)
        if command["command"] == "gradient":
            model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        logprobs = forward(ids)
        (-logprobs.sum()).backward()
        seconds = time.perf_counter() - start
        if command["command"] == "gradient":
            gradient = {n: p.grad.float() for n, p in model.named_parameters()}
            safetensors.torch.save_file(gradient, command["path"])
        answer = {
            "seconds": seconds,
            "logprob_sum": float(logprobs.detach().sum()),
            "peak": peak_bytes("self"),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
