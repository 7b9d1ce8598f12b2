# SPDX-License-Identifier: Apache-2.0
"""What the way through the server costs a step.

    .venv/bin/python benchmarks/rpc/rpc.py --model tiny --precision bf16

The same forward and backward, in turns: in a process that has the trainer and
no server, and through the Python client, whose batch goes up and whose
logprobs come down over gRPC. The cost is the difference of the medians as a
share of the step in the process alone. Where a process's memory happens to lie
changes its speed by more than that, so both are started anew several times, and
the median of all starts is what counts. What of the way lies before the server
has the operation in its queue, and what after its end, is free of that.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import common
import gradwire
from gradwire._proto.gradwire.v1 import operations_pb2
from gradwire.local_server import LocalServer
from step.models import MODELS, Model

BINARY = (
    pathlib.Path(__file__).parents[2]
    / "bazel-bin"
    / "benchmarks"
    / "rpc"
    / "in_process"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="bf16")
    parser.add_argument("--rounds", type=int, default=15, help="of each start")
    parser.add_argument("--starts", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def measure(
    args: argparse.Namespace, model: Model, directory: str
) -> dict[str, list[float]]:
    """Seconds of each way, and of the client's of what comes before the queue
    and after the end, of processes that are started for it."""
    alone = subprocess.Popen(
        [
            str(BINARY),
            f"--model={directory}",
            f"--precision={args.precision}",
            f"--threads={args.threads}",
            f"--sequences={model.sequences}",
            f"--length={model.length}",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def in_process() -> float:
        assert alone.stdin and alone.stdout
        alone.stdin.write("step\n")
        alone.stdin.flush()
        return float(alone.stdout.readline().split()[0])

    with LocalServer(threads=args.threads) as server:
        service = gradwire.ServiceClient(server.address)
        policy = service.create_training_client(
            base_model=directory, precision=args.precision
        )
        data = [gradwire.Datum.from_tokens(row.tolist()) for row in model.ids()]

        spans = []

        def through_client() -> float:
            begin = time.time()
            policy.forward_backward(data, "cross_entropy").result()
            spans.append((begin, time.time()))
            return spans[-1][1] - begin

        ways = {"in_process": in_process, "client": through_client}
        common.alternate(ways, 5)
        seconds = common.alternate(ways, args.rounds)
        seconds |= {"before": [], "after": []}
        for seq, (begin, end) in list(enumerate(spans, 1))[-args.rounds :]:
            operation = service.operations.GetOperation(
                operations_pb2.GetOperationRequest(
                    model_id=policy.model_id, seq_id=seq
                )
            )
            queued = operation.create_time.ToNanoseconds() / 1e9
            ended = operation.end_time.ToNanoseconds() / 1e9
            seconds["before"].append(queued - begin)
            seconds["after"].append(end - ended)
    assert alone.stdin
    alone.stdin.close()
    alone.wait()
    return seconds


def main() -> None:
    args = arguments()
    if not BINARY.is_file():
        raise SystemExit(
            "build it first: bazel build //benchmarks/rpc:in_process"
        )
    model = MODELS[args.model]
    medians: dict[str, list[float]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        directory = model.save(pathlib.Path(folder) / "model")
        for _ in range(args.starts):
            for name, values in measure(args, model, directory).items():
                medians[name].append(statistics.median(values))
    median = {n: statistics.median(values) for n, values in medians.items()}
    extra = sorted(
        client - own
        for own, client in zip(
            medians["in_process"], medians["client"], strict=True
        )
    )
    tokens = model.sequences * model.length
    for name in ("in_process", "client"):
        values = medians[name]
        common.print_line(
            "rpc",
            model=args.model,
            mode=name,
            dtype=args.precision,
            T=model.length,
            tokens=tokens,
            packing=True,
            threads=args.threads,
            rounds=args.starts * args.rounds,
            ms=common.milliseconds(values),
            tok_s=tokens / median[name],
            baseline={
                "name": "the trainer in a process of its own",
                "version": common.commit(),
                "options": None,
            },
            ratio=median["in_process"] / median[name],
        )
    middle = statistics.median(extra)
    print(
        f"\n{args.model} {args.precision}, {tokens} tokens: "
        f"{1e3 * median['in_process']:.1f} ms in the process; the way through "
        f"the client costs {1e3 * middle:.1f} ms (of {args.starts} starts "
        f"{1e3 * extra[0]:.1f} to {1e3 * extra[-1]:.1f}) = "
        f"{middle / median['in_process']:.1%}; "
        f"{1e3 * median['before']:.1f} ms before it is queued, "
        f"{1e3 * median['after']:.1f} ms after it has ended"
    )


if __name__ == "__main__":
    main()
