# SPDX-License-Identifier: Apache-2.0
"""The other side of step.py: the same step by torch, in a process of its own.

    python torch_peer.py MODEL_DIR PRECISION THREADS MODE

Reads one JSON request a line, answers with one JSON line. The first request
brings the batch; every other one runs one forward and backward of
-sum(weights * logprobs) and tells the loss, the seconds and the process's peak
of resident memory. MODE is compile or eager.
"""

import json
import os
import pathlib
import sys
import time

import torch
import transformers


def peak_rss_bytes():
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def main():
    # Libraries write to stdout at will; the answers have a pipe of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    path, precision, threads, mode = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        # Weights of the precision: faster than autocast, and smaller.
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        attn_implementation="sdpa",
    )
    model.config.use_cache = False
    batch = json.loads(sys.stdin.readline())
    tokens = torch.tensor(batch["tokens"])
    targets = torch.tensor(batch["targets"])[..., None]
    weights = torch.tensor(batch["weights"])

    def loss_of(tokens):
        logits = model(input_ids=tokens).logits.float()
        logprobs = torch.log_softmax(logits, -1).gather(-1, targets)
        return -(weights * logprobs[..., 0]).sum()

    if mode == "compile":
        loss_of = torch.compile(loss_of, dynamic=False)
    for _ in sys.stdin:
        model.zero_grad(set_to_none=True)
        begin = time.perf_counter()
        loss = loss_of(tokens)
        loss.backward()
        seconds = time.perf_counter() - begin
        answer = {
            "loss": loss.item(),
            "seconds": seconds,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
