# SPDX-License-Identifier: Apache-2.0
"""One step of a custom loss: a forward and a backward on one stream."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from gradwire import wire
from gradwire._proto.gradwire.v1 import data_pb2, operations_pb2, training_pb2
from gradwire.custom_loss import LossFn, LossGradient, differentiate
from gradwire.datum import Datum
from gradwire.errors import (
    GradwireError,
    ServerError,
    from_rpc,
    stream_ended,
)
from gradwire.handle import Sequenced, raise_if_failed
from gradwire.patience import is_away
from gradwire.types import ForwardBackwardResult

if TYPE_CHECKING:
    from gradwire.training_client import TrainingClient

# After how long with nothing to send it is asked whether the forward waits for
# an earlier number.
_FIRST_LOOK_SECONDS = 1.0
_LAST_LOOK_SECONDS = 30.0


class CustomStep:
    """Uses a number for the forward and the next one for the backward.

    A stream that breaks is taken up again under the same numbers: the server
    repeats what it knows, and the gradient is sent of the loss that was
    computed already.
    """

    width = 2
    taken = False  # the backward

    def __init__(
        self,
        client: TrainingClient,
        data: Sequence[Datum],
        datums: list[Any],
        loss_fn: LossFn,
    ):
        self._client = client
        self._data = data
        self._datums = datums
        self._loss_fn = loss_fn
        # Of the loss, whichever it came to.
        self._loss: LossGradient | None = None
        self._raised: BaseException | None = None
        self._instead: tuple[int, Sequenced] | None = None
        self._result: ForwardBackwardResult | None = None

    def size(self) -> int:
        gradients = [] if self._loss is None else self._loss.gradients
        return wire.size(self._datums) + sum(g.nbytes for g in gradients)

    def run(
        self, seq: int, started: Callable[[str], None]
    ) -> ForwardBackwardResult:
        try:
            backward = self._client.repeat(lambda: self._stream(seq))
        except GradwireError as error:
            if error.reason != "ACTIVATIONS_EXPIRED" or self._loss is None:
                raise
            backward = self._two_pass(seq + 1, error)
        if self._raised is not None:
            raise self._raised
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

    def send_again(self, seq: int) -> None:
        if self._instead is not None:
            number, call = self._instead
            call.send_again(number)
        self._client.repeat(lambda: self._stream(seq))

    def _stream(self, seq: int) -> Any:
        """The backward's result, or None if the loss has raised."""
        outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        reader = wire.LogprobReader(len(self._datums))
        call = self._client.service.training.ForwardBackwardCustom(
            self._requests(seq, outgoing),
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
                    self._finish_forward(reader, message.forward_done)
                    if self._instead is not None:
                        return None
                    self._answer(outgoing)
                elif kind == "backward_accepted":
                    self.taken = True
                elif kind == "backward_done":
                    raise_if_failed(message.backward_done)
                    self._client.note_synced(message.backward_done)
                    return message.backward_done.backward
        except grpc.RpcError as failure:
            error = from_rpc(failure, self._client.service.address)
            if is_away(error):
                raise error from None
            if self._raised is not None:
                return None
            # Such a status may be an operation's outcome, which stays.
            if error.code == grpc.StatusCode.UNAVAILABLE:
                self._client.raise_if_final(seq, seq + 1)
            raise error from None
        finally:
            outgoing.put(None)
            call.cancel()
        if self._raised is not None:
            return None  # the server has closed the backward's number
        raise stream_ended("the stream of the custom step")

    def _requests(self, seq: int, outgoing: Any) -> Any:
        request = training_pb2.CustomRequest
        header = training_pb2.CustomHeader(
            model_id=self._client.model_id,
            forward_seq_id=seq,
            backward_seq_id=seq + 1,
        )
        parts = wire.datum_stream(self._datums)
        if wire.fits_header(self._datums):
            wire.fill_header(header, parts)
        yield request(header=header)
        for part in parts:
            if isinstance(part, data_pb2.CommitRecord):
                yield request(datums_commit=part)
            else:
                yield request(datums=part)
        pause = _FIRST_LOOK_SECONDS
        while True:
            try:
                part = outgoing.get(timeout=pause)
            except queue.Empty:
                # A stream does not say that it waits for what was lost.
                self._client.send_lost_if_missed(seq)
                pause = min(2 * pause, _LAST_LOOK_SECONDS)
                continue
            if part is None:
                return
            yield part

    def _finish_forward(self, reader: Any, operation: Any) -> None:
        """Takes the logprobs and computes the loss, once."""
        raise_if_failed(operation)
        self._client.note_synced(operation)
        if not reader.complete:
            raise ServerError(
                "the forward ended without its commit record",
                reason="RESULT_CORRUPT",
            )
        if self._result is None:
            self._result = wire.to_result(reader, operation.forward)
        if self._loss is not None or self._raised is not None:
            return
        try:
            with self._client.loss_lock:
                self._loss = differentiate(
                    self._data, reader.logprobs, self._loss_fn
                )
        except BaseException as error:
            self._raised = error

    def _answer(self, outgoing: Any) -> None:
        """Sends the loss's gradient, or an abort."""
        request = training_pb2.CustomRequest
        if self._raised is not None:
            reason = type(self._raised).__name__
            outgoing.put(request(abort=training_pb2.CustomAbort(reason=reason)))
        else:
            assert self._loss is not None
            for part in wire.gradient_stream(self._loss.gradients):
                if isinstance(part, data_pb2.CommitRecord):
                    outgoing.put(request(gradients_commit=part))
                else:
                    outgoing.put(request(gradients=part))
        outgoing.put(None)

    def _run_reserved(self, call: Sequenced, seq: int) -> Any:
        try:
            done = call.run(seq)
        except GradwireError as error:
            self._client.release(seq, error)
            raise
        self._client.release(seq)
        return done

    def _two_pass(self, seq: int, error: GradwireError) -> Any:
        """The same gradient as cross-entropy with the weights -dC/dlogprob.

        Takes the backward's number if it is still open, else the next one if
        nothing follows; a step that was already announced would miss it.
        """
        assert self._loss is not None
        datums = []
        # As they were sent, whatever has become of the caller's arrays.
        for sent, gradient in zip(
            self._datums, self._loss.gradients, strict=True
        ):
            datum = data_pb2.Datum()
            datum.CopyFrom(sent)
            datum.loss_fn_inputs["weights"].CopyFrom(
                wire.encode_tensor(-gradient, data_pb2.DATA_TYPE_FLOAT32)
            )
            datums.append(datum)
        loss = training_pb2.LossConfig(loss_fn="cross_entropy")
        call = self._client.forward_backward_call(datums, loss)
        try:
            done = call.run(seq)
        except GradwireError as taken:
            if taken.reason not in ("SEQ_REUSED", "SEQUENCE_CLOSED"):
                raise
            following = self._client.reserve_after(seq)
            if following is None:
                raise error from None
            seq = following
            done = self._run_reserved(call, seq)
        self._instead = seq, call
        return operations_pb2.BackwardResult(
            metrics=done.metrics, recomputed=True
        )
