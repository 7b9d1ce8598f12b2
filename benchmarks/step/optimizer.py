# SPDX-License-Identifier: Apache-2.0
"""An optimizer step through the client beside torch's fused AdamW.

    .venv/bin/python benchmarks/step/optimizer.py --precision f32

Both step as many weights. gradwire's step includes the gradient norm and the
network; PyTorch's is `step()` alone. GB/s counts what AdamW must move, each
value once: read gradient, weight and both moments, write weight and moments.
In bf16 the weight is two halves, as many bytes; PyTorch's moments are float32
whatever --moment-precision says.
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
import torch
import transformers
from gradwire.local_server import LocalServer

from step.models import MODELS

BYTES = {"f32": 28, "bf16": 20}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument(
        "--moment-precision", choices=["f32", "bf16"], default="f32"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    model = MODELS[args.model]
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        directory = model.save(scratch / "model")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        )
        for parameter in theirs.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer = torch.optim.AdamW(
            theirs.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True
        )
        parameters = sum(p.numel() for p in theirs.parameters())
        with LocalServer(
            state_dir=scratch / "state", threads=args.threads
        ) as server:
            service = gradwire.ServiceClient(server.address)
            policy = service.create_training_client(
                base_model=directory,
                precision=args.precision,
                moment_precision=args.moment_precision,
            )
            # Few tokens: the step costs the same whatever made the gradient.
            row = model.ids([8])[0]
            data = [gradwire.Datum.from_tokens(row.tolist())]

            def ours() -> float:
                policy.forward_backward(data, "cross_entropy").result()
                return common.timed(
                    lambda: policy.optim_step(
                        gradwire.AdamParams(learning_rate=1e-5)
                    ).result()
                )

            ways = {
                "gradwire": ours,
                "torch": lambda: common.timed(optimizer.step),
            }
            common.alternate(ways, 2)
            triad = common.triad_ceiling(args.threads)
            seconds = common.alternate(ways, args.rounds)
            triad = max(triad, common.triad_ceiling(args.threads))
    median = {n: statistics.median(values) for n, values in seconds.items()}
    print(
        f"\n{args.model} {args.precision}, {args.moment_precision} moments, "
        f"{parameters / 1e6:.1f} M parameters"
    )
    for name, values in seconds.items():
        moments = args.moment_precision if name == "gradwire" else "f32"
        rate = BYTES[moments] * parameters / median[name]
        common.print_line(
            "optimizer",
            model=args.model,
            mode=name,
            dtype=args.precision,
            optimizer=f"adamw, {moments} moments",
            threads=args.threads,
            rounds=args.rounds,
            ms=common.milliseconds(values),
            gbps=rate / 1e9,
            ceil_copy=triad,
            baseline={
                "name": "torch.optim.AdamW",
                "version": torch.__version__,
                "options": "fused=True",
            },
            ratio=median["torch"] / median[name],
        )
        print(
            f"  {name:10} {1e3 * median[name]:7.1f} ms  "
            f"{median['torch'] / median[name]:5.2f}x torch  "
            f"{rate / 1e9:6.1f} GB/s = {rate / triad:.2f} of the triad"
        )


if __name__ == "__main__":
    main()
