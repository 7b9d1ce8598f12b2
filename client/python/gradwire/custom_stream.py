# SPDX-License-Identifier: Apache-2.0
"""One step of a custom loss: a forward and a backward on one stream."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import grpc

from gradwire import wire
from gradwire._proto.gradwire.v1 import data_pb2, operations_pb2, training_pb2
from gradwire.custom_loss import LossFn, LossGradient, differentiate
from gradwire.datum import Datum
from gradwire.errors import (
    GradwireError,
    ServerError,
    from_operation,
    from_rpc,
)
from gradwire.types import ForwardBackwardResult

if TYPE_CHECKING:
    from gradwire.training_client import TrainingClient


class CustomStep:
    """Uses the numbers `seq` for the forward and `seq + 1` for the backward."""

    def __init__(
        self,
        client: TrainingClient,
        seq: int,
        data: Sequence[Datum],
        datums: list[Any],
        loss_fn: LossFn,
    ):
        self._client = client
        self._seq = seq
        self._data = data
        self._datums = datums
        self._loss_fn = loss_fn
        self._loss: LossGradient | None = None
        self._result: ForwardBackwardResult | None = None

    def run(self) -> ForwardBackwardResult:
        try:
            backward = self._client.retrying(self._stream)
        except GradwireError as error:
            if error.reason != "ACTIVATIONS_EXPIRED" or self._loss is None:
                raise
            backward = self._two_pass(error)
        assert self._result is not None and self._loss is not None
        result, loss = self._result, self._loss
        result.recomputed = backward.recomputed
        result.metrics.update(backward.metrics)
        surrogate = result.metrics.pop("loss:sum", None)
        if surrogate is not None:
            result.metrics["surrogate:sum"] = surrogate
        result.metrics["loss:sum"] = loss.loss
        result.metrics.update(loss.metrics)
        result.loss = loss.loss
        return result

    def _stream(self) -> Any:
        from gradwire.training_client import to_result

        outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        reader = wire.LogprobReader(len(self._datums))
        call = self._client.service.training.ForwardBackwardCustom(
            self._requests(outgoing),
            metadata=self._client.service.call_metadata,
        )
        try:
            for message in call:
                kind = message.WhichOneof("message")
                if kind == "logprobs":
                    reader.add(message.logprobs)
                elif kind == "logprobs_commit":
                    reader.commit(message.logprobs_commit)
                elif kind == "forward_done":
                    _raise_if_failed(message.forward_done)
                    if not reader.complete:
                        raise ServerError(
                            "the forward ended without its commit record",
                            reason="RESULT_CORRUPT",
                        )
                    self._result = to_result(
                        reader, message.forward_done.forward
                    )
                    self._answer(reader, outgoing, call)
                elif kind == "backward_done":
                    _raise_if_failed(message.backward_done)
                    return message.backward_done.backward
        except grpc.RpcError as error:
            raise from_rpc(error, self._client.service.address) from None
        finally:
            outgoing.put(None)
            call.cancel()
        raise ServerError(
            "the stream of the custom step ended early",
            code=grpc.StatusCode.UNAVAILABLE,
            reason="STREAM_ENDED",
        )

    def _requests(self, outgoing: Any) -> Any:
        request = training_pb2.CustomRequest
        yield request(
            header=training_pb2.CustomHeader(
                model_id=self._client.model_id,
                forward_seq_id=self._seq,
                backward_seq_id=self._seq + 1,
            )
        )
        for part in wire.datum_stream(self._datums):
            if isinstance(part, data_pb2.CommitRecord):
                yield request(datums_commit=part)
            else:
                yield request(datums=part)
        while (part := outgoing.get()) is not None:
            yield part

    def _answer(self, reader: Any, outgoing: Any, call: Any) -> None:
        """Computes the loss once and sends its gradient, or an abort."""
        request = training_pb2.CustomRequest
        if self._loss is None:
            try:
                with self._client.loss_lock:
                    self._loss = differentiate(
                        self._data, reader.logprobs, self._loss_fn
                    )
            except BaseException as error:
                abort = training_pb2.CustomAbort(reason=type(error).__name__)
                outgoing.put(request(abort=abort))
                outgoing.put(None)
                # The stream ends once the server has closed the number.
                try:
                    for _ in call:
                        pass
                except grpc.RpcError:
                    pass
                raise
        for part in wire.gradient_stream(self._loss.gradients):
            if isinstance(part, data_pb2.CommitRecord):
                outgoing.put(request(gradients_commit=part))
            else:
                outgoing.put(request(gradients=part))
        outgoing.put(None)

    def _two_pass(self, error: GradwireError) -> Any:
        """The same gradient as cross-entropy with the weights -dC/dlogprob.

        Takes the backward's number if it is still open, else the next one if
        nothing follows; a step that was already announced would miss it.
        """
        assert self._loss is not None
        datums = []
        for datum, gradient in zip(
            self._data, self._loss.gradients, strict=True
        ):
            inputs = {
                "target_tokens": datum.loss_fn_inputs["target_tokens"],
                "weights": -gradient,
            }
            datums.append(wire.encode_datum(Datum(datum.model_input, inputs)))
        loss = training_pb2.LossConfig(loss_fn="cross_entropy")
        seq = self._seq + 1
        try:
            done = self._client.run_forward_backward(seq, datums, loss)
        except GradwireError as taken:
            if taken.reason not in ("SEQ_REUSED", "SEQUENCE_CLOSED"):
                raise
            following = self._client.reserve_after(seq)
            if following is None:
                raise error from None
            done = self._client.run_forward_backward(following, datums, loss)
        return operations_pb2.BackwardResult(
            metrics=done.metrics, recomputed=True
        )


def _raise_if_failed(operation: Any) -> None:
    if operation.state in (
        operations_pb2.OPERATION_STATE_FAILED,
        operations_pb2.OPERATION_STATE_CANCELLED,
    ):
        raise from_operation(operation.error)
