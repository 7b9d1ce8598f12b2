# SPDX-License-Identifier: Apache-2.0
"""Parameters and results of the training calls."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from gradwire._proto.gradwire.v1 import operations_pb2 as ops
from gradwire.errors import invalid

_NORMALIZATION = {
    "none": ops.GRADIENT_NORMALIZATION_NONE,
    "num_loss_tokens": ops.GRADIENT_NORMALIZATION_NUM_LOSS_TOKENS,
    "num_sequences": ops.GRADIENT_NORMALIZATION_NUM_SEQUENCES,
}
_NORM_METRICS = {
    "off": ops.GRADIENT_NORM_METRICS_OFF,
    "basic": ops.GRADIENT_NORM_METRICS_BASIC,
    "detailed": ops.GRADIENT_NORM_METRICS_DETAILED,
}


def _choice(field: str, value: str, known: dict[str, int]) -> int:
    if value not in known:
        raise invalid(
            "UNSUPPORTED_OPTION",
            f"{field} is {value!r}; use one of {', '.join(known)}",
            field=field,
            value=value,
        )
    return known[value]


def _name(value: int, known: dict[str, int]) -> str:
    return next((k for k, v in known.items() if v == value), "none")


@dataclasses.dataclass(frozen=True)
class AdamParams:
    """AdamW as torch does it; every field may change on every step."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0  # 0 = off
    normalization: str = "none"
    grad_norm_metrics: str = "basic"
    expected_ops: int | None = None  # filled in by the client

    def to_proto(self) -> ops.AdamParams:
        return ops.AdamParams(
            learning_rate=self.learning_rate,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            grad_clip_norm=self.grad_clip_norm,
            normalization=_choice(
                "normalization", self.normalization, _NORMALIZATION
            ),
            grad_norm_metrics=_choice(
                "grad_norm_metrics", self.grad_norm_metrics, _NORM_METRICS
            ),
            expected_ops=self.expected_ops,
        )

    @classmethod
    def from_proto(cls, params: Any) -> AdamParams:
        return cls(
            params.learning_rate,
            params.beta1,
            params.beta2,
            params.eps,
            params.weight_decay,
            params.grad_clip_norm,
            _name(params.normalization, _NORMALIZATION),
            _name(params.grad_norm_metrics, _NORM_METRICS),
            params.expected_ops if params.HasField("expected_ops") else None,
        )


@dataclasses.dataclass
class ForwardResult:
    logprobs: list[np.ndarray]  # float32, shaped like target_tokens
    metrics: dict[str, float]
    weight_version: int
    optimizer_step: int
    top_k_logprobs: list[np.ndarray] | None = None
    top_k_indices: list[np.ndarray] | None = None


@dataclasses.dataclass
class ForwardBackwardResult(ForwardResult):
    loss: float = 0.0
    recomputed: bool = False  # whether the server ran the forward again


@dataclasses.dataclass
class OptimStepResult:
    optimizer_step: int
    weight_version: int
    grad_norm: float
    clip_factor: float
    loss_tokens: int
    sequences: int
    skipped: bool
    metrics: dict[str, float]
    effective: AdamParams

    @property
    def learning_rate(self) -> float:
        return self.effective.learning_rate


@dataclasses.dataclass
class SaveStateResult:
    path: str  # gradwire://jobs/<job>/checkpoints/<name>
    local_path: str
    bytes: int
    digest: str
    weight_version: int
    optimizer_step: int


@dataclasses.dataclass
class LoadStateResult:
    path: str
    optimizer: bool  # whether moments and step were loaded, too
    weight_version: int
    optimizer_step: int
    dropped_ops: int  # whose gradients were dropped


@dataclasses.dataclass
class SnapshotResult:
    path: str  # gradwire://jobs/<job>/snapshots/<name>
    local_path: str
    type: str  # "base" or "delta"
    parent: str  # of a delta: the name of the snapshot it applies to
    bytes: int  # of the files with the weights, or the delta
    digest: str  # of that file; of several, of their digests
    weight_id: str = ""  # of the full weights: the same, the same weights
    reason: str = ""  # why it is of this type
    weight_version: int = 0
    optimizer_step: int = 0
