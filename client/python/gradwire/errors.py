# SPDX-License-Identifier: Apache-2.0
"""Every failure as one exception with a reason that programs can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_USER_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
}


class GradwireError(Exception):
    """A refused or failed request.

    code: the gRPC status code. reason: a constant such as SHAPE_MISMATCH, see
    docs/errors.md. metadata: the values the reason is about. category: "USER"
    or "SERVER". retry_after: seconds, or None where a retry is no remedy.
    final: it is the recorded outcome of an operation; a repetition gets the
    same one.
    """

    category = "SERVER"

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "UNKNOWN",
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after
        self.final = False

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class UserError(GradwireError):
    """The request must change before it can succeed."""

    category = "USER"


class ServerError(GradwireError):
    """The request was good; the server could not do it."""

    category = "SERVER"


class UnreachableError(ServerError, ConnectionError):
    """No server answers at the address."""


def invalid(
    reason: str,
    message: str,
    code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT,
    **metadata: Any,
) -> UserError:
    """What the client refuses before it sends anything."""
    values = {name: str(value) for name, value in metadata.items()}
    return UserError(message, code=code, reason=reason, metadata=values)


def closed() -> ServerError:
    return ServerError(
        "the client is closed; make a new ServiceClient",
        code=grpc.StatusCode.CANCELLED,
        reason="CLIENT_CLOSED",
    )


def stream_ended(what: str) -> ServerError:
    """A stream that stopped in the middle, without a word."""
    return ServerError(
        f"{what} ended early; read it again",
        code=grpc.StatusCode.UNAVAILABLE,
        reason="STREAM_ENDED",
    )


def from_operation(error: Any) -> GradwireError:
    """The exception for an OperationError."""
    kind = UserError if error.category == "USER" else ServerError
    made = kind(
        error.message,
        code=_CODES.get(error.code, grpc.StatusCode.UNKNOWN),
        reason=error.reason or "UNKNOWN",
        metadata=error.metadata,
    )
    made.final = True
    return made


def from_rpc(error: Any, address: str = "") -> GradwireError:
    """The exception for a failed call."""
    code = error.code()
    message = error.details() or code.name
    reason, metadata, retry_after = "", {}, None
    for key, value in error.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        status = status_pb2.Status.FromString(value)
        message = status.message or message
        for detail in status.details:
            info = error_details_pb2.ErrorInfo()
            retry = error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                reason, metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(retry):
                delay = retry.retry_delay
                retry_after = delay.seconds + delay.nanos * 1e-9
    if not reason and code == grpc.StatusCode.UNAVAILABLE:
        return UnreachableError(
            f"no gradwire server answers at {address} ({message}); start one "
            "with `gradwire serve`, or set GRADWIRE_ADDRESS to where it runs",
            code=code,
            reason="SERVER_UNREACHABLE",
            metadata={"address": address},
        )
    if not reason and code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        reason = "MESSAGE_TOO_LARGE"
        message += "; send fewer or shorter datums"
    category = metadata.pop("category", "")
    if not category:
        category = "USER" if code in _USER_CODES else "SERVER"
    kind = UserError if category == "USER" else ServerError
    return kind(
        message,
        code=code,
        reason=reason or code.name,
        metadata=metadata,
        retry_after=retry_after,
    )
