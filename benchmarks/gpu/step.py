# SPDX-License-Identifier: Apache-2.0
"""A full training step on one GPU beside PyTorch, in one run.

    benchmarks/gpu.sh step --model Qwen3-1.7B --shape 4x1024

Both sides have the same random weights and batch, packed; all of it is one
micro-batch. Parity comes first, of every way of PyTorch: the sum of logprobs,
and the cosine of the gradients of some parameters of every kind. Then the
fastest way of PyTorch alternates with gradwire: forward and backward, and with
AdamW. A custom step (a forward that keeps its activations, gradients from the
host, the backward) alternates with its two-forward form.

Where the GPU's memory does not hold both sides at once, they run after each
other instead: gradwire, PyTorch, gradwire. With --tight not all activations
need to fit: gradwire's plan decides how many layers keep theirs, PyTorch's ways
say it (ac), and there is no custom step.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import re
import statistics
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import common
import torch

from gpu import machine, sides
from gpu.geometry import GEOMETRIES, Geometry

MAX_LOSS_DIFFERENCE = {"f32": 1e-5, "bf16": 1e-2}
MIN_COSINE = 0.999
MAX_DRIFT = 0.03
WAYS = [
    "autocast compile",
    "master compile",
    "master compile head=1024",
]
BINARY = pathlib.Path(__file__).parents[2] / "tests/gpu/bin/gpu_step"


def shape_of(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError("SEQUENCESxLENGTH, such as 4x1024")
    return int(found[1]), int(found[2])


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=GEOMETRIES, default="Qwen3-1.7B")
    parser.add_argument("--shape", type=shape_of, default=(1, 4096))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--way", action="append", help="of PyTorch (torch_peer.py); repeatable"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--precision", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--moments", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--tight", action="store_true")
    parser.add_argument("--binary", type=pathlib.Path, default=BINARY)
    parser.add_argument("--warm", type=int, default=5, help="rounds before")
    return parser.parse_args(given)


class Run:
    """One model and batch."""

    def __init__(self, args: argparse.Namespace, scratch: pathlib.Path):
        self.args = args
        self.geometry: Geometry = GEOMETRIES[args.model]
        self.scratch = scratch
        self.gpu = args.device == "cuda"
        self.directory = self.geometry.save(scratch / "model", args.device)
        if self.gpu:
            torch.cuda.empty_cache()
        # Of this process: its context.
        self.idle = machine.used_bytes() if self.gpu else 0
        self.peaks: dict[str, int] = {}
        self.dloss = self.cosine = self.least_cosine = math.nan

    def start_ours(self) -> sides.Side:
        args = self.args
        return sides.gradwire(
            args.binary,
            self.directory,
            *args.shape,
            args.precision,
            f"--moments={args.moments}",
            keep=not args.tight,
        )

    def start_theirs(self, way: str) -> sides.Side:
        args = self.args
        return sides.torch(
            way,
            args.model,
            self.directory,
            self.scratch / "batch",
            args.shape,
            args.device,
        )

    def modes(self) -> list[str]:
        """Gradwire's."""
        modes = ["step", "forward_backward"]
        return modes if self.args.tight else [*modes, "custom", "double"]

    def gradient(self, side: sides.Side) -> dict[str, torch.Tensor]:
        names = self.geometry.sampled()
        path = self.scratch / "gradient"
        side.ask(f"gradient {path} {' '.join(names)}")
        shapes = self.geometry.shapes()
        sizes = [torch.Size(shapes[name]).numel() for name in names]
        values = torch.from_file(str(path), size=sum(sizes)).clone()
        path.unlink()
        return dict(zip(names, values.split(sizes), strict=True))

    def check(self, way: str, side: sides.Side) -> None:
        """Parity of one way with gradwire's sum and gradients, or the end."""
        total = side.ask("forward_backward")["logprob_sum"]
        self.dloss = abs(total - self.total) / abs(self.total)
        if not self.dloss <= MAX_LOSS_DIFFERENCE[self.args.precision]:
            raise SystemExit(
                f"no parity with PyTorch ({way}): logprobs sum to {self.total} "
                f"and {total}"
            )
        dots = []
        for name, other in self.gradient(side).items():
            mine = self.gradients[name]
            dots.append(
                [float(a.double() @ b.double()) for a, b in
                 ((mine, other), (mine, mine), (other, other))]
            )  # fmt: skip
        dot, ours, theirs = (sum(column) for column in zip(*dots, strict=True))
        self.cosine = dot / math.sqrt(ours * theirs)
        self.least_cosine = min(d / math.sqrt(a * b) for d, a, b in dots)
        if not self.cosine >= MIN_COSINE:
            raise SystemExit(
                f"no parity with PyTorch ({way}): the cosine of gradients is "
                f"{self.cosine}"
            )
        print(
            f"parity with {way}: loss differs by {self.dloss:.1e}, cosine of "
            f"gradients {self.cosine:.6f}, least of one parameter "
            f"{self.least_cosine:.6f}",
            file=sys.stderr,
        )

    def measure_ours(self, side: sides.Side) -> None:
        """What parity needs; then the peak of its memory, with all modes."""
        side.ask(f"batch {self.scratch / 'batch'}")
        self.total = side.ask("forward_backward")["logprob_sum"]
        self.gradients = self.gradient(side)
        for mode in self.modes():
            side.ask(mode)
        if self.gpu:
            self.peaks["gradwire"] = machine.used_bytes() - self.idle

    def fastest(self) -> str:
        """The way of PyTorch that is to be beaten; parity of all of them."""
        best, best_seconds = "", math.inf
        for way in self.args.way or WAYS:
            before = machine.used_bytes() if self.gpu else 0
            try:
                side = self.start_theirs(way)
                self.check(way, side)
                seconds = min(side.seconds("step") for _ in range(3))
                # Compiling and trying out may have taken more than steps do.
                side.ask("forget_peak")
                side.seconds("step")
                memory = side.ask("memory")
            except sides.SideEnded as ended:
                # Its memory may not do; another way's may.
                print(f"left out: {ended}", file=sys.stderr)
                continue
            if self.gpu:
                context = machine.used_bytes() - before - memory["reserved"]
                self.peaks[way] = memory["allocated"] + context
            side.close()
            print(f"{way}: {1e3 * seconds:.1f} ms", file=sys.stderr)
            if seconds < best_seconds:
                best, best_seconds = way, seconds
        if not best:
            raise SystemExit("no way of PyTorch could take the step")
        return best


