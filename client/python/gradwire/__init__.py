# SPDX-License-Identifier: Apache-2.0
"""Train a language model on a gradwire server, with the loss in Python."""

from gradwire import logging
from gradwire.datum import Datum, ModelInput
from gradwire.errors import (
    GradwireError,
    ServerError,
    UnreachableError,
    UserError,
)
from gradwire.future import Future
from gradwire.local_server import LocalServer
from gradwire.service_client import ServiceClient
from gradwire.training_client import TrainingClient
from gradwire.types import (
    AdamParams,
    ForwardBackwardResult,
    ForwardResult,
    LoadStateResult,
    OptimStepResult,
    SaveStateResult,
    SnapshotResult,
)

__version__ = "0.1.0"

__all__ = [
    "AdamParams",
    "Datum",
    "ForwardBackwardResult",
    "ForwardResult",
    "Future",
    "GradwireError",
    "LoadStateResult",
    "LocalServer",
    "ModelInput",
    "OptimStepResult",
    "SaveStateResult",
    "ServerError",
    "ServiceClient",
    "SnapshotResult",
    "TrainingClient",
    "UnreachableError",
    "UserError",
    "logging",
]
