# SPDX-License-Identifier: Apache-2.0
"""Deltas of a real fine-tuning, beside XOR + zstd-1 of the same weights.

    .venv/bin/python benchmarks/delta/fine_tuning.py --model smollm2-135m

A job of the server is trained on this repository's documentation (bytes as
tokens) for `--warm_up` steps at 3e-4, so that the moments are those of a
training. From that state, and at each learning rate, it makes two steps, saves
a base, makes `--steps` more and saves a delta and a base. `//benchmarks/delta`
then takes the two bases apart: one JSON line for each learning rate. That the
server's delta makes the second base byte for byte is checked by promoting it.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import common
import gradwire
import numpy as np
from gradwire.local_server import LocalServer
from step.models import MODELS, Model

REPOSITORY = pathlib.Path(__file__).parents[2]
BINARY = REPOSITORY / "bazel-bin" / "benchmarks" / "delta" / "delta"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--warm_up", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--learning_rates", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4]
    )
    return parser.parse_args()


class Training:
    """A job, and batches drawn from the documentation with one seed."""

    def __init__(self, policy: gradwire.TrainingClient, model: Model) -> None:
        self.policy = policy
        self.model = model
        pages = sorted((REPOSITORY / "docs").glob("*.md"))
        text = b"".join(page.read_bytes() for page in pages)
        self.text = np.frombuffer(text, np.uint8)
        self.rng = np.random.default_rng(0)

    def step(self, learning_rate: float) -> None:
        window = self.model.length + 1
        begins = self.rng.integers(
            0, len(self.text) - window, self.model.sequences
        )
        data = [
            gradwire.Datum.from_tokens(self.text[i : i + window].tolist())
            for i in begins
        ]
        self.policy.forward_backward(data, "cross_entropy").result()
        self.policy.optim_step(
            gradwire.AdamParams(
                learning_rate=learning_rate, normalization="num_loss_tokens"
            )
        ).result()


def contest(
    before: str, after: str, rate: float, steps: int, rounds: int
) -> dict:
    done = subprocess.run(
        [
            str(BINARY),
            f"--before={before}/model.safetensors",
            f"--after={after}/model.safetensors",
            f"--learning_rate={rate}",
            f"--steps={steps}",
            f"--rounds={rounds}",
            f"--commit={common.commit()}",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    args = arguments()
    if not BINARY.is_file():
        raise SystemExit("build it first: bazel build //benchmarks/delta")
    model = MODELS[args.model]
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        directory = model.save(scratch / "model")
        with LocalServer(state_dir=scratch / "state") as server:
            service = gradwire.ServiceClient(server.address)
            policy = service.create_training_client(
                base_model=directory, precision="bf16"
            )
            training = Training(policy, model)
            for _ in range(args.warm_up):
                training.step(3e-4)
            start = policy.save_state("start").result().path
            pairs = []
            for i, rate in enumerate(args.learning_rates):
                policy.load_state_with_optimizer(start).result()
                training.step(rate)
                training.step(rate)
                save = policy.save_weights_for_sampler
                before = save(f"before-{i}").result()
                for _ in range(args.steps):
                    training.step(rate)
                delta = save(f"delta-{i}", type="delta").result()
                after = save(f"after-{i}").result()
                made = service.promote_checkpoint(delta.path, f"made-{i}")
                if not filecmp.cmp(
                    pathlib.Path(made.local_path) / "model.safetensors",
                    pathlib.Path(after.local_path) / "model.safetensors",
                    shallow=False,
                ):
                    raise SystemExit(f"{rate}: the delta makes other weights")
                pairs.append((rate, before, delta, after))
            policy.close()
            # The server has nothing to do while the codecs are timed.
            for rate, before, delta, after in pairs:
                line = contest(
                    before.local_path,
                    after.local_path,
                    rate,
                    args.steps,
                    args.rounds,
                )
                line |= {
                    "model": args.model,
                    "device": common.device(),
                    "server_delta_bytes": delta.bytes,
                    "server_base_bytes": after.bytes,
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
