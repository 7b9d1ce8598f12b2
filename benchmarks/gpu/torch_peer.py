# SPDX-License-Identifier: Apache-2.0
"""The step of gpu_step.cc by PyTorch, in a process of its own.

The same commands on stdin and answers on stdout. A way is words of
  f32 | autocast | master | bf16
                            how it computes: float32; bf16 by autocast over
                            float32 weights; bf16 weights with a float32 master;
                            with none, and moments in bf16
  compile | max-autotune | reduce-overhead
                            by torch.compile; without any, eager
  head=N                    logits of N tokens at once, made again for the
                            backward; without it, of all
  ac | ac=N                 all blocks, or the first N, keep their input alone,
                            and the backward makes the rest again
AdamW is fused, over float32 weights but for bf16's, and SDPA's backend is the
fastest.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import torch

from gpu.geometry import GEOMETRIES, load
from gpu.torch_model import Qwen3, best_attention, use_backend


class Peer:
    """One way on one model and batch."""

    def __init__(self, args: argparse.Namespace):
        words = set(args.way.split())
        geometry = GEOMETRIES[args.model]
        shape = (args.sequences, args.length)
        self.device = args.device
        if args.device == "cpu":  # of tests, whose models are tiny
            torch.set_num_threads(1)
        torch.set_float32_matmul_precision("high")
        backend, grouped = best_attention(geometry, *shape, args.device)
        use_backend(backend)
        self.attention = f"{backend.name}{' grouped' if grouped else ''}"
        self.autocast = "autocast" in words
        self.compute = torch.float32 if "f32" in words else torch.bfloat16
        with torch.device("meta"):
            self.model = Qwen3(geometry, grouped)
        weights = load(args.directory)
        self.model.to_empty(device=args.device)
        self.model.load_state_dict(weights)
        parameters = list(self.model.parameters())
        self.masters: list[torch.Tensor] | None = None
        if "bf16" in words:
            self.model.bfloat16()
        if "master" in words:
            # Before rounding: the files hold bf16, so that nothing is lost.
            self.masters = [p.detach().clone() for p in parameters]
            self.model.bfloat16()
        self.optimizer = torch.optim.AdamW(
            self.masters or parameters,
            lr=1e-4,
            betas=(0.9, 0.95),
            eps=1e-12,
            weight_decay=0.0,
            fused=True,
        )
        for word in words:
            if word.startswith("head="):
                self.model.head_tokens = int(word.removeprefix("head="))
            if word == "ac":
                self.model.checkpointed = geometry.layers
            if word.startswith("ac="):
                self.model.checkpointed = int(word.removeprefix("ac="))
        ids = torch.from_file(
            str(args.batch), size=2 * shape[0] * shape[1], dtype=torch.int32
        ).to(args.device)
        self.ids, self.targets = (x.view(shape).long() for x in ids.chunk(2))
        self.forward = self.model
        if "compile" in words:
            self.forward = torch.compile(self.model)
        if "max-autotune" in words:
            self.forward = torch.compile(
                self.model, mode="max-autotune-no-cudagraphs"
            )
        self.graphs = "reduce-overhead" in words
        if self.graphs:
            self.forward = torch.compile(self.model, mode="reduce-overhead")

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def forward_backward(self) -> torch.Tensor:
        """The sum of logprobs, still on the device."""
        if self.graphs:  # what the last step left may be written over
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(
            self.device, dtype=torch.bfloat16, enabled=self.autocast
        ):
            logprobs = self.forward(self.ids, self.targets, self.compute)
        (-logprobs.sum()).backward()
        return logprobs.detach().double().sum()

    def step(self) -> torch.Tensor:
        total = self.forward_backward()
        if self.masters is None:
            self.optimizer.step()
            return total
        parameters = list(self.model.parameters())
        for master, parameter in zip(self.masters, parameters, strict=True):
            if master.grad is None:
                master.grad = torch.empty_like(master)
            assert parameter.grad is not None
        torch._foreach_copy_(
            [master.grad for master in self.masters],
            [parameter.grad for parameter in parameters],
        )
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, self.masters)
        return total

    def timed(self, call) -> dict:
        self.model.zero_grad(set_to_none=True)
        self.synchronize()
        start = time.perf_counter()
        total = call()
        self.synchronize()
        return {
            "seconds": time.perf_counter() - start,
            "logprob_sum": float(total),
        }

    def gradient(self, path: str, names: list[str]) -> dict:
        self.timed(self.forward_backward)
        parameters = dict(self.model.named_parameters())
        sizes = [parameters[name].numel() for name in names]
        file = torch.from_file(path, shared=True, size=sum(sizes))
        for name, piece in zip(names, file.split(sizes), strict=True):
            piece.copy_(parameters[name].grad.flatten())
        self.model.zero_grad(set_to_none=True)
        return {"path": path}

    def memory(self) -> dict:
        """The allocator's high-water mark, and what it holds now."""
        if self.device != "cuda":
            return {}
        torch.cuda.empty_cache()
        return {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
        }

    def run(self, line: str) -> dict:
        command, *arguments = line.split()
        if command == "gradient":
            return self.gradient(arguments[0], arguments[1:])
        if command == "memory":
            return self.memory()
        if command == "forget_peak":
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            return {}
        if command == "describe":
            return {"attention": self.attention, "version": torch.__version__}
        calls = {"step": self.step, "forward_backward": self.forward_backward}
        return self.timed(calls[command])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", required=True)
    parser.add_argument("--model", choices=GEOMETRIES, required=True)
    parser.add_argument("--directory", type=pathlib.Path, required=True)
    parser.add_argument("--batch", type=pathlib.Path, required=True)
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    peer = Peer(parser.parse_args())
    for line in sys.stdin:
        print(json.dumps(peer.run(line)), flush=True)


if __name__ == "__main__":
    main()
