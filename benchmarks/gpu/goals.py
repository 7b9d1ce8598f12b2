# SPDX-License-Identifier: Apache-2.0
"""The goals that one GPU can show, from the lines of the other benchmarks.

    benchmarks/gpu.sh goals [FILE...]

Reads JSON lines and prints what each goal asks for and what was measured. Only
lines of the last one's commit count, which must be of one GPU, and of two alike
the later, whichever way of PyTorch was the fastest then. A goal whose lines are
not there was not measured: the table says what shows it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable

Line = dict
Lines = list[Line]
# What a goal makes of the lines; None where they are not there.
Measure = Callable[[Lines], float | None]

_LARGE = ("Qwen3-1.7B", "Qwen3-4B")
# Bytes a token of Qwen3-4B keeps if norms, rotations and SwiGLU are made again,
# and a parameter's state: what the tokens that fit are compared with.
_KEPT_4B, _STATE = 2517e3, 16


@dataclasses.dataclass(frozen=True)
class Goal:
    """A row of the table."""

    name: str
    what: str
    must: float
    target: float
    measure: Measure
    part: str  # of gpu.sh that shows it
    unit: str = "x"
    at_most: bool = False

    def verdict(self, value: float | None) -> str:
        if value is None:
            return f"not measured: gpu.sh {self.part}"
        sign = -1.0 if self.at_most else 1.0
        if sign * value >= sign * self.target:
            return "target"
        return "must" if sign * value >= sign * self.must else "BELOW"

    def show(self, value: float | None) -> str:
        if value is None:
            return "-"
        if self.unit == "%":
            return f"{100 * value:.1f} %"
        return (
            f"{value:.3g} {self.unit}" if self.unit != "x" else f"{value:.2f}x"
        )


def _of(lines: Lines, bench: str, **fields: object) -> Lines:
    """The lines with these fields; a tuple means one of its values."""

    def fits(line: Line) -> bool:
        return line.get("bench") == bench and all(
            line.get(name) in (value if isinstance(value, tuple) else (value,))
            for name, value in fields.items()
        )

    return [line for line in lines if fits(line)]


def _all(values: Iterable[float | None], best=min) -> float | None:
    """The worst of values that must all be there."""
    found = list(values)
    if not found or any(value is None for value in found):
        return None
    return best(found)


def _way(line: Line) -> list[str]:
    """The words of PyTorch's way that a step was compared with."""
    options = (line.get("baseline") or {}).get("options") or ""
    return options.split(",")[0].split()


def _kind(line: Line) -> str:
    words = _way(line)
    if "reduce-overhead" in words:
        return "reduce-overhead"
    return "compile" if {"compile", "max-autotune"} & set(words) else "eager"


def _steps(lines: Lines, kind: str, **fields: object) -> Lines:
    """Steps beside a kind of PyTorch: compile, eager or reduce-overhead."""

    return [
        line
        for line in _of(lines, "gpu_step", dtype="bf16", **fields)
        if _kind(line) == kind
    ]


def _whole(lines: Lines, model: str, mode: str, length: int = 4096) -> Lines:
    """Steps that keep all activations, beside torch.compile."""
    return [
        line
        for line in _steps(lines, "compile", model=model, mode=mode, T=length)
        if line["recompute"] == "none"
    ]


def _fastest(found: Lines, field: str = "tok_s") -> float | None:
    return max((line[field] for line in found), default=None)


def _against_compile(lines: Lines) -> float | None:
    """Each side at its best batch."""

    def ratio(model: str) -> float | None:
        ours = _fastest(_whole(lines, model, "ft"))
        theirs = _fastest(_whole(lines, model, "torch_ft"))
        return ours / theirs if ours and theirs else None

    return _all(ratio(model) for model in _LARGE)


def _mfu(field: str, models: tuple[str, ...], *lengths: int) -> Measure:
    def measure(lines: Lines) -> float | None:
        return _all(
            _fastest(_whole(lines, model, "ft", length), field)
            for model in models
            for length in lengths
        )

    return measure


def _ratio(
    kind: str, cases: list[tuple[str, int]], **fields: object
) -> Measure:
    """The least ratio of steps; of all cases: model and tokens of a batch."""

    def least(lines: Lines, model: str, tokens: int) -> float | None:
        found = _steps(lines, kind, model=model, tokens=tokens, **fields)
        return min((line["ratio"] for line in found), default=None)

    def measure(lines: Lines) -> float | None:
        return _all(least(lines, *case) for case in cases)

    return measure


