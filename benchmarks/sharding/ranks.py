# SPDX-License-Identifier: Apache-2.0
"""A training step on several CPU ranks beside the same step on one.

    .venv/bin/python benchmarks/sharding/ranks.py --world-size 2
    .venv/bin/python benchmarks/sharding/ranks.py --world-size 2 --keep-gathered

The same batch through the client: one rank with all cores, and ranks that
share them; steps in turns. Prints how long the ranks' collectives ran, how
long work waited for one, and the step over the longer of computing and
communicating, which is 1 if one hides all of the other.
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
from gradwire.local_server import LocalServer
from step.models import MODELS


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="bf16")
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--sequences", type=int, help="default: the model's")
    parser.add_argument("--length", type=int, help="default: the model's")
    parser.add_argument("--keep-gathered", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


class Policy:
    def __init__(self, service, base, args, world_size):
        self._service = service
        self._policy = service.create_training_client(
            base,
            job_id=f"ranks-{world_size}",
            precision=args.precision,
            world_size=world_size,
            keep_gathered=args.keep_gathered and world_size > 1,
        )

    def step(self, data):
        self._policy.forward_backward(data, "cross_entropy")
        params = gradwire.AdamParams(learning_rate=1e-5)
        return common.timed(self._policy.optim_step(params).result)

    def collectives(self):
        return self._service.get_job(self._policy.job_id).collective_use


def main() -> None:
    args = arguments()
    model = MODELS[args.model]
    lengths = [args.length or model.length] * (
        args.sequences or model.sequences
    )
    data = [
        gradwire.Datum.from_tokens(row.tolist()) for row in model.ids(lengths)
    ]
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        base = model.save(scratch / "model")
        with LocalServer(state_dir=scratch / "state") as server:
            service = gradwire.ServiceClient(server.address)
            one = Policy(service, base, args, 1)
            many = Policy(service, base, args, args.world_size)
            ways = {
                "one": lambda: one.step(data),
                "many": lambda: many.step(data),
            }
            common.alternate(ways, 2)
            before = many.collectives()
            seconds = common.alternate(ways, args.rounds)
            after = many.collectives()
            service.close()
    step = statistics.mean(seconds["many"])
    busy = (after.busy_seconds - before.busy_seconds) / args.rounds
    wait = (after.wait_seconds - before.wait_seconds) / args.rounds
    tokens = sum(lengths)
    rates = {name: tokens / min(times) for name, times in seconds.items()}
    longer = max(step - wait, busy)
    common.print_line(
        "ranks",
        model=args.model,
        dtype=args.precision,
        tokens=tokens,
        T=max(lengths),
        rounds=args.rounds,
        world_size=args.world_size,
        keep_gathered=args.keep_gathered,
        ms=common.milliseconds(seconds["many"]),
        tok_s=rates["many"],
        ratio=rates["many"] / rates["one"],
        busy_ms=1e3 * busy,
        wait_ms=1e3 * wait,
        overlap=step / longer,
        bytes_sent=(after.bytes_sent - before.bytes_sent) / args.rounds,
    )
    print(
        f"{args.model} {args.precision}, {tokens} tokens, {args.world_size} "
        f"ranks{', weights stay gathered' if args.keep_gathered else ''}\n"
        f"  one rank {rates['one']:.1f} tok/s, {args.world_size} ranks "
        f"{rates['many']:.1f}: {rates['many'] / rates['one']:.2f}\n"
        f"  a step {1e3 * step:.0f} ms: computing {1e3 * (step - wait):.0f}, "
        f"communicating {1e3 * busy:.0f}, waiting {1e3 * wait:.0f}; "
        f"{step / longer:.2f} of the longer",
        file=sys.stderr,
    )


main()
