# SPDX-License-Identifier: Apache-2.0
"""A training step through the client beside PyTorch, in one run.

    .venv/bin/python benchmarks/step/step.py --precision f32

Both sides have the same random weights and batch. Parity is checked first (the
sum of logprobs), then timed rounds alternate. Prints one JSON line for each
mode and a table for people. Modes of gradwire: `forward_backward` (cross
entropy inside the server), `custom` (one forward, loss in the client) and
`double` (forward, then forward_backward with the gradients as weights). Each
includes the network and everything else a user waits for, but no optimizer
step on either side. PyTorch runs in processes of its own, so that the peak of
resident memory (VmHWM) is of one model on each side: of the rank and the
supervisor here, of the worker there.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import gradwire
import numpy as np
import torch
import transformers
from gradwire.local_server import LocalServer

# name: (config, sequences, length). Geometries of docs/performance.md.
MODELS = {
    "smollm2-135m": (
        transformers.LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
        ),
        4,
        512,
    ),
    "qwen-width": (
        transformers.Qwen2Config(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=4,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
        ),
        2,
        512,
    ),
    "tiny": (
        transformers.LlamaConfig(
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=4096,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
        ),
        8,
        256,
    ),
}


# PyTorch's ways to a precision; the fastest is the baseline.
PEERS = {"f32": ["f32"], "bf16": ["bf16-autocast", "bf16-weights"]}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_ids(name: str) -> np.ndarray:
    config, sequences, length = MODELS[name]
    return np.random.default_rng(0).integers(
        0, config.vocab_size, (sequences, length + 1)
    )


def peak_bytes(pid: int | str) -> int:
    """The largest resident set of a process so far."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no VmHWM for process {pid}")