def _memory(lines: Lines) -> float | None:
    """Of PyTorch's ways the one with the head by pieces, if it was tried."""

    def share(model: str) -> float | None:
        shares = []
        for line in _whole(lines, model, "ft"):
            peaks = dict(line.get("peaks") or {})
            ours = peaks.pop("gradwire", None)
            pieces = [p for way, p in peaks.items() if "head=" in way]
            theirs = min(pieces or peaks.values(), default=None)
            if ours and theirs:
                shares.append(ours / theirs)
        return max(shares, default=None)

    return _all((share(model) for model in _LARGE), max)


def _tokens_that_fit(lines: Lines) -> float | None:
    """By the plan, against what the memory holds of what must be kept."""
    for line in reversed(_whole(lines, "Qwen3-4B", "ft")):
        plan, total = line.get("plan"), line.get("memory_total")
        if not plan or not total:
            continue
        state = (
            plan["weight_bytes"]
            + plan["gradient_bytes"]
            + plan["optimizer_bytes"]
        )
        # The head keeps what is left.
        kept = plan["activation_bytes"] - plan["head_kept_bytes"]
        per_token = (kept + plan["workspace_bytes"]) / plan[
            "micro_batch_tokens"
        ]
        fit = (plan["available_bytes"] - state) / per_token
        parameters = _STATE * plan["parameters"]
        return fit / ((0.97 * total - 2.5e9 - parameters) / _KEPT_4B)
    return None


def _ops(field: str, bench: str, names: tuple[str, ...], **fields) -> Measure:
    """The least of a field over ops, each of which must be there."""

    def measure(lines: Lines) -> float | None:
        def least(name: str) -> float | None:
            found = _of(lines, bench, op=name, dtype="bf16", **fields)
            return min((line[field] for line in found), default=None)

        return _all(least(name) for name in names)

    return measure


def _attention(lines: Lines) -> float | None:
    return _all(
        _ops("ratio", "torch_ops", _ATTENTION, T=length)(lines)
        for length in (1024, 4096, 16384)
    )


def _head(field: Callable[[Line], float | None]) -> Measure:
    def measure(lines: Lines) -> float | None:
        found = {
            (line["model"], line["op"]): field(line)
            for line in _of(lines, "torch_ops", op=_HEAD)
        }
        return _all(
            found.get((model, op))
            for model in ("Qwen3-1.7B", "Qwen3-8B")
            for op in _HEAD
        )

    return measure


def _head_share(line: Line) -> float | None:
    rate, most = line.get("gradwire_tflops"), line.get("ceil_gemm")
    return 1e12 * rate / most if rate and most else None


def _ragged(lines: Lines) -> float | None:
    found = _of(lines, "gpu_lengths", mode="ragged")
    return found[-1]["ratio"] if found else None


def _stall(lines: Lines) -> float | None:
    found = _of(lines, "checkpoint", op="checkpoint", model="Qwen3-1.7B")
    return found[-1]["ms"][0] if found else None


_ATTENTION = ("attention_forward", "attention_backward")
_HEAD = ("logprob_head_forward", "logprob_head_forward_backward")
_PASSES = tuple(
    f"{op}_{way}"
    for op in ("rmsnorm", "qk_norm_rope", "swiglu")
    for way in ("forward", "backward")
)

