# SPDX-License-Identifier: Apache-2.0
"""A training step through the client beside PyTorch, in one run.

    .venv/bin/python benchmarks/step/step.py --model tiny --precision f32

Both sides have the same random weights and batch. Parity comes first: the sum
of logprobs, and the cosine of the gradients, read from what an AdamW step with
a huge eps does to the weights. Then every way of PyTorch to the precision runs
alone (eager and torch.compile; in bf16 autocast over f32 weights and bf16
weights), and the fastest alternates with gradwire's modes: `forward_backward`
(cross entropy inside the server), `custom` (one forward, loss in the client)
and `double` (forward, then forward_backward with the gradients as weights).
Each includes the network and everything else a user waits for, but no
optimizer step on either side.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import common
import gradwire
import numpy as np
import safetensors
import torch
from gradwire.local_server import LocalServer

from step.models import MODELS
from step.torch_peer import WAYS, TorchPeer

# Of sums of some thousand logprobs, and of the whole gradient.
MAX_LOSS_DIFFERENCE = {"f32": 1e-5, "bf16": 1e-2}
MIN_COSINE = 0.999


class Gradwire:
    """The modes of one training client; each returns the sum of logprobs."""

    def __init__(self, policy: gradwire.TrainingClient, ids: list[np.ndarray]):
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


def gradient_cosine(
    service: gradwire.ServiceClient,
    directory: str,
    ids: list[np.ndarray],
    precision: str,
    peer: TorchPeer,
    scratch: pathlib.Path,
) -> float:
    """Of gradwire's whole gradient and PyTorch's.

    AdamW's first step moves the weights by -lr g / (|g| + eps): along the
    gradient if eps is far above it, and far beyond the weights if lr / eps is
    large.
    """
    policy = service.create_training_client(
        base_model=directory, precision=precision
    )
    Gradwire(policy, ids).forward_backward()
    policy.optim_step(
        gradwire.AdamParams(learning_rate=1e15, beta1=0.0, beta2=0.0, eps=1e12)
    ).result()
    path = pathlib.Path(
        policy.save_weights_for_sampler(name="parity").result().local_path
    )
    service.delete_job(policy.job_id)
    peer.save_gradient(str(scratch / "gradient.safetensors"))
    dot = ours = theirs = 0.0
    with (
        safetensors.safe_open(
            scratch / "gradient.safetensors", framework="pt"
        ) as gradients,
        safetensors.safe_open(
            pathlib.Path(directory) / "model.safetensors", framework="pt"
        ) as before,
        safetensors.safe_open(
            path / "model.safetensors", framework="pt"
        ) as after,
    ):
        for name in gradients.keys():  # noqa: SIM118
            moved = (
                before.get_tensor(name).double()
                - after.get_tensor(name).double()
            )
            gradient = gradients.get_tensor(name).double()
            dot += float((moved * gradient).sum())
            ours += float((moved * moved).sum())
            theirs += float((gradient * gradient).sum())
    return dot / (ours * theirs) ** 0.5


def fastest_peer(
    args: argparse.Namespace, directory: str
) -> tuple[TorchPeer, dict[str, TorchPeer]]:
    """The fastest way, still running, and all ways, the others ended."""
    ways = [
        way
        for way in WAYS[args.precision]
        if not (args.no_compile and way.endswith("compile"))
    ]
    best: TorchPeer | None = None
    best_seconds = float("inf")
    all_peers = {}
    for way in ways:
        peer = TorchPeer(way, args.model, directory, args.threads)
        all_peers[way] = peer
        seconds = min(peer.step()[0] for _ in range(2))
        print(f"  PyTorch, {way}: {seconds * 1e3:.0f} ms", file=sys.stderr)
        if seconds < best_seconds:
            if best is not None:
                best.close()
            best, best_seconds = peer, seconds
        else:
            peer.close()
    assert best is not None
    return best, all_peers


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    model = MODELS[args.model]
    ids = model.ids()
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        directory = model.save(scratch / "model")
        peer, peers = fastest_peer(args, directory)
        with LocalServer(
            state_dir=scratch / "state", threads=args.threads
        ) as server:
            run(args, scratch, directory, ids, server, peer, peers)
        peer.close()


def run(args, scratch, directory, ids, server, peer, peers) -> None:
    """Parity, rounds, lines and table."""
    model = MODELS[args.model]
    service = gradwire.ServiceClient(server.address)
    cosine = gradient_cosine(
        service, directory, ids, args.precision, peer, scratch
    )
    start = time.perf_counter()
    policy = service.create_training_client(
        base_model=directory, precision=args.precision
    )
    ready = time.perf_counter() - start
    ours = Gradwire(policy, ids)
    mine = ours.forward_backward()
    first = time.perf_counter() - start
    difference = abs(mine - peer.logprob_sum) / abs(peer.logprob_sum)
    limit = MAX_LOSS_DIFFERENCE[args.precision]
    if difference > limit or cosine < MIN_COSINE:
        raise SystemExit(
            f"no parity: loss differs by {difference:.2e} (at most {limit}), "
            f"cosine of gradients {cosine:.5f} (at least {MIN_COSINE})"
        )

    (rank,) = common.children(server.pid)
    peak = {}

    def measured(name, step):
        def run_one() -> float:
            seconds = common.timed(step)
            peak[name] = common.peak_bytes(rank) + common.peak_bytes(server.pid)
            return seconds

        return run_one

    shapes = model.matmul_shapes()
    ceiling = common.gemm_ceiling(shapes, args.precision, args.threads)
    clock = common.clock_mhz()
    # Its peak is its own only before the modes that retain have run.
    warm = {
        "forward_backward": measured("forward_backward", ours.forward_backward)
    }
    common.alternate(warm, 3)
    own_peak = peak["forward_backward"]
    modes = warm | {
        "custom": measured("custom", ours.custom),
        "double": measured("double", ours.double),
        "torch": lambda: peer.step()[0],
    }
    common.alternate(modes, 1)
    seconds = common.alternate(modes, args.rounds)
    peak |= {"forward_backward": own_peak, "torch": peer.peak}
    ceiling = max(
        ceiling, common.gemm_ceiling(shapes, args.precision, args.threads)
    )
    median = {n: statistics.median(values) for n, values in seconds.items()}
    tokens = model.sequences * model.length
    flops = model.useful_flops(model.full_lengths())
    for name, values in seconds.items():
        common.print_line(
            "step",
            model=args.model,
            mode=name,
            dtype=args.precision,
            T=model.length,
            tokens=tokens,
            packing=name != "torch",
            threads=args.threads,
            rounds=args.rounds,
            ms=common.milliseconds(values),
            tok_s=tokens / median[name],
            mcu=flops / median[name] / ceiling,
            peak_mem=peak[name],
            ceil_gemm=ceiling,
            clock_before=clock,
            clock_after=common.clock_mhz(),
            baseline={
                "name": "torch",
                "version": torch.__version__,
                "options": peer.way,
            },
            ratio=median["torch"] / median[name],
            dloss=difference,
            grad_cos=cosine,
            peak_ratio=peak[name] / peak["torch"],
            peak_ratio_of={w: peak[name] / p.peak for w, p in peers.items()},
            ready_s=ready if name != "torch" else None,
            first_step_s=first if name != "torch" else peer.first_seconds,
        )
    print(
        f"\n{args.model} {args.precision}, {tokens} tokens, {args.threads} "
        f"threads, median of {args.rounds}; torch: {peer.way}"
    )
    for name in seconds:
        print(
            f"  {name:18} {tokens / median[name]:8.1f} tok/s "
            f"{median['torch'] / median[name]:5.2f}x torch   "
            f"{flops / median[name] / ceiling:5.2f} of the best product   "
            f"peak {peak[name] / 2**30:5.2f} GiB "
            f"{peak[name] / peak['torch']:5.2f}x torch"
        )
    others = ", ".join(
        f"{way} {p.peak / 2**30:.2f} GiB" for way, p in peers.items()
    )
    print(
        f"  peaks of PyTorch's ways: {others}\n"
        f"  double / custom {median['double'] / median['custom']:.2f}x; job "
        f"ready after {ready:.1f} s, first step done after {first:.1f} s "
        f"(torch: {peer.first_seconds:.1f} s)\n"
        f"  loss differs by {difference:.1e}, cosine of gradients {cosine:.6f}"
    )


if __name__ == "__main__":
    main()