def both_at_once(run: Run, way: str) -> bool:
    """Whether the GPU holds both sides, and some room for their caches."""
    if not run.gpu:
        return True
    needed = run.idle + 1.3 * (run.peaks["gradwire"] + run.peaks[way])
    return needed < machine.total_bytes()


def alternate(
    run: Run, way: str
) -> tuple[dict[str, list[float]], dict[str, object]]:
    """Seconds of each mode, and what the sides say of themselves."""
    ours_modes = run.modes()
    their_modes = ["step", "forward_backward"]
    rounds = run.args.rounds
    together = both_at_once(run, way)

    def ways(side: sides.Side, prefix: str, modes: list[str]):
        return {
            prefix + mode: (lambda mode=mode: side.seconds(mode))
            for mode in modes
        }

    def block(calls) -> dict[str, list[float]]:
        common.alternate(calls, run.args.warm)
        return common.alternate(calls, rounds)

    about: dict[str, object] = {"alternating": together}
    if together:
        ours, theirs = run.start_ours(), run.start_theirs(way)
        about |= {"gradwire": ours.about, "torch": theirs.about}
        seconds = block(
            ways(ours, "", ours_modes) | ways(theirs, "torch_", their_modes)
        )
        ours.close()
        theirs.close()
        return seconds, about
    seconds = {}
    for turn in ("gradwire", "torch", "gradwire"):
        mine = turn == "gradwire"
        side = run.start_ours() if mine else run.start_theirs(way)
        about[turn] = side.about
        calls = (
            ways(side, "", ours_modes)
            if mine
            else ways(side, "torch_", their_modes)
        )
        for mode, values in block(calls).items():
            seconds.setdefault(mode, []).extend(values)
        side.close()
    return seconds, about


def executed_flops(run: Run, mode: str, way: str) -> float | None:
    """Useful ones, attention's scores made again, and whole forwards.

    The backward of attention has five products in PyTorch, of which four are
    useful, and seven here, where no block adds to what another has written.
    None where a plan decides what is made again.
    """
    g, (sequences, length) = run.geometry, run.args.shape
    tokens = sequences * length
    attention = 2.0 * g.layers * g.heads * g.head_dim * length * tokens
    useful = g.useful_flops(sequences, length)
    if not mode.startswith("torch_"):
        if run.args.tight:
            return None
        forward = useful / 3 if mode == "double" else 0.0
        return useful + 1.5 * attention + forward
    head = 2.0 * g.hidden * g.vocab * tokens
    words = way.split()
    again = 0.5 * attention
    if any(word.startswith("head=") for word in words):
        again += head
    blocks = (useful / 3 - head) / g.layers
    for word in words:
        if word == "ac":
            again += g.layers * blocks
        elif word.startswith("ac="):
            again += int(word.removeprefix("ac=")) * blocks
    return useful + again


MODE_NAMES = {
    "step": "ft",
    "forward_backward": "ft_forward_backward",
    "custom": "custom",
    "double": "double_forward",
    "torch_step": "torch_ft",
    "torch_forward_backward": "torch_ft_forward_backward",
}