GOALS = [
    Goal("G1", "step, 1.7B and 4B, T 4096, to torch.compile", 1.0, 1.08,
         _against_compile, "step"),
    Goal("G2", "step where memory is tight, to the best that fits", 1.1, 1.25,
         _ratio("compile", [("Qwen3-8B", 4096), ("Qwen3-4B", 32768)],
                mode="ft", recompute="planned"), "tight"),
    Goal("G3", "causal MFU of a step, 1.7B and 4B", 0.5, 0.58,
         _mfu("mfu_c", _LARGE, 4096), "step", "%"),
    Goal("G3", "share of the best product, 1.7B and 4B", 0.63, 0.73,
         _mfu("mcu", _LARGE, 4096), "step", "%"),
    Goal("G4", "causal MFU of a step, 0.6B, T 4096 and 1024", 0.4, 0.48,
         _mfu("mfu_c", ("Qwen3-0.6B",), 4096, 1024), "step", "%"),
    Goal("G6", "step, to eager PyTorch with SDPA", 1.3, 1.6,
         _ratio("eager", [("Qwen3-0.6B", 4096), ("Qwen3-1.7B", 4096)],
                mode="ft"), "eager"),
    Goal("G7", "step of up to 2,048 tokens, 0.6B, to reduce-overhead", 1.2, 1.6,
         _ratio("reduce-overhead", [("Qwen3-0.6B", 512),
                                    ("Qwen3-0.6B", 2048)],
                mode="ft"), "small"),
    Goal("G8", "custom step, 4B, to two forwards", 1.25, 1.3,
         _ratio("compile", [("Qwen3-4B", 4096)], mode="custom"), "step"),
    Goal("G9", "peak memory, to PyTorch with a head by pieces", 0.85, 0.75,
         _memory, "step", at_most=True),
    Goal("G10", "tokens that fit, 4B, to what the memory holds", 0.85, 0.95,
         _tokens_that_fit, "step"),
    Goal("G11", "attention, T 1k, 4k, 16k, to the best SDPA", 0.95, 1.0,
         _attention, "ops"),
    Goal("G12", "logprob head, width 2048 and 4096, to chunks", 2.5, 2.5,
         _head(lambda line: line["ratio"]), "ops"),
    Goal("G12", "logprob head, share of the best product", 0.8, 0.83,
         _head(_head_share), "ops", "%"),
    Goal("G13", "AdamW, share of the copy", 0.85, 0.92,
         _ops("share_of_copy", "cuda_kernels", ("adamw_digest",)), "ops", "%"),
    Goal("G13", "AdamW, to PyTorch's fused step", 1.0, 1.0,
         _ops("ratio", "torch_ops", ("adamw_digest",)), "ops"),
    Goal("G13", "AdamW with bf16 moments, to PyTorch's fused step", 1.0, 1.3,
         _ops("ratio", "torch_ops", ("adamw_bf16_moments_digest",)), "ops"),
    Goal("G14", "norms, rotation, SwiGLU, share of the copy", 0.8, 0.9,
         _ops("share_of_copy", "cuda_kernels", _PASSES, model="Qwen3-1.7B"),
         "ops", "%"),
    Goal("G15", "ragged batch, to full length", 0.9, 0.95, _ragged, "ragged"),
    Goal("G17", "what a step waits for a checkpoint, 1.7B", 200, 50, _stall,
         "saves", "ms", at_most=True),
    Goal("G18", "copies to the host, to page-locked ones", 0.8, 0.92,
         _ops("share_of_pinned", "cuda_kernels", ("copy_to_host",)), "ops",
         "%"),
]  # fmt: skip
# What the table leaves to others.
ELSEWHERE = [
    ("G2b, G5", "LoRA", "there is none yet"),
    ("G16", "streaming logprobs", "needs a server: benchmarks/rpc/rpc.py"),
    ("G19", "from kill -9 to the next step", "needs a server"),
    ("G20", "one rank of NCCL", "tests/gpu/run.sh tests"),
]


def table(lines: Lines) -> str:
    """In Markdown."""
    rows = [
        "| goal | | must | target | measured | |",
        "|---|---|---|---|---|---|",
    ]
    for goal in GOALS:
        value = goal.measure(lines)
        sign = "<=" if goal.at_most else ">="
        rows.append(
            f"| {goal.name} | {goal.what} | {sign} {goal.show(goal.must)} "
            f"| {sign} {goal.show(goal.target)} | {goal.show(value)} "
            f"| {goal.verdict(value)} |"
        )
    rows += [f"| {g} | {what} | | | - | {why} |" for g, what, why in ELSEWHERE]
    return "\n".join(rows)


def _same(line: Line) -> str:
    """What two lines of the same measurement have in common."""
    names = (
        *("bench", "device", "model", "mode", "op", "dtype", "optimizer", "T"),
        *("tokens", "recompute", "graphs"),
    )
    return json.dumps([[line.get(name) for name in names], _kind(line)])


def counted(lines: Lines) -> Lines:
    """Those of the last one's commit, of two alike the later one."""
    if not lines:
        return []
    commit = lines[-1].get("commit")
    return list(
        {
            _same(line): line for line in lines if line.get("commit") == commit
        }.values()
    )


def read(files: Iterable[pathlib.Path]) -> Lines:
    """The lines that are JSON objects; of NaN nothing was measured."""
    return [
        json.loads(text, parse_constant=lambda _: None)
        for file in files
        for text in file.read_text(encoding="utf-8").splitlines()
        if text.startswith("{")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=pathlib.Path, nargs="+")
    try:
        lines = counted(read(parser.parse_args().file))
    except (OSError, ValueError) as error:
        raise SystemExit(f"goals.py: {error}") from None
    print(table(lines))


if __name__ == "__main__":
    main()
