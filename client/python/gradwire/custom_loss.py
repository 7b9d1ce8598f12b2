# SPDX-License-Identifier: Apache-2.0
"""The derivative of a user's loss with respect to log-probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gradwire.datum import Datum
from gradwire.errors import invalid

LossFn = Callable[[Sequence[Datum], list[Any]], tuple[Any, dict[str, float]]]


@dataclasses.dataclass
class LossGradient:
    loss: float
    metrics: dict[str, float]
    gradients: list[np.ndarray]  # dC/dlogprob, float32, by datum


def require_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise invalid(
            "MISSING_DEPENDENCY",
            "forward_backward_custom needs torch; pip install 'gradwire"
            "[torch]'",
        ) from error
    return torch


def differentiate(
    data: Sequence[Datum], logprobs: Sequence[np.ndarray], loss_fn: LossFn
) -> LossGradient:
    """Runs loss_fn on leaf tensors; refuses what would train wrongly."""
    torch = require_torch()
    leaves = [torch.tensor(lp, requires_grad=True) for lp in logprobs]
    with torch.enable_grad():
        answer = loss_fn(data, leaves)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise invalid(
                "BAD_LOSS",
                "the loss must return (scalar tensor, metrics); it returned "
                f"{type(answer).__name__}",
            )
        loss, metrics = answer
        if not torch.is_tensor(loss) or loss.numel() != 1:
            raise invalid(
                "BAD_LOSS",
                "the loss must be a tensor with one element; it is "
                + (
                    f"of shape {list(loss.shape)}"
                    if torch.is_tensor(loss)
                    else type(loss).__name__
                ),
            )
        if not loss.requires_grad:
            raise invalid(
                "NO_GRADIENT",
                "the loss does not depend on any log-probability; compute it "
                "from the tensors that the loss function is given",
            )
        found = torch.autograd.grad(loss.reshape(()), leaves, allow_unused=True)
    gradients = []
    for index, (gradient, lp) in enumerate(zip(found, logprobs, strict=True)):
        if gradient is None:
            raise invalid(
                "NO_GRADIENT",
                f"the loss does not depend on datum {index}; leave it out of "
                "the batch, or add 0 * logprobs.sum()",
                datum_index=index,
            )
        array = gradient.detach().cpu().to(torch.float32).numpy()
        if array.shape != lp.shape:
            raise invalid(
                "SHAPE_MISMATCH",
                f"the gradient of datum {index} has shape {array.shape}, its "
                f"log-probabilities {lp.shape}",
                datum_index=index,
            )
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            position = int(bad[0][0])
            raise invalid(
                "NONFINITE_INPUT",
                f"the gradient of datum {index} at position {position} is "
                f"{array[tuple(bad[0])]}; nothing was sent",
                datum_index=index,
                position=position,
            )
        gradients.append(array)
    value = float(loss.detach())
    if not np.isfinite(value):
        raise invalid("NONFINITE_INPUT", f"the loss is {value}")
    return LossGradient(
        value,
        {name: float(metric) for name, metric in (metrics or {}).items()},
        gradients,
    )
