# SPDX-License-Identifier: Apache-2.0
"""Every op on one GPU; attention, the head and AdamW beside PyTorch's.

    benchmarks/gpu.sh ops

Runs //benchmarks/cuda_kernels, whose lines it passes on, at some lengths of
sequences, and PyTorch at the same shapes: attention by each backend of SDPA,
the head by chunks of tokens, eager and compiled, the fused step of AdamW. The
head comes once more at a larger model's width. Times are the GPU's own.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import common
import torch
from torch.nn.attention import SDPBackend

from gpu import machine, sides
from gpu.geometry import GEOMETRIES, Geometry
from gpu.torch_model import (
    attend,
    attention_operands,
    attention_ways,
    logprobs_of,
    use_backend,
)

MODEL, WIDE_MODEL = "Qwen3-1.7B", "Qwen3-8B"
BINARY = pathlib.Path(__file__).parents[2] / "tests/gpu/bin/cuda_kernels"
# (tokens, of a sequence); the first has all ops, the others attention alone.
SHAPES = [(4096, 4096), (4096, 1024), (16384, 16384)]
# As //benchmarks/cuda_kernels has it: calls of a round, and operands in turns.
CALLS, COPIES = 12, 4
HEAD_TOKENS = 1024


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--binary", type=pathlib.Path, default=BINARY)
    return parser.parse_args()


def microseconds(call: Callable[[int], object], rounds: int) -> list[float]:
    """Median, least and most of a call, by the GPU's clock."""
    for i in range(CALLS):
        call(i)
    found = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for i in range(CALLS):
            call(i)
        end.record()
        torch.cuda.synchronize()
        found.append(1e3 * begin.elapsed_time(end) / CALLS)
    return [statistics.median(found), min(found), max(found)]


def attention_of(
    backend: SDPBackend, grouped: bool, operands: list, rounds: int
) -> dict[str, list[float]]:
    """Of the forward, and of the backward alone."""
    use_backend(backend)

    def forward(i: int) -> None:
        q, k, v, _ = operands[i % COPIES]
        with torch.no_grad():
            attend(q, k, v, grouped)

    outs = [attend(q, k, v, grouped) for q, k, v, _ in operands]

    def backward(i: int) -> None:
        q, k, v, d_out = operands[i % COPIES]
        torch.autograd.grad(
            outs[i % COPIES], (q, k, v), d_out, retain_graph=True
        )

    return {
        "attention_forward": microseconds(forward, rounds),
        "attention_backward": microseconds(backward, rounds),
    }


