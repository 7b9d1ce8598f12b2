# SPDX-License-Identifier: Apache-2.0
"""What checkpoints and snapshots of one GPU cost the training.

    benchmarks/gpu.sh saves

Gives //benchmarks/checkpoint:gpu_checkpoint a model with random weights, and
room for its files in $TMPDIR: 20 bytes a parameter.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import common

from gpu import machine, sides
from gpu.geometry import GEOMETRIES
from gpu.step import shape_of

BINARY = pathlib.Path(__file__).parents[2] / "tests/gpu/bin/gpu_checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=GEOMETRIES, default="Qwen3-1.7B")
    parser.add_argument("--shape", type=shape_of, default=(1, 4096))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--binary", type=pathlib.Path, default=BINARY)
    args = parser.parse_args()
    if args.device == "cuda":
        machine.need()
    if not args.binary.exists():
        raise SystemExit(f"{args.binary} is missing: tests/gpu/pack.sh")
    with tempfile.TemporaryDirectory() as folder:
        # The model's name is the directory's.
        directory = GEOMETRIES[args.model].save(
            pathlib.Path(folder) / args.model, args.device
        )
        sequences, length = args.shape
        tokens = sequences * length
        done = subprocess.run(
            [
                str(args.binary),
                f"--model={directory}",
                "--precision=bf16",
                f"--sequences={sequences}",
                f"--length={length}",
                f"--micro_batch={tokens}",
                f"--max_context={length}",
                f"--retained_tokens={tokens}",
                f"--rounds={args.rounds}",
                f"--directory={folder}/saves",
                f"--commit={common.commit() or ''}",
            ],
            env=sides.libraries() or dict(os.environ),
            check=False,
        )
    if done.returncode != 0:
        raise SystemExit(f"{args.binary} has failed ({done.returncode})")


if __name__ == "__main__":
    main()
