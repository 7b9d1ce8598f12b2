# SPDX-License-Identifier: Apache-2.0
"""Where the time of a training step goes, by op.

    .venv/bin/python benchmarks/profile/profile.py --model tiny --precision bf16

Forward, backward and an optimizer step in a process that has the trainer and
no server. Prints a JSON line for each op and a table that adds up to the wall
time; docs/performance.md says how to read it.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import tempfile

# In place of this folder, in which `profile` would be this file and not the
# standard library's module.
sys.path.pop(0)
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import common
from step.models import MODELS

BINARY = (
    pathlib.Path(__file__).parents[2]
    / "bazel-bin"
    / "benchmarks"
    / "profile"
    / "profile"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="bf16")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, help="default: the model's")
    parser.add_argument("--length", type=int, help="default: the model's")
    parser.add_argument(
        "--shared", type=int, default=0, help="tokens that all begin with"
    )
    parser.add_argument(
        "--prompt", type=int, default=0, help="positions without a gradient"
    )
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if not BINARY.is_file():
        raise SystemExit(
            "build it first: bazel build //benchmarks/profile:profile"
        )
    model = MODELS[args.model]
    with tempfile.TemporaryDirectory() as folder:
        directory = model.save(pathlib.Path(folder) / "model")
        command = [
            str(BINARY),
            f"--model={directory}",
            f"--name={args.model}",
            f"--commit={common.commit() or ''}",
            f"--precision={args.precision}",
            f"--steps={args.steps}",
            f"--threads={args.threads}",
            f"--sequences={args.sequences or model.sequences}",
            f"--length={args.length or model.length}",
            f"--shared={args.shared}",
            f"--prompt={args.prompt}",
        ]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