def attention(
    g: Geometry, tokens: int, length: int, rounds: int
) -> dict[str, tuple[list[float], str]]:
    """The fastest way to each op, and its name."""
    operands = [
        attention_operands(g, tokens // length, length, "cuda")
        for _ in range(COPIES)
    ]
    best: dict[str, tuple[list[float], str]] = {}
    for backend, grouped in attention_ways("cuda"):
        way = f"SDPA {backend.name}{' grouped' if grouped else ''}"
        try:
            times = attention_of(backend, grouped, operands, rounds)
        except RuntimeError as error:  # it does not take these shapes
            print(f"left out: {way}: {str(error)[:200]}", file=sys.stderr)
            continue
        for op, us in times.items():
            if op not in best or us[0] < best[op][0][0]:
                best[op] = us, way
    return best


def head(
    g: Geometry, tokens: int, rounds: int
) -> dict[str, tuple[list[float], str]]:
    """By chunks, each of which is done before the next begins."""
    dtype, device = torch.bfloat16, "cuda"
    x = [
        torch.randn((tokens, g.hidden), device=device, dtype=dtype)
        for _ in range(COPIES)
    ]
    w = (0.02 * torch.randn((g.vocab, g.hidden), device=device)).to(dtype)
    w.requires_grad_()
    targets = torch.randint(0, g.vocab, (tokens,), device=device)
    best: dict[str, tuple[list[float], str]] = {}
    for way, function in {
        "eager": logprobs_of,
        "compile": torch.compile(logprobs_of),
    }.items():

        def forward(i: int, function=function) -> None:
            pieces = x[i % COPIES].split(HEAD_TOKENS)
            with torch.no_grad():
                for piece, ids in zip(
                    pieces, targets.split(HEAD_TOKENS), strict=True
                ):
                    function(piece, w, ids)

        def both(i: int, function=function) -> None:
            w.grad = None
            pieces = x[i % COPIES].split(HEAD_TOKENS)
            for piece, ids in zip(
                pieces, targets.split(HEAD_TOKENS), strict=True
            ):
                piece = piece.detach().requires_grad_()
                (-function(piece, w, ids).sum()).backward()

        name = f"{way}, chunks of {HEAD_TOKENS}"
        for op, call in {
            "logprob_head_forward": forward,
            "logprob_head_forward_backward": both,
        }.items():
            us = microseconds(call, rounds)
            if op not in best or us[0] < best[op][0][0]:
                best[op] = us, name
    return best


def optimizer(g: Geometry, rounds: int) -> dict[str, tuple[list[float], str]]:
    """Of the embedding's parameters, float32 throughout."""
    p = torch.nn.Parameter(torch.randn(g.vocab * g.hidden, device="cuda"))
    p.grad = torch.randn_like(p)
    step = torch.optim.AdamW([p], lr=1e-5, betas=(0.9, 0.95), fused=True).step
    us = microseconds(lambda _: step(), rounds)
    return {
        op: (us, "AdamW, fused, moments f32")
        for op in ("adamw_digest", "adamw_bf16_moments_digest")
    }


def ours(
    binary: pathlib.Path,
    model: str,
    shape: tuple[int, int],
    only: str,
    rounds: int,
) -> dict[str, list[float]]:
    """Each op's microseconds; its lines go on to stdout."""
    done = subprocess.run(
        [
            str(binary),
            f"--model={model}",
            f"--tokens={shape[0]}",
            f"--length={shape[1]}",
            f"--rounds={rounds}",
            f"--only={only}",
            f"--commit={common.commit() or ''}",
        ],
        env=sides.libraries() or dict(os.environ),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    print(done.stdout, end="", flush=True)
    if done.returncode != 0:
        raise SystemExit(f"{binary} has failed ({done.returncode})")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    found = {line["op"]: line["us"] for line in lines if "us" in line}
    if "logprob_head_forward" in found:
        found["logprob_head_forward_backward"] = [
            a + b
            for a, b in zip(
                found["logprob_head_forward"],
                found["logprob_head_backward"],
                strict=True,
            )
        ]
    return found


def flops(g: Geometry, op: str, tokens: int, length: int) -> float | None:
    """As op_work.h counts them; None of what memory bounds."""
    forward = 2.0 * g.heads * g.head_dim * length * tokens
    product = 2.0 * g.hidden * g.vocab * tokens
    return {
        "attention_forward": forward,
        "attention_backward": 2.5 * forward,
        "logprob_head_forward": product,
        "logprob_head_forward_backward": 3 * product,
    }.get(op)


def measure(
    args: argparse.Namespace,
    model: str,
    shape: tuple[int, int],
    only: str,
    ceiling: float,
) -> list[str]:
    """Prints the lines of one shape; the table's rows."""
    g, (tokens, length) = GEOMETRIES[model], shape
    name, driver = machine.query("name", "driver_version")
    mine = ours(args.binary, model, shape, only, args.rounds)
    theirs: dict[str, tuple[list[float], str]] = {}
    if only in ("", "attention_"):
        theirs |= attention(g, tokens, length, args.rounds)
    if only in ("", "logprob_head_"):
        theirs |= head(g, tokens, args.rounds)
    if only == "":
        theirs |= optimizer(g, args.rounds)
    torch.cuda.empty_cache()
    rows = []
    for op, (us, way) in theirs.items():
        work = flops(g, op, tokens, length)
        ratio = us[0] / mine[op][0]
        common.print_line(
            "torch_ops",
            device=name,
            driver=driver,
            model=model,
            op=op,
            dtype="bf16",
            T=length,
            tokens=tokens,
            rounds=args.rounds,
            us=us,
            tflops=work / us[0] * 1e-6 if work else None,
            baseline={
                "name": "torch",
                "version": torch.__version__,
                "options": way,
            },
            ceil_gemm=ceiling,
            gradwire_us=mine[op],
            gradwire_tflops=work / mine[op][0] * 1e-6 if work else None,
            ratio=ratio,
        )
        rate = f"{work / mine[op][0] * 1e-6:6.1f} TFLOP/s" if work else ""
        rows.append(
            f"  {model:10} {op:30} T {length:6} {mine[op][0]:9.1f} us "
            f"{rate:14}   {us[0]:9.1f} us {ratio:5.2f}x  {way}"
        )
    return rows


def main() -> None:
    args = arguments()
    machine.need()
    if not args.binary.exists():
        raise SystemExit(f"{args.binary} is missing: tests/gpu/pack.sh")
    tokens = SHAPES[0][0]
    ceiling = machine.gemm_ceiling(
        [
            (tokens, GEOMETRIES[model].hidden, GEOMETRIES[model].vocab)
            for model in (MODEL, WIDE_MODEL)
        ]
    )
    rows = []
    for shape in SHAPES:
        only = "" if shape == SHAPES[0] else "attention_"
        rows += measure(args, MODEL, shape, only, ceiling)
    rows += measure(args, WIDE_MODEL, SHAPES[0], "logprob_head_", ceiling)
    name, _ = machine.query("name", "driver_version")
    print(f"\nbf16, {name}; gradwire, then PyTorch", *rows, sep="\n")


if __name__ == "__main__":
    main()
