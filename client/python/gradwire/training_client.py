# SPDX-License-Identifier: Apache-2.0
"""The training calls on one model; each returns a future at once."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import grpc

from gradwire import wire
from gradwire._proto.gradwire.v1 import training_pb2
from gradwire.custom_loss import LossFn, require_torch
from gradwire.custom_stream import CustomStep
from gradwire.datum import Datum
from gradwire.errors import invalid
from gradwire.future import Future
from gradwire.handle import Handle, Sequenced
from gradwire.types import (
    AdamParams,
    ForwardBackwardResult,
    ForwardResult,
    LoadStateResult,
    OptimStepResult,
    SaveStateResult,
    SnapshotResult,
)
from gradwire.window import Window

_KINDS = {
    "auto": training_pb2.SNAPSHOT_KIND_AUTO,
    "base": training_pb2.SNAPSHOT_KIND_BASE,
    "delta": training_pb2.SNAPSHOT_KIND_DELTA,
    "lora": training_pb2.SNAPSHOT_KIND_LORA,
    "merged_base": training_pb2.SNAPSHOT_KIND_MERGED_BASE,
}


class TrainingClient(Handle):
    """Made by ServiceClient.create_training_client.

    Calls are executed in the order in which they are made here, whatever the
    order in which their uploads arrive. Thread-safe.
    """

    def __init__(self, service: Any, job_id: str, model_id: str):
        super().__init__(service, job_id, model_id)
        self.loss_lock = threading.Lock()  # user code runs once at a time

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: dict[str, float] | None = None,
        top_k: int = 0,
    ) -> Future[ForwardResult]:
        """Log-probabilities of the targets; changes nothing."""
        datums = self._encode(data)
        header = wire.message(
            training_pb2.ForwardHeader,
            model_id=self.model_id,
            loss=_loss_config(loss_fn, loss_fn_config),
            top_k=top_k,
        )

        def send(seq: int) -> str:
            return self.upload(
                self.service.training.Forward,
                training_pb2.ForwardRequest,
                wire.numbered(header, seq),
                datums,
            )

        def read(done: Any) -> ForwardResult:
            return self.result(done, len(datums))

        call = Sequenced(self, send, read, wire.size(datums))
        return self.submit("forward", call)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: dict[str, float] | None = None,
    ) -> Future[ForwardBackwardResult]:
        """Adds the gradient of a built-in loss (a sum over all positions)."""
        datums = self._encode(data)
        loss = _loss_config(loss_fn, loss_fn_config)

        return self.submit(
            "forward_backward",
            self.forward_backward_call(datums, loss),
            adds_gradient=True,
        )

    def forward_backward_call(self, datums: list[Any], loss: Any) -> Sequenced:
        def send(seq: int) -> str:
            header = training_pb2.ForwardBackwardHeader(
                model_id=self.model_id, seq_id=seq, loss=loss
            )
            return self.upload(
                self.service.training.ForwardBackward,
                training_pb2.ForwardBackwardRequest,
                header,
                datums,
            )

        def read(done: Any) -> ForwardBackwardResult:
            result = self.result(done, len(datums))
            result.loss = result.metrics.get("loss:sum", 0.0)
            return result

        return Sequenced(self, send, read, wire.size(datums))

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

        return self.submit(
            "forward_backward_custom",
            CustomStep(self, data, datums, loss_fn),
            adds_gradient=True,
        )

    def optim_step(
        self, adam_params: AdamParams | None = None
    ) -> Future[OptimStepResult]:
        """One AdamW step on the gradients added since the last one."""
        params = adam_params or AdamParams()
        message = params.to_proto()

        def send(seq: int) -> str:
            request = training_pb2.OptimStepRequest(
                model_id=self.model_id, seq_id=seq, params=message
            )
            return self.send(self.service.training.OptimStep, request)

        def read(operation: Any) -> OptimStepResult:
            done = operation.optim_step
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

        def announce(window: Window) -> None:
            if params.expected_ops is None:
                message.expected_ops = window.ops

        call = Sequenced(self, send, read)
        return self.submit("optim_step", call, ends_window=announce)

    def zero_grad(self) -> Future[None]:
        """Drops the gradients added since the last step."""

        def send(seq: int) -> str:
            request = training_pb2.SequencedRequest(
                model_id=self.model_id, seq_id=seq
            )
            return self.send(self.service.training.ZeroGrad, request)

        call = Sequenced(self, send, lambda done: None)
        return self.submit("zero_grad", call, ends_window=lambda _: None)

    def save_weights_for_sampler(
        self,
        name: str,
        type: str = "base",
        parent: str | SnapshotResult | None = None,
        ttl: float | None = None,
    ) -> Future[SnapshotResult]:
        """Exports the weights as they are at this place in the sequence.

        The training goes on while they are written; the result comes when all
        is on the disk.

        `type`: "base", a Hugging Face directory; "delta", the lossless
        difference to `parent`, a snapshot of this job by name or path (the
        newest, unless told); "auto", a base first and then deltas, until a
        base pays again: the result's `type`, `parent` and `reason` say what
        was made and why. `gradwire checkpoint promote` makes a Hugging Face
        directory of any of them. `ttl`: seconds after which the server deletes
        it, unless a later delta needs it.
        """
        if type not in _KINDS:
            raise invalid(
                "UNSUPPORTED_OPTION",
                f"type is {type!r}; use one of {', '.join(_KINDS)}",
                grpc.StatusCode.UNIMPLEMENTED,
                field="type",
                value=type,
            )

        request = wire.message(
            training_pb2.SaveSnapshotRequest,
            model_id=self.model_id,
            name=name,
            kind=_KINDS[type],
            parent=wire.reference(parent or ""),
            ttl_seconds=ttl or 0.0,
        )

        def send(seq: int) -> str:
            save = self.service.training.SaveSnapshot
            return self.send(save, wire.numbered(request, seq))

        def read(operation: Any) -> SnapshotResult:
            done = operation.snapshot
            return SnapshotResult(
                path=done.path,
                local_path=done.local_path,
                type=done.type,
                parent=done.parent,
                bytes=done.bytes,
                digest=done.digest,
                weight_id=done.weight_id,
                reason=done.reason,
                weight_version=done.weight_version,
                optimizer_step=done.optimizer_step,
            )

        call = Sequenced(self, send, read)
        return self.submit("save_weights_for_sampler", call)

    def save_state(
        self,
        name: str,
        ttl: float | None = None,
        *,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> Future[SaveStateResult]:
        """Saves weights, moments and step as they are at this place in the
        sequence. Gradients that were not yet applied are left as they are, and
        are not saved. Training goes on while it is written; another save or a
        load waits.

        name: new in the job, unless `overwrite`.
        ttl: seconds after which the server deletes it. None: never.
        overwrite: take the place of the checkpoint of this name, if there is
            one. It stays until the new one is on the disk.
        user_metadata: kept with it (`get_checkpoint(...).user_metadata`), in
            place of what was kept with one that it replaces. At most 64
            names, and 16 KiB in all.
        """
        request = wire.message(
            training_pb2.SaveStateRequest,
            model_id=self.model_id,
            name=name,
            ttl_seconds=ttl or 0.0,
            overwrite=overwrite,
            user_metadata=user_metadata or {},
        )

        def send(seq: int) -> str:
            save = self.service.training.SaveState
            return self.send(save, wire.numbered(request, seq))

        def read(operation: Any) -> SaveStateResult:
            done = operation.save_state
            return SaveStateResult(
                path=done.path,
                local_path=done.local_path,
                bytes=done.bytes,
                digest=done.digest,
                weight_version=done.weight_version,
                optimizer_step=done.optimizer_step,
            )

        return self.submit("save_state", Sequenced(self, send, read))

    def load_state(
        self, path: str | SaveStateResult
    ) -> Future[LoadStateResult]:
        """Puts the weights where `save_state` found them; moments and step
        begin at zero. `path` is what it returned, or a name of this job; any
        job with a model of the same shape can load it. Gradients and kept
        activations are dropped."""
        return self._load_state("load_state", path, optimizer=False)

    def load_state_with_optimizer(
        self, path: str | SaveStateResult
    ) -> Future[LoadStateResult]:
        """`load_state`, with moments and step: training goes on as if it had
        never stopped."""
        return self._load_state(
            "load_state_with_optimizer", path, optimizer=True
        )

    def _load_state(
        self, what: str, path: str | SaveStateResult, optimizer: bool
    ) -> Future[LoadStateResult]:
        request = wire.message(
            training_pb2.LoadStateRequest,
            model_id=self.model_id,
            ref=wire.reference(path),
            optimizer=optimizer,
        )

        def send(seq: int) -> str:
            load = self.service.training.LoadState
            return self.send(load, wire.numbered(request, seq))

        def read(operation: Any) -> LoadStateResult:
            done = operation.load_state
            return LoadStateResult(
                path=done.path,
                optimizer=done.optimizer,
                weight_version=done.weight_version,
                optimizer_step=done.optimizer_step,
                dropped_ops=done.dropped_ops,
            )

        return self.submit(
            what, Sequenced(self, send, read), ends_window=lambda _: None
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
        for outcome in self.unread():
            outcome.raise_if_unread()

    def close(self, wait: bool = True) -> None:
        """No more calls; raises the oldest failure that nobody has read.

        wait: until all calls have their outcome. Without it those that are
            under way may still be executed, and their failures go unread.
        """
        with self._lock:
            self._closed = True
        if wait:
            self.settle()
        self.check()

    def __enter__(self) -> TrainingClient:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            self.close()

    # How they are made.

    def _encode(self, data: Sequence[Datum]) -> list[Any]:
        return [wire.encode_datum(datum) for datum in data]


def _loss_config(loss_fn: str, config: dict[str, float] | None) -> Any:
    return wire.message(
        training_pb2.LossConfig, loss_fn=loss_fn, config=config or {}
    )


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