def torch_worker(args: argparse.Namespace) -> None:
    """One line in, one step, one line out."""
    way, directory = args.worker
    torch.set_num_threads(args.threads)
    ids = torch.from_numpy(make_ids(args.model))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16 if way == "bf16-weights" else torch.float32,
    )

    def forward(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(
            "cpu", dtype=torch.bfloat16, enabled=way == "bf16-autocast"
        ):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        logprobs = torch.log_softmax(logits.float(), -1)
        return logprobs.gather(-1, ids[:, 1:, None])[..., 0]

    if not args.no_compile:
        forward = torch.compile(forward)
    for _ in sys.stdin:
        start = time.perf_counter()
        logprobs = forward(ids)
        (-logprobs.sum()).backward()
        seconds = time.perf_counter() - start
        total = float(logprobs.detach().sum())
        print(json.dumps([seconds, total, peak_bytes("self")]), flush=True)


class Torch:
    """PyTorch in a process of its own."""

    def __init__(self, way: str, directory: str, args: argparse.Namespace):
        command = [sys.executable, __file__, "--worker", way, directory]
        command += ["--model", args.model, "--threads", str(args.threads)]
        if args.no_compile:
            command.append("--no-compile")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.peak = 0

    def step(self) -> tuple[float, float]:
        """Seconds, and the sum of logprobs."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        seconds, total, self.peak = json.loads(self._process.stdout.readline())
        return seconds, total

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


class Gradwire:
    """The modes of one training client; each returns the sum of logprobs."""

    def __init__(self, policy: gradwire.TrainingClient, ids: np.ndarray):
        self.policy = policy
        self.data = [gradwire.Datum.from_tokens(row.tolist()) for row in ids]

    def forward_backward(self) -> float:
        done = self.policy.forward_backward(self.data, "cross_entropy").result()
        return total_of(done)

    def custom(self) -> float:
        def loss(data, logprobs):
            del data
            return -sum(lp.sum() for lp in logprobs), {}

        done = self.policy.forward_backward_custom(self.data, loss).result()
        return total_of(done)

    def double(self) -> float:
        total = total_of(self.policy.forward(self.data).result())
        self.forward_backward()
        return total


def total_of(result) -> float:
    return float(sum(float(lp.sum()) for lp in result.logprobs))


def timed(step) -> tuple[float, float]:
    start = time.perf_counter()
    total = step()
    return time.perf_counter() - start, total


def children(pid: int) -> list[int]:
    tasks = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    return [int(c) for task in tasks for c in task.read_text().split()]


def main() -> None:
    args = arguments()
    if args.worker:
        torch_worker(args)
        return
    config, sequences, length = MODELS[args.model]
    torch.manual_seed(0)
    ids = make_ids(args.model)
    tokens = sequences * length
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as scratch:
        directory = str(pathlib.Path(scratch) / "model")
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(
            directory
        )
        with LocalServer(
            state_dir=pathlib.Path(scratch) / "state", threads=args.threads
        ) as server:
            service = gradwire.ServiceClient(server.address)
            start = time.perf_counter()
            policy = service.create_training_client(
                base_model=directory, precision=args.precision
            )
            ready = time.perf_counter() - start
            ours = Gradwire(policy, ids)
            ours.forward_backward()
            first = {"gradwire": time.perf_counter() - start}
            (rank,) = children(server.pid)
            ours.forward_backward()
            peaks["forward_backward"] = peak_bytes(rank) + peak_bytes(
                server.pid
            )
            peers = {
                way: Torch(way, directory, args)
                for way in PEERS[args.precision]
            }
            theirs = 0.0
            for way, peer in peers.items():
                first[way], theirs = peer.step()
            mine = ours.custom()
            difference = abs(mine - theirs) / abs(theirs)
            # Sums of some thousand logprobs in the unit roundoff.
            limit = 2.0**-16 if args.precision == "f32" else 2.0**-7
            if difference > limit:
                raise SystemExit(
                    f"no parity: relative difference {difference} > {limit}"
                )
            modes = {
                "forward_backward": lambda: timed(ours.forward_backward),
                "custom": lambda: timed(ours.custom),
                "double": lambda: timed(ours.double),
            } | {way: peer.step for way, peer in peers.items()}
            for _ in range(args.rounds):
                for name, step in modes.items():
                    seconds.setdefault(name, []).append(step()[0])
            for name in ("custom", "double"):
                peaks[name] = peak_bytes(rank) + peak_bytes(server.pid)
            for way, peer in peers.items():
                peaks[way] = peer.peak
                peer.close()
    median = {
        name: statistics.median(values) for name, values in seconds.items()
    }
    best = min(PEERS[args.precision], key=lambda way: median[way])
    for name, values in seconds.items():
        row = {
            "bench": "step",
            "model": args.model,
            "mode": name,
            "dtype": args.precision,
            "T": length,
            "tokens": tokens,
            "threads": args.threads,
            "rounds": args.rounds,
            "ms": [1e3 * median[name], 1e3 * min(values), 1e3 * max(values)],
            "tok_s": tokens / median[name],
            "ratio": median[best] / median[name],
            "baseline": f"torch {torch.__version__} {best} "
            + ("eager" if args.no_compile else "compile"),
            "dloss": difference,
            "peak_bytes": peaks[name],
            "peak_ratio": peaks[name] / peaks[best],
            "first_step_s": first.get(name, first["gradwire"]),
        }
        print(json.dumps(row), flush=True)
    print(
        f"\n{args.model} {args.precision}, {tokens} tokens, "
        f"{args.threads} threads, median of {args.rounds}"
    )
    for name in seconds:
        print(
            f"  {name:18} {tokens / median[name]:8.1f} tok/s "
            f"{median[best] / median[name]:5.2f}x torch   "
            f"peak {peaks[name] / 2**30:5.2f} GiB "
            f"{peaks[name] / peaks[best]:5.2f}x torch"
        )
    print(
        f"  double / custom {median['double'] / median['custom']:5.2f}x, "
        f"job ready after {ready:.1f} s, "
        f"first step done after {first['gradwire']:.1f} s "
        f"(torch {first[best]:.1f} s)"
    )


if __name__ == "__main__":
    main()