def report(run: Run, way: str, ceilings: dict, seconds, about) -> None:
    args = run.args
    sequences, length = args.shape
    tokens = sequences * length
    useful = run.geometry.useful_flops(sequences, length)
    name, driver = machine.query("name", "driver_version") or ("cpu", None)
    peak = machine.peak_flops(name)
    median = {n: statistics.median(values) for n, values in seconds.items()}
    options = f"{way}, SDPA {about['torch']['attention']}, fused AdamW"
    print(
        f"\n{args.model}, {sequences} x {length} tokens, {args.precision}, "
        f"{name}; PyTorch {torch.__version__}: {options}"
    )
    for mode, values in seconds.items():
        theirs = mode.startswith("torch_")
        against = {"custom": "double", "double": "double"}.get(
            mode, mode if theirs else f"torch_{mode}"
        )
        rate = useful / median[mode]
        memory = run.peaks.get(way if theirs else "gradwire")
        if not run.gpu:
            memory = None
        ratio = median[against] / median[mode]
        executed = executed_flops(run, mode, way)
        recompute = "none"
        if theirs:
            recompute = " ".join(w for w in way.split() if "ac" in w[:2])
        elif args.tight:
            recompute = "planned"
        common.print_line(
            "gpu_step",
            device=name,
            driver=driver,
            model=args.model,
            mode=MODE_NAMES[mode],
            dtype=args.precision,
            optimizer=f"adamw, {args.moments} moments"
            if mode == "step"
            else "adamw"
            if mode == "torch_step"
            else None,
            T=length,
            tokens=tokens,
            packing=not theirs,
            microbatch=tokens,
            recompute=recompute or "none",
            graphs=not theirs
            and os.environ.get("GRADWIRE_CUDA_GRAPHS", "0") not in ("", "0"),
            rounds=len(values),
            ms=common.milliseconds(values),
            tok_s=tokens / median[mode],
            mfu_c=rate / peak if peak else None,
            mcu=rate / ceilings["gemm"] if run.gpu else None,
            hfu=executed / median[mode] / peak if peak and executed else None,
            peak_mem=memory,
            ceil_gemm=ceilings.get("gemm"),
            ceil_copy=ceilings.get("copy"),
            clock_before=ceilings.get("clock_before"),
            clock_after=ceilings.get("clock_after"),
            baseline={
                "name": "gradwire, two forwards"
                if against == "double"
                else "torch",
                "version": torch.__version__,
                "options": options,
            },
            ratio=ratio,
            dloss=run.dloss,
            grad_cos=run.cosine,
            grad_cos_least=run.least_cosine,
            alternating=about["alternating"],
            plan=about.get("gradwire"),
            peaks=run.peaks,
            memory_total=machine.total_bytes() if run.gpu else None,
        )
        share = f"MFU {100 * rate / peak:5.1f} %" if peak else ""
        gib = f"peak {memory / 2**30:6.2f} GiB" if memory else ""
        print(
            f"  {MODE_NAMES[mode]:26} {tokens / median[mode]:10.1f} tok/s "
            f"{ratio:5.2f}x {MODE_NAMES[against]:26} {share} {gib}",
            file=sys.stderr,
        )


def main() -> None:
    args = arguments()
    if args.device == "cuda":
        machine.need()
    else:
        torch.set_num_threads(1)  # as torch_peer.py
    if not args.binary.exists():
        raise SystemExit(f"{args.binary} is missing: tests/gpu/pack.sh")
    with tempfile.TemporaryDirectory() as folder:
        run = Run(args, pathlib.Path(folder))
        shapes = run.geometry.matmul_shapes(args.shape[0] * args.shape[1])
        ceilings: dict[str, object] = {}
        if run.gpu:
            ceilings = {
                "gemm": machine.gemm_ceiling(shapes),
                "copy": machine.copy_ceiling(),
                "clock_before": machine.clocks(),
            }
            run.idle = machine.used_bytes()
        ours = run.start_ours()
        run.measure_ours(ours)
        ours.close()
        way = run.fastest()
        seconds, about = alternate(run, way)
        if run.gpu:
            ceilings["clock_after"] = machine.clocks()
            after = machine.gemm_ceiling(shapes)
            before = float(ceilings["gemm"])
            ceilings["gemm"] = max(before, after)
        report(run, way, ceilings, seconds, about)
        if run.gpu and abs(after / before - 1) > MAX_DRIFT:
            raise SystemExit(
                f"the best product changed from {before:.3g} to {after:.3g} "
                "FLOP/s while this ran: the machine was not steady"
            )


if __name__ == "__main__":
    try:
        main()
    except sides.SideEnded as ended:
        raise SystemExit(str(ended)) from None
