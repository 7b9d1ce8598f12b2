# SPDX-License-Identifier: Apache-2.0
"""Ragged batches and long sequences, beside gradwire's own full-length step.

    .venv/bin/python benchmarks/step/lengths.py --precision bf16

Ragged: lengths drawn from a log-normal distribution, cut to 8..512, with as
many tokens in all as the full batch; in turns with it. Long: one sequence of
512 to 8,192 tokens, each in a server of its own, so that the peak is its own;
time per token beside what the floating-point operations predict.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import common
import gradwire
import numpy as np
from gradwire.local_server import LocalServer

from step.models import MODELS

LENGTHS = [512, 1024, 2048, 4096, 8192]


def ragged_lengths(tokens: int) -> list[int]:
    """Log-normal, median 128, from 8 to 512, adding up to `tokens`."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        drawn = int(np.clip(rng.lognormal(np.log(128), 1.0), 8, 512))
        lengths.append(min(drawn, tokens - sum(lengths)))
    return lengths


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["ragged", "long"])
    return parser.parse_args()


class Job:
    """One model in a server of its own."""

    def __init__(self, args, directory: str, scratch: pathlib.Path):
        self._server = LocalServer(state_dir=scratch, threads=args.threads)
        self._server.__enter__()
        service = gradwire.ServiceClient(self._server.address)
        self._policy = service.create_training_client(
            base_model=directory, precision=args.precision
        )

    def step(self, ids: list[np.ndarray]):
        data = [gradwire.Datum.from_tokens(row.tolist()) for row in ids]

        def run_one() -> float:
            return common.timed(
                lambda: self._policy.forward_backward(
                    data, "cross_entropy"
                ).result()
            )

        return run_one

    def peak(self) -> int:
        (rank,) = common.children(self._server.pid)
        return common.peak_bytes(rank)

    def close(self) -> None:
        self._server.__exit__(None, None, None)


def ragged(args, directory: str, scratch: pathlib.Path) -> None:
    model = MODELS[args.model]
    tokens = model.sequences * model.length
    lengths = ragged_lengths(tokens)
    job = Job(args, directory, scratch / "ragged")
    ways = {
        "full": job.step(model.ids()),
        "ragged": job.step(model.ids(lengths)),
    }
    common.alternate(ways, 2)
    seconds = common.alternate(ways, args.rounds)
    job.close()
    median = {n: statistics.median(values) for n, values in seconds.items()}
    for name, values in seconds.items():
        common.print_line(
            "lengths",
            model=args.model,
            mode=name,
            dtype=args.precision,
            T=model.length if name == "full" else [min(lengths), max(lengths)],
            tokens=tokens,
            packing=True,
            threads=args.threads,
            rounds=args.rounds,
            ms=common.milliseconds(values),
            tok_s=tokens / median[name],
            ratio=median["full"] / median[name],
        )
    print(
        f"\n{args.model} {args.precision}: {len(lengths)} sequences of "
        f"{min(lengths)} to {max(lengths)}: "
        f"{tokens / median['ragged']:.1f} tok/s, "
        f"{median['full'] / median['ragged']:.2f}x of {model.sequences} x "
        f"{model.length}"
    )


def long(args, directory: str, scratch: pathlib.Path) -> None:
    model = MODELS[args.model]
    rows = []
    for length in LENGTHS:
        job = Job(args, directory, scratch / f"long{length}")
        step = job.step(model.ids([length]))
        step()
        repeats = max(2, args.rounds * 512 // length)
        seconds = [step() for _ in range(repeats)]
        peak = job.peak()
        job.close()
        median = statistics.median(seconds)
        rows.append((length, median / length, peak))
        common.print_line(
            "lengths",
            model=args.model,
            mode="long",
            dtype=args.precision,
            T=length,
            tokens=length,
            packing=True,
            threads=args.threads,
            rounds=repeats,
            ms=common.milliseconds(seconds),
            tok_s=length / median,
            peak_mem=peak,
        )
    _, first, first_peak = rows[0]
    print(f"\n{args.model} {args.precision}, one sequence")
    print(
        "  tokens   ms/token   x 512's   FLOPs x 512's   peak GiB   KiB/token"
    )
    for length, seconds, peak in rows:
        flops = model.useful_flops([length]) / length
        more = length - LENGTHS[0]
        per_token = (peak - first_peak) / more / 1024 if more else 0.0
        print(
            f"  {length:6} {1e3 * seconds:10.3f} {seconds / first:9.2f} "
            f"{flops * 512 / model.useful_flops([512]):15.2f} "
            f"{peak / 2**30:10.2f} {per_token:11.1f}"
        )


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        directory = MODELS[args.model].save(scratch / "model")
        if args.only != "long":
            ragged(args, directory, scratch)
        if args.only != "ragged":
            long(args, directory, scratch)


if __name__ == "__main__":
    main()
