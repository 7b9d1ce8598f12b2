# SPDX-License-Identifier: Apache-2.0
"""The connection to a server: jobs, and one session for this process."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from gradwire import at_exit, wire
from gradwire._proto.gradwire.v1 import (
    checkpoints_pb2,
    checkpoints_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    operations_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)
from gradwire.errors import (
    GradwireError,
    ServerError,
    UserError,
    from_operation,
    from_rpc,
    invalid,
    stream_ended,
)
from gradwire.patience import DEFAULT_SECONDS, Attempts, Patience
from gradwire.training_client import TrainingClient
from gradwire.types import SaveStateResult

DEFAULT_ADDRESS = "127.0.0.1:7700"
_VERSION = "0.1.0"
_UNARY_SECONDS = 60.0
_DIFF_FORMATS = {
    "dlt1": checkpoints_pb2.DIFF_FORMAT_DLT1,
    "xor": checkpoints_pb2.DIFF_FORMAT_XOR,
    "sparse": checkpoints_pb2.DIFF_FORMAT_SPARSE,
}
_MAX_MESSAGE_BYTES = 64 << 20
_CHANNEL_OPTIONS = [
    # Else a new channel inherits the backoff of one that failed before.
    ("grpc.use_local_subchannel_pool", 1),
    # A server that was restarted is found within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # For all its name: how long connecting may take at least.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.keepalive_time_ms", 30000),
    ("grpc.keepalive_timeout_ms", 10000),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
]
_MODES = {
    "train": training_pb2.MODEL_MODE_TRAIN,
    "base_only": training_pb2.MODEL_MODE_BASE_ONLY,
    "forward_only": training_pb2.MODEL_MODE_FORWARD_ONLY,
}
_log = logging.getLogger("gradwire")


class ServiceClient:
    """Creates and finds jobs; a context manager.

    address: else GRADWIRE_ADDRESS, else 127.0.0.1:7700.
    api_key: else GRADWIRE_API_KEY; sent as a bearer token.
    tls: None or False for plaintext, True for the system's roots, or
        grpc.ChannelCredentials.
    patience: seconds for which a call waits for a server that was there and
        went away; docs/recovery.md. That no server answers at all is said at
        once.
    """

    def __init__(
        self,
        address: str | None = None,
        api_key: str | None = None,
        tls: bool | grpc.ChannelCredentials | None = None,
        patience: float = DEFAULT_SECONDS,
    ):
        self.address = (
            address or os.environ.get("GRADWIRE_ADDRESS") or DEFAULT_ADDRESS
        )
        self.patience = Patience(self.address, patience)
        key = api_key or os.environ.get("GRADWIRE_API_KEY")
        self.call_metadata = (
            (("authorization", f"Bearer {key}"),) if key else ()
        )
        if tls:
            credentials = grpc.ssl_channel_credentials() if tls is True else tls
            self._channel = grpc.secure_channel(
                self.address, credentials, _CHANNEL_OPTIONS
            )
        else:
            self._channel = grpc.insecure_channel(
                self.address, _CHANNEL_OPTIONS
            )
        self._checkpoints = checkpoints_pb2_grpc.CheckpointServiceStub(
            self._channel
        )
        self._jobs = jobs_pb2_grpc.JobServiceStub(self._channel)
        self._sessions = sessions_pb2_grpc.SessionServiceStub(self._channel)
        self.training = training_pb2_grpc.TrainingServiceStub(self._channel)
        # A stream of one message is, on the wire, a unary call; a thread that
        # feeds it would take longer than the way to the server.
        self.send_whole = {
            request: self._channel.unary_unary(
                f"/gradwire.v1.TrainingService/{name}",
                request_serializer=request.SerializeToString,
                response_deserializer=training_pb2.OperationRef.FromString,
            )
            for name, request in (
                ("Forward", training_pb2.ForwardRequest),
                ("ForwardBackward", training_pb2.ForwardBackwardRequest),
            )
        }
        self.operations = operations_pb2_grpc.OperationServiceStub(
            self._channel
        )
        self._lock = threading.Lock()
        self._session_id = ""
        self._num_models = 0
        self._pid = os.getpid()
        self._clients: list[TrainingClient] = []
        at_exit.add(self)

    def attempt(
        self,
        method: Callable[..., Any],
        request: Any,
        timeout: float | None = _UNARY_SECONDS,
    ) -> Any:
        """One call; raises what gRPC raises."""
        return method(request, timeout=timeout, metadata=self.call_metadata)

    def call(
        self,
        method: Callable[..., Any],
        request: Any,
        timeout: float | None = _UNARY_SECONDS,
    ) -> Any:
        """One call, repeated while the server is away; failures become
        GradwireError."""
        return self.patience.run(lambda: self.attempt(method, request, timeout))

    def call_once(
        self,
        method: Callable[..., Any],
        request: Any,
        timeout: float | None = _UNARY_SECONDS,
    ) -> Any:
        """One call; failures become GradwireError."""
        try:
            return self.attempt(method, request, timeout)
        except (grpc.RpcError, ValueError) as error:
            raise self.patience.translate(error) from None

    def get_server_info(self) -> Any:
        return self.call(
            self._jobs.GetServerInfo, jobs_pb2.GetServerInfoRequest()
        )

    def get_job(self, job_id: str) -> Any:
        return self.call(
            self._jobs.GetJob, jobs_pb2.GetJobRequest(job_id=job_id)
        )

    def list_jobs(self, show_deleted: bool = False) -> list[Any]:
        """All jobs, oldest first."""
        jobs: list[Any] = []
        token = ""
        while True:
            request = jobs_pb2.ListJobsRequest(
                page_size=200, page_token=token, show_deleted=show_deleted
            )
            page = self.call(self._jobs.ListJobs, request)
            jobs.extend(page.jobs)
            token = page.next_page_token
            if not token:
                return jobs

    def watch_job(self, job_id: str) -> Iterator[Any]:
        """The job now and at every change, until it is deleted."""
        attempts = Attempts(self.patience)
        while True:
            call = None
            try:
                call = self._jobs.WatchJob(
                    jobs_pb2.WatchJobRequest(job_id=job_id),
                    metadata=self.call_metadata,
                )
                for job in call:
                    attempts.answered()
                    yield job
                    if job.state == jobs_pb2.JOB_STATE_DELETED:
                        return
                # A server that stops ends what it streams in good order.
                raise stream_ended(f"the watch of job {job_id}")
            except (grpc.RpcError, GradwireError, ValueError) as error:
                attempts.failed(error)
            finally:
                if call is not None:
                    call.cancel()

    def delete_job(self, job_id: str, force: bool = False) -> Any:
        """Ends the job; its checkpoints and snapshots stay.

        Waits for saves that run. force: gives them up instead.
        """
        request = jobs_pb2.DeleteJobRequest(job_id=job_id, force=force)
        return self.call(self._jobs.DeleteJob, request, timeout=None)

    def list_checkpoints(
        self, job_id: str = "", *, remote: bool = False
    ) -> list[Any]:
        """Training checkpoints and snapshots of a job, or of all jobs that
        there are or were; oldest first. `kind` says which one is. One that is
        damaged has its `error` set. `object_url` says where its copy in the
        server's object store is; with `remote`, those that are there alone are
        listed as well, and have no `local_path`."""
        rows: list[Any] = []
        token = ""
        while True:
            request = checkpoints_pb2.ListCheckpointsRequest(
                job_id=job_id, page_size=200, page_token=token, remote=remote
            )
            page = self.call(self._checkpoints.ListCheckpoints, request)
            rows.extend(page.checkpoints)
            token = page.next_page_token
            if not token:
                return rows

    def get_checkpoint(self, path: str) -> Any:
        """What a checkpoint or a snapshot holds; `path` is what `save_state` or
        `save_weights_for_sampler` returned."""
        request = checkpoints_pb2.CheckpointRequest(path=path)
        return self.call(self._checkpoints.GetCheckpoint, request)

    def verify_checkpoint(self, path: str) -> Any:
        """Reads all of a checkpoint or snapshot on the server and compares its
        digests; of a delta, those of the weights that it makes as well."""
        request = checkpoints_pb2.CheckpointRequest(path=path)
        return self.call(
            self._checkpoints.VerifyCheckpoint, request, timeout=None
        )

    def delete_checkpoint(self, path: str) -> Any:
        """Deletes a checkpoint or snapshot, be it damaged or not; one that is
        the parent of a delta stays (SNAPSHOT_HAS_CHILDREN)."""
        request = checkpoints_pb2.CheckpointRequest(path=path)
        # A repetition could not tell its own success from a wrong path.
        return self.call_once(
            self._checkpoints.DeleteCheckpoint, request, timeout=None
        )

    def set_checkpoint_ttl(self, path: str, ttl: float | None) -> Any:
        """Changes when the server may delete a checkpoint or snapshot: `ttl`
        seconds after it was made, which may have passed, or never (None)."""
        if ttl is not None and not ttl > 0:
            raise invalid(
                "OPTION_OUT_OF_RANGE",
                f"ttl is {ttl!r}; give seconds above 0, or None: it stays",
                field="ttl",
                value=ttl,
            )
        request = checkpoints_pb2.SetCheckpointTtlRequest(
            path=path, ttl_seconds=ttl or 0.0
        )
        return self.call(self._checkpoints.SetCheckpointTtl, request)

    def fetch_checkpoint(self, path: str) -> Any:
        """Brings a checkpoint or snapshot that is in the object store alone
        back to the server's disk, with what it needs. `load_state` does so by
        itself."""
        request = checkpoints_pb2.CheckpointRequest(path=path)
        return self.call(
            self._checkpoints.FetchCheckpoint, request, timeout=None
        )

    def promote_checkpoint(self, path: str, model_id: str) -> Any:
        """Makes of a snapshot, base or delta, a Hugging Face directory of its
        own on the server; the result's `local_path` says where. The same call
        again returns the same."""
        request = checkpoints_pb2.PromoteCheckpointRequest(
            path=path, model_id=model_id
        )
        return self.call(
            self._checkpoints.PromoteCheckpoint, request, timeout=None
        )

    def diff_checkpoints(self, before: str, after: str) -> Any:
        """What has changed from one snapshot to another: tensors, elements, and
        the sizes of a delta and of the full weights."""
        request = checkpoints_pb2.DiffCheckpointsRequest(to=after)
        setattr(request, "from", before)
        return self.call(
            self._checkpoints.DiffCheckpoints, request, timeout=None
        )

    def export_diff(
        self, before: str, after: str, file: Any, format: str = "dlt1"
    ) -> int:
        """Writes the change from one snapshot to another to `file`, which is
        open for writing bytes, as a safetensors file: "dlt1", gradwire's own
        (docs/delta.md), "xor", each tensor's XOR as a zstd frame, or "sparse",
        indices and values. Returns its size."""
        if format not in _DIFF_FORMATS:
            raise invalid(
                "UNSUPPORTED_OPTION",
                f"format is {format!r}; use one of {', '.join(_DIFF_FORMATS)}",
                grpc.StatusCode.UNIMPLEMENTED,
                field="format",
                value=format,
            )
        request = checkpoints_pb2.ExportDiffRequest(
            to=after, format=_DIFF_FORMATS[format]
        )
        setattr(request, "from", before)
        written, total = 0, 0
        try:
            for part in self._checkpoints.ExportDiff(
                request, metadata=self.call_metadata
            ):
                total = total or part.total_bytes
                written += file.write(part.data)
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from None
        if written != total:
            raise ServerError(
                f"the server sent {written} of {total} bytes; export it again",
                reason="STREAM_ENDED",
            )
        return written

    def restart_job(self, job_id: str) -> Any:
        """Starts a failed job again, where its last operation left it.

        Its training clients are fenced: attach anew with
        create_training_client(..., job_id=job_id). Gradients that were not
        applied are dropped.
        """
        request = jobs_pb2.RestartJobRequest(job_id=job_id)
        return self.call_once(self._jobs.RestartJob, request)

    def get_profile(self, job_id: str) -> Any:
        request = jobs_pb2.GetProfileRequest(job_id=job_id)
        return self.call(self._jobs.GetProfile, request)

    def create_training_client(
        self,
        base_model: str | None,
        *,
        job_id: str | None = None,
        lora: Any = None,
        mode: str = "train",
        precision: str | None = None,
        world_size: int = 1,
        max_context_length: int | None = None,
        activation_bytes: int | None = None,
        init_from: str | SaveStateResult | None = None,
        take_over: bool = False,
        user_metadata: dict[str, str] | None = None,
        moment_precision: str | None = None,
        keep_gathered: bool = False,
        replicas: int = 1,
        with_optimizer: bool = False,
    ) -> TrainingClient:
        """Creates the job, or attaches to it, and waits until it is ready.

        base_model: a Hugging Face directory on the server's machine. A path
            that is a directory here is made absolute. None: that of the job,
            if it exists, or of the checkpoint in init_from.
        job_id: of a job that exists, to go on where it stands, or of a new
            one. None for a new one with a name of its own.
        take_over: attach even if another process has used the model within
            the last 30 s; what that one sends from then on is refused.
        init_from: a checkpoint of `save_state`, of any job, that the job's
            weights begin with. It says how a job begins: attaching to one
            that began so, again, finds what has become of it, and attaching
            to one that began otherwise is refused (MODEL_CONFIG_MISMATCH).
            With mode "forward_only" the job is a frozen reference.
        with_optimizer: with init_from: its moments and step as well, so that
            training goes on as if it had never stopped.
        precision: "f32" or "bf16"; None for the server's choice.
        world_size: ranks that hold the model together.
        moment_precision: of Adam's two moments; "bf16" rounds them
            stochastically and takes half the memory. None for "f32".
        world_size: ranks among which the model is sharded; the server starts
            them, or waits for those that a scheduler has started.
        keep_gathered: of several ranks: gathered weights stay between
            optimizer steps. Faster where memory allows it.
        replicas: groups of ranks that each hold all of the model. Divides
            world_size.
        """
        if mode not in _MODES:
            raise invalid(
                "UNSUPPORTED_OPTION",
                f"mode is {mode!r}; use one of {', '.join(_MODES)}",
                field="mode",
                value=mode,
            )
        if with_optimizer and init_from is None:
            raise invalid(
                "UNSUPPORTED_OPTION",
                "with_optimizer is for init_from; give a checkpoint",
                field="with_optimizer",
                value=True,
            )
        init_from = wire.reference(init_from)
        if base_model is None:
            base_model = self._base_of(job_id, init_from)
        is_named = job_id is not None
        job_id = job_id or f"job-{uuid.uuid4().hex[:12]}"
        base_model = os.fspath(base_model)
        if os.path.isdir(base_model):
            # The server has a working directory of its own.
            base_model = os.path.abspath(base_model)
        spec = wire.message(
            jobs_pb2.JobSpec,
            base_model=base_model,
            precision=precision or "",
            moment_precision=moment_precision or "",
            world_size=world_size,
            keep_gathered=keep_gathered,
            replicas=replicas,
            max_context_length=max_context_length or 0,
            activation_bytes=activation_bytes or 0,
            forward_only=mode == "forward_only",
        )
        request = wire.message(
            training_pb2.CreateModelRequest,
            job_id=job_id,
            base_model=spec.base_model,
            mode=_MODES[mode],
            take_over=take_over,
            user_metadata=user_metadata or {},
        )
        if lora is not None:
            fields = {"rank": lora} if isinstance(lora, int) else dict(lora)
            request.lora.CopyFrom(
                wire.message(training_pb2.LoraConfig, **fields)
            )
            if fields.get("rank"):
                spec.lora.max_rank = fields["rank"]
                spec.lora.max_adapters = 1
        if init_from is not None:
            request.init_from.CopyFrom(
                wire.message(
                    training_pb2.InitFrom,
                    ref=init_from,
                    optimizer=with_optimizer,
                )
            )
        self.call(
            self._jobs.CreateJob,
            jobs_pb2.CreateJobRequest(job_id=job_id, spec=spec),
        )
        self._wait_ready(job_id)
        with self._lock:
            request.session_id = self._session()
            self._num_models += 1
            request.model_seq_id = self._num_models
        try:
            model = self.call(self.training.CreateModel, request)
        except GradwireError:
            if not is_named:  # nobody else knows of it
                self._forget_job(job_id)
            raise
        client = TrainingClient(self, job_id, model.model_id)
        self._clients.append(client)
        return client

    def _forget_job(self, job_id: str) -> None:
        request = jobs_pb2.DeleteJobRequest(job_id=job_id, force=True)
        try:
            self.call_once(self._jobs.DeleteJob, request)
        except GradwireError as error:
            _log.debug("job %s was not deleted: %s", job_id, error)

    def _base_of(self, job_id: str | None, init_from: str | None) -> str:
        """The base model of a job, or of that which made a checkpoint."""
        if job_id is not None:
            try:
                return self.get_job(job_id).spec.base_model
            except GradwireError as error:
                if error.reason != "JOB_NOT_FOUND":
                    raise
        if init_from is None:
            raise invalid(
                "UNSUPPORTED_OPTION",
                "base_model is None, and there is no such job; give a model, "
                "or init_from",
                field="base_model",
                value=None,
            )
        attributes = self.get_checkpoint(init_from).attributes
        if not attributes.get("base_model"):
            raise invalid(
                "UNSUPPORTED_OPTION",
                f"{init_from} does not say what its base model is; give it",
                field="base_model",
                value=None,
            )
        return attributes["base_model"]

    def _wait_ready(self, job_id: str) -> None:
        from gradwire.progress import Progress

        with Progress(f"job {job_id}") as progress:
            for job in self.watch_job(job_id):
                if job.ready:
                    return
                if job.state == jobs_pb2.JOB_STATE_FAILED:
                    raise from_operation(job.error)
                if job.state in (
                    jobs_pb2.JOB_STATE_DELETING,
                    jobs_pb2.JOB_STATE_DELETED,
                    jobs_pb2.JOB_STATE_CANCELLED,
                ):
                    break
                phase = jobs_pb2.JobPhase.Name(job.phase)
                name = phase.removeprefix("JOB_PHASE_").lower()
                progress.update(name, job.progress)
        raise UserError(
            f"job {job_id} was deleted while it started; create another one",
            code=grpc.StatusCode.FAILED_PRECONDITION,
            reason="JOB_DELETED",
            metadata={"job_id": job_id},
        )

    def _session(self) -> str:
        """The session of this client. REQUIRES: the lock is held."""
        if not self._session_id:
            reply = self.call(
                self._sessions.CreateSession,
                sessions_pb2.CreateSessionRequest(client_version=_VERSION),
            )
            self._session_id = reply.session_id
            if reply.warning_message:
                _log.warning("%s", reply.warning_message)
            interval = reply.config.heartbeat_interval_seconds or 10.0
            threading.Thread(
                target=self._beat,
                args=(interval,),
                name="gradwire-heartbeat",
                daemon=True,
            ).start()
        return self._session_id

    def _beat(self, interval: float) -> None:
        request = sessions_pb2.HeartbeatRequest(session_id=self._session_id)
        last = ""
        while not self.patience.closed.wait(interval):
            try:
                self.call(self._sessions.Heartbeat, request, interval)
                last = ""
            except GradwireError as error:
                closing = self.patience.closed.is_set()
                if not closing and error.reason != last:
                    last = error.reason
                    _log.warning("heartbeat failed: %s", error)

    def settle(self, most_away: float) -> None:
        """Waits for the calls of its training clients, unless it is closed or
        the server has been away for so many seconds, and logs the failures
        that nobody has read."""
        if self.patience.closed.is_set() or self._is_forked():
            return
        for client in self._clients:
            client.settle(most_away)
            for outcome in client.unread():
                outcome.tell_if_unread()

    def close(self, wait: bool = True) -> None:
        """Ends the session and the connection; raises unread failures.

        wait: until all calls of its training clients have their outcome.
            Without it, what has not reached the server is not executed.
        """
        if self.patience.closed.is_set() or self._is_forked():
            return
        failure: Exception | None = None
        for client in self._clients:
            try:
                client.close(wait)
            except Exception as error:
                failure = failure or error
        self._finish("success" if failure is None else "errored")
        if failure is not None:
            raise failure

    def _is_forked(self) -> bool:
        """A child has none of the threads, and its parent's connection."""
        return os.getpid() != self._pid

    def _finish(self, reason: str) -> None:
        self.patience.closed.set()
        if self._session_id:
            request = sessions_pb2.FinishSessionRequest(
                session_id=self._session_id, reason=reason
            )
            try:
                self.call_once(self._sessions.FinishSession, request, 2.0)
            except GradwireError as error:
                _log.debug("the session was not finished: %s", error)
        self._channel.close()

    def __enter__(self) -> ServiceClient:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            self.close()
        elif self.patience.closed.is_set() or self._is_forked():
            return
        elif issubclass(kind, SystemExit):
            # The status is the script's; failures are logged.
            at_exit.wait_for(self)
            self._finish("success")
        else:
            self._finish(
                "interrupted" if kind is KeyboardInterrupt else "errored"
            )
