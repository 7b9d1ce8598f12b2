# SPDX-License-Identifier: Apache-2.0
"""The training calls on one model; each returns a future at once."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from gradwire import wire
from gradwire._proto.gradwire.v1 import data_pb2, operations_pb2, training_pb2
from gradwire.custom_loss import LossFn, require_torch
from gradwire.custom_stream import CustomStep
from gradwire.datum import Datum
from gradwire.errors import GradwireError, from_operation, from_rpc, invalid
from gradwire.future import Future, Outcome, Workers
from gradwire.types import (
    AdamParams,
    ForwardBackwardResult,
    ForwardResult,
    LoadStateResult,
    OptimStepResult,
    SaveStateResult,
    SnapshotResult,
)

if TYPE_CHECKING:
    from gradwire.service_client import ServiceClient

_NUM_WORKERS = 64
_WAIT_SECONDS = 30.0
_RETRIES = 5
_FULL_SECONDS = 600.0  # how long a full queue is waited for
_KINDS = {
    "auto": training_pb2.SNAPSHOT_KIND_AUTO,
    "base": training_pb2.SNAPSHOT_KIND_BASE,
    "delta": training_pb2.SNAPSHOT_KIND_DELTA,
    "lora": training_pb2.SNAPSHOT_KIND_LORA,
    "merged_base": training_pb2.SNAPSHOT_KIND_MERGED_BASE,
}
_log = logging.getLogger("gradwire")


class _Window:
    """Gradients between two optimizer steps; counts the announced ones."""

    def __init__(self) -> None:
        self.ops = 0


class TrainingClient:
    """Made by ServiceClient.create_training_client.

    Calls are executed in the order in which they are made here, whatever the
    order in which their uploads arrive. Thread-safe.
    """

    def __init__(self, service: ServiceClient, job_id: str, model_id: str):
        self.service = service
        self.job_id = job_id
        self.model_id = model_id
        self._lock = threading.Lock()  # guards the four below
        self._next_seq = 1
        self._window = _Window()
        self._outcomes: list[Outcome] = []
        self._closed = False
        self._workers = Workers(_NUM_WORKERS)
        self.loss_lock = threading.Lock()  # user code runs once at a time

    # The calls.

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: dict[str, float] | None = None,
        top_k: int = 0,
    ) -> Future[ForwardResult]:
        """Log-probabilities of the targets; changes nothing."""
        datums = self._encode(data)
        loss = training_pb2.LossConfig(loss_fn=loss_fn, config=loss_fn_config)

        def work(seq: int, started: Callable[[str], None]) -> ForwardResult:
            header = training_pb2.ForwardHeader(
                model_id=self.model_id, seq_id=seq, loss=loss, top_k=top_k
            )
            op_id = self._upload(
                self.service.training.Forward,
                training_pb2.ForwardRequest,
                header,
                lambda: wire.datum_stream(datums),
            )
            started(op_id)
            done = self._wait(op_id).forward
            return self.fetch(op_id, len(datums), done)

        return self._submit("forward", work)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: dict[str, float] | None = None,
    ) -> Future[ForwardBackwardResult]:
        """Adds the gradient of a built-in loss (a sum over all positions)."""
        datums = self._encode(data)
        loss = training_pb2.LossConfig(loss_fn=loss_fn, config=loss_fn_config)

        def work(
            seq: int, started: Callable[[str], None]
        ) -> ForwardBackwardResult:
            return self.run_forward_backward(seq, datums, loss, started)

        return self._submit("forward_backward", work, adds_gradient=True)

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: LossFn
    ) -> Future[ForwardBackwardResult]:
        """Adds the gradient of loss_fn(data, logprobs) -> (scalar, metrics).

        The loss runs in a thread of the client, one loss at a time.
        """
        require_torch()
        data = list(data)
        plain = []
        for datum in data:
            names = set(datum.loss_fn_inputs) - {"target_tokens", "weights"}
            if "target_tokens" not in datum.loss_fn_inputs:
                raise invalid(
                    "MISSING_LOSS_INPUT",
                    "forward_backward_custom needs target_tokens in every "
                    "datum; Datum.from_tokens makes them",
                    field="target_tokens",
                )
            # Other arrays are for the user's loss and stay with it.
            inputs = {
                name: value
                for name, value in datum.loss_fn_inputs.items()
                if name not in names
            }
            plain.append(Datum(datum.model_input, inputs))
        datums = self._encode(plain)

        def work(
            seq: int, started: Callable[[str], None]
        ) -> ForwardBackwardResult:
            return CustomStep(self, seq, data, datums, loss_fn).run()

        return self._submit(
            "forward_backward_custom", work, width=2, adds_gradient=True
        )

    def optim_step(
        self, adam_params: AdamParams | None = None
    ) -> Future[OptimStepResult]:
        """One AdamW step on the gradients added since the last one."""
        params = adam_params or AdamParams()
        message = params.to_proto()

        def work(seq: int, started: Callable[[str], None]) -> OptimStepResult:
            request = training_pb2.OptimStepRequest(
                model_id=self.model_id, seq_id=seq, params=message
            )
            done = self._sequenced(
                self.service.training.OptimStep, request, started
            ).optim_step
            return OptimStepResult(
                optimizer_step=done.optimizer_step,
                weight_version=done.weight_version,
                grad_norm=done.grad_norm,
                clip_factor=done.clip_factor,
                loss_tokens=done.loss_tokens,
                sequences=done.sequences,
                skipped=done.skipped,
                metrics=dict(done.metrics),
                effective=AdamParams.from_proto(done.effective),
            )

        def announce(window: _Window, _: _Window) -> None:
            if params.expected_ops is None:
                message.expected_ops = window.ops

        return self._submit("optim_step", work, ends_window=announce)

    def zero_grad(self) -> Future[None]:
        """Drops the gradients added since the last step."""

        def work(seq: int, started: Callable[[str], None]) -> None:
            request = training_pb2.SequencedRequest(
                model_id=self.model_id, seq_id=seq
            )
            self._sequenced(self.service.training.ZeroGrad, request, started)

        return self._submit("zero_grad", work, ends_window=lambda *_: None)

    def save_weights_for_sampler(
        self,
        name: str,
        type: str = "base",
        parent: str | None = None,
        ttl: float | None = None,
    ) -> Future[SnapshotResult]:
        """Exports the weights as they are at this place in the sequence."""
        if type not in _KINDS:
            raise invalid(
                "UNSUPPORTED_OPTION",
                f"type is {type!r}; use one of {', '.join(_KINDS)}",
                grpc.StatusCode.UNIMPLEMENTED,
                field="type",
                value=type,
            )

        def work(seq: int, started: Callable[[str], None]) -> SnapshotResult:
            request = training_pb2.SaveSnapshotRequest(
                model_id=self.model_id,
                seq_id=seq,
                name=name,
                kind=_KINDS[type],
                parent=parent or "",
                ttl_seconds=ttl or 0.0,
            )
            done = self._sequenced(
                self.service.training.SaveSnapshot, request, started
            ).snapshot
            return SnapshotResult(
                path=done.path,
                local_path=done.local_path,
                type=done.type,
                parent=done.parent,
                bytes=done.bytes,
                digest=done.digest,
            )

        return self._submit("save_weights_for_sampler", work)

    def save_state(
        self, name: str, ttl: float | None = None
    ) -> Future[SaveStateResult]:
        """Saves weights, moments and step as they are at this place in the
        sequence. Gradients that were not yet applied are left as they are, and
        are not saved. Training goes on while it is written; another save or a
        load waits. `name` is new in the job."""

        def work(seq: int, started: Callable[[str], None]) -> SaveStateResult:
            request = training_pb2.SaveStateRequest(
                model_id=self.model_id,
                seq_id=seq,
                name=name,
                ttl_seconds=ttl or 0.0,
            )
            done = self._sequenced(
                self.service.training.SaveState, request, started
            ).save_state
            return SaveStateResult(
                path=done.path,
                local_path=done.local_path,
                bytes=done.bytes,
                digest=done.digest,
                weight_version=done.weight_version,
                optimizer_step=done.optimizer_step,
            )

        return self._submit("save_state", work)

    def load_state(self, path: str) -> Future[LoadStateResult]:
        """Puts the weights where `save_state` found them; moments and step
        begin at zero. `path` is what it returned, or a name of this job; any
        job with a model of the same shape can load it. Gradients and kept
        activations are dropped."""
        return self._load_state("load_state", path, optimizer=False)

    def load_state_with_optimizer(self, path: str) -> Future[LoadStateResult]:
        """`load_state`, with moments and step: training goes on as if it had
        never stopped."""
        return self._load_state(
            "load_state_with_optimizer", path, optimizer=True
        )

    def _load_state(
        self, what: str, path: str, optimizer: bool
    ) -> Future[LoadStateResult]:
        dropped: list[_Window] = []  # and the one that follows

        def work(seq: int, started: Callable[[str], None]) -> LoadStateResult:
            request = training_pb2.LoadStateRequest(
                model_id=self.model_id,
                seq_id=seq,
                ref=path,
                optimizer=optimizer,
            )
            try:
                done = self._sequenced(
                    self.service.training.LoadState, request, started
                ).load_state
            except GradwireError:
                # The gradients are still there.
                with self._lock:
                    dropped[1].ops += dropped[0].ops
                raise
            return LoadStateResult(
                path=done.path,
                optimizer=done.optimizer,
                weight_version=done.weight_version,
                optimizer_step=done.optimizer_step,
                dropped_ops=done.dropped_ops,
            )

        return self._submit(
            what, work, ends_window=lambda *windows: dropped.extend(windows)
        )

    def info(self) -> ModelInfo:
        """What the model is and where it stands; answered at once."""
        request = training_pb2.GetModelInfoRequest(model_id=self.model_id)
        found = self.service.call(self.service.training.GetModelInfo, request)
        profile = self.service.get_profile(self.job_id)
        return ModelInfo(
            model_id=found.model_id,
            job_id=found.job_id,
            base_model=found.base_model,
            tokenizer_id=found.tokenizer_id,
            weight_version=found.weight_version,
            optimizer_step=found.optimizer_step,
            precision=profile.precision,
            moment_precision=profile.moment_precision,
            profile=profile,
        )

    def check(self) -> None:
        """Raises the oldest failure that nobody has read."""
        with self._lock:
            outcomes = list(self._outcomes)
        for outcome in outcomes:
            outcome.raise_if_unread()

    def close(self) -> None:
        """No more calls; raises the oldest failure that nobody has read."""
        with self._lock:
            self._closed = True
        self.check()

    def __enter__(self) -> TrainingClient:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            self.close()

    # How they are made.

    def _encode(self, data: Sequence[Datum]) -> list[Any]:
        return [wire.encode_datum(datum) for datum in data]

    def reserve_after(self, seq: int) -> int | None:
        """The next number, if nothing was submitted after `seq`."""
        with self._lock:
            if self._next_seq != seq + 1:
                return None
            self._next_seq += 1
            return seq + 1

    def _submit(
        self,
        what: str,
        work: Callable[[int, Callable[[str], None]], Any],
        *,
        width: int = 1,
        adds_gradient: bool = False,
        ends_window: Callable[[_Window, _Window], None] | None = None,
    ) -> Future[Any]:
        future: Future[Any] = Future(what)
        inner, operation = future._inner, _Started(self)
        future._on_cancel = operation.cancel

        def run() -> None:
            try:
                inner.set_result(work(seq, operation.set))
            except BaseException as error:
                if adds_gradient:
                    with self._lock:
                        window.ops -= 1
                inner.set_exception(error)

        with self._lock:
            if self._closed:
                raise invalid(
                    "CLIENT_CLOSED",
                    "the training client is closed; create another one",
                    grpc.StatusCode.FAILED_PRECONDITION,
                )
            seq = self._next_seq
            self._next_seq += width
            window = self._window
            if adds_gradient:
                window.ops += 1
            if ends_window is not None:
                self._window = _Window()
                ends_window(window, self._window)
            self._outcomes = [
                o
                for o in self._outcomes
                if not o.settled() or (o.failed() and not o.read)
            ]
            self._outcomes.append(future._outcome)
            self._workers.submit(run)
        return future

    def retrying(self, attempt: Callable[[], Any]) -> Any:
        """Repeats what can be repeated: requests are told apart by seq_id."""
        failures = 0
        deadline = time.monotonic() + _FULL_SECONDS
        while True:
            try:
                return attempt()
            except grpc.RpcError as rpc_error:
                error = from_rpc(rpc_error, self.service.address)
            except GradwireError as known:
                error = known
            if error.reason == "QUEUE_FULL" and time.monotonic() < deadline:
                pause = error.retry_after or 0.2
            elif error.code == grpc.StatusCode.UNAVAILABLE and (
                failures < _RETRIES
            ):
                failures += 1
                pause = error.retry_after or 0.1 * 2**failures
            else:
                raise error from None
            _log.debug("again in %.1f s: %s", pause, error)
            time.sleep(pause)

    def _upload(
        self,
        method: Any,
        request: Any,
        header: Any,
        stream: Callable[[], Any],
    ) -> str:
        def messages() -> Any:
            yield request(header=header)
            for part in stream():
                if isinstance(part, data_pb2.CommitRecord):
                    yield request(commit=part)
                else:
                    yield request(chunk=part)

        return self.retrying(
            lambda: method(messages(), metadata=self.service.call_metadata)
        ).op_id

    def run_forward_backward(
        self,
        seq: int,
        datums: list[Any],
        loss: Any,
        started: Callable[[str], None] = lambda op_id: None,
    ) -> ForwardBackwardResult:
        header = training_pb2.ForwardBackwardHeader(
            model_id=self.model_id, seq_id=seq, loss=loss
        )
        op_id = self._upload(
            self.service.training.ForwardBackward,
            training_pb2.ForwardBackwardRequest,
            header,
            lambda: wire.datum_stream(datums),
        )
        started(op_id)
        result = self.fetch(op_id, len(datums), self._wait(op_id).forward)
        result.loss = result.metrics.get("loss:sum", 0.0)
        return result

    def _sequenced(
        self, method: Any, request: Any, started: Callable[[str], None]
    ) -> Any:
        ref = self.retrying(lambda: self.service.call(method, request))
        started(ref.op_id)
        return self._wait(ref.op_id)

    def _wait(self, op_id: str) -> Any:
        request = operations_pb2.WaitOperationRequest(
            op_id=op_id, timeout_seconds=_WAIT_SECONDS
        )
        while True:
            operation = self.retrying(
                lambda: self.service.call(
                    self.service.operations.WaitOperation,
                    request,
                    2 * _WAIT_SECONDS,
                )
            )
            if operation.state == operations_pb2.OPERATION_STATE_DONE:
                return operation
            if operation.state in (
                operations_pb2.OPERATION_STATE_FAILED,
                operations_pb2.OPERATION_STATE_CANCELLED,
            ):
                raise from_operation(operation.error)

    def fetch(self, op_id: str, count: int, done: Any) -> ForwardBackwardResult:
        """The arrays of a finished operation, checked against the commit."""

        def attempt() -> wire.LogprobReader:
            reader = wire.LogprobReader(count)
            for message in self.service.operations.FetchResult(
                operations_pb2.FetchResultRequest(op_id=op_id),
                metadata=self.service.call_metadata,
            ):
                if message.HasField("chunk"):
                    reader.add(message.chunk)
                else:
                    reader.commit(message.commit)
            if not reader.complete:
                reader.commit(data_pb2.CommitRecord(datum_count=-1))
            return reader

        return to_result(self.retrying(attempt), done)


@dataclasses.dataclass
class ModelInfo:
    model_id: str
    job_id: str
    base_model: str
    tokenizer_id: str
    weight_version: int
    optimizer_step: int
    precision: str
    moment_precision: str
    profile: Any


def to_result(reader: wire.LogprobReader, done: Any) -> ForwardBackwardResult:
    with_top_k = any(k is not None for k in reader.top_k_indices)
    logprobs: list[np.ndarray] = reader.logprobs
    return ForwardBackwardResult(
        logprobs=logprobs,
        metrics=dict(done.metrics),
        weight_version=done.weight_version,
        optimizer_step=done.optimizer_step,
        top_k_logprobs=reader.top_k_logprobs if with_top_k else None,
        top_k_indices=reader.top_k_indices if with_top_k else None,
    )


class _Started:
    """The server's name of an operation, once there is one."""

    def __init__(self, client: TrainingClient):
        self._client = client
        self._op_id = ""

    def set(self, op_id: str) -> None:
        self._op_id = op_id

    def cancel(self) -> bool:
        if not self._op_id:
            return False
        service = self._client.service
        operation = service.call(
            service.operations.CancelOperation,
            operations_pb2.CancelOperationRequest(op_id=self._op_id),
        )
        return operation.state == operations_pb2.OPERATION_STATE_CANCELLED
