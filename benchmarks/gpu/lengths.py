# SPDX-License-Identifier: Apache-2.0
"""A ragged batch on one GPU beside gradwire's own full-length one.

    benchmarks/gpu.sh ragged

Lengths are drawn from a log-normal distribution, 64 to --length, with as many
tokens in all; both batches are one micro-batch, and take turns. Attention has
less to do in the ragged one, so the line also says what its tokens need.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import common
import torch

from gpu import machine, sides
from gpu.geometry import GEOMETRIES
from gpu.step import BINARY, shape_of


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=GEOMETRIES, default="Qwen3-1.7B")
    parser.add_argument("--shape", type=shape_of, default=(2, 8192))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=int, default=5, help="rounds before")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--precision", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--binary", type=pathlib.Path, default=BINARY)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.device == "cuda":
        machine.need()
    if not args.binary.exists():
        raise SystemExit(f"{args.binary} is missing: tests/gpu/pack.sh")
    with tempfile.TemporaryDirectory() as folder:
        directory = GEOMETRIES[args.model].save(
            pathlib.Path(folder) / "model", args.device
        )
        if args.device == "cuda":
            torch.cuda.empty_cache()
        ways = {"full": "--noragged", "ragged": "--ragged"}
        both = {
            name: sides.gradwire(
                args.binary, directory, *args.shape, args.precision, way
            )
            for name, way in ways.items()
        }
        calls = {
            name: lambda side=side: side.seconds("forward_backward")
            for name, side in both.items()
        }
        common.alternate(calls, args.warm)
        seconds = common.alternate(calls, args.rounds)
        about = {name: side.about for name, side in both.items()}
        for side in both.values():
            side.close()
    report(args, about, seconds)


def report(args: argparse.Namespace, about: dict, seconds: dict) -> None:
    name, driver = machine.query("name", "driver_version") or ("cpu", None)
    peak = machine.peak_flops(name)
    median = {n: statistics.median(values) for n, values in seconds.items()}
    rate = {n: about[n]["tokens"] / median[n] for n in about}
    for mode, values in seconds.items():
        useful = about[mode]["useful_flops"]
        common.print_line(
            "gpu_lengths",
            device=name,
            driver=driver,
            model=args.model,
            mode=mode,
            dtype=args.precision,
            T=args.shape[1],
            tokens=about[mode]["tokens"],
            packing=True,
            microbatch=about[mode]["tokens"],
            recompute="none",
            rounds=len(values),
            ms=common.milliseconds(values),
            tok_s=rate[mode],
            mfu_c=useful / median[mode] / peak if peak else None,
            baseline={"name": "gradwire, full length"},
            ratio=rate[mode] / rate["full"],
            sequences=about[mode]["sequences"],
            useful_flops=useful,
        )
        print(
            f"  {mode:8} {about[mode]['sequences']:5} sequences "
            f"{rate[mode]:10.1f} tok/s {rate[mode] / rate['full']:5.2f}x, "
            f"{useful / about['full']['useful_flops']:5.2f}x of the work",
            file=sys.stderr,
        )


if __name__ == "__main__":
    try:
        main()
    except sides.SideEnded as ended:
        raise SystemExit(str(ended)) from None
