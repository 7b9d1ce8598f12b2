# SPDX-License-Identifier: Apache-2.0
"""Writers of metrics: log(metrics, step=...), close()."""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any


class _Logger:
    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class JsonlLogger(_Logger):
    """One JSON object a line, complete after every call."""

    def __init__(self, path: str | os.PathLike[str], append: bool = False):
        self._file = open(path, "a" if append else "w", encoding="utf-8")

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        line = {"step": step, "time": time.time(), **metrics}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardLogger(_Logger):
    """Scalars for TensorBoard; needs the packages tensorboard and torch."""

    def __init__(self, folder: str | os.PathLike[str]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(os.fspath(folder))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name.replace(":", "/"), value, step)

    def close(self) -> None:
        self._writer.close()


def plot_loss(
    path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None
) -> pathlib.Path:
    """Draws the "loss" of a JsonlLogger's file; returns the picture's path.

    It goes to loss.png beside the file if `out` is not given. Each "phase",
    where there are any, is a line of its own.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = pathlib.Path(path)
    out = path.with_name("loss.png") if out is None else pathlib.Path(out)
    phases: dict[str, tuple[list[int], list[float]]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        loss = line.get("loss", line.get("loss:sum"))
        if loss is None:
            continue
        steps, losses = phases.setdefault(line.get("phase", ""), ([], []))
        steps.append(line["step"])
        losses.append(loss)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for phase, (steps, losses) in phases.items():
        axes.plot(steps, losses, marker=".", label=phase)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    if any(phases):
        axes.legend()
    figure.savefig(out, dpi=120)
    return out
