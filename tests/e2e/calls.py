# SPDX-License-Identifier: Apache-2.0
"""Calls below the client: raw stubs, hand-made streams, status details."""

import dataclasses
import re
import uuid

import gradwire
import grpc
from google.rpc import error_details_pb2, status_pb2
from gradwire import wire
from gradwire._proto.gradwire.v1 import (
    checkpoints_pb2_grpc,
    data_pb2,
    jobs_pb2,
    jobs_pb2_grpc,
    operations_pb2,
    operations_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)
from gradwire.errors import from_operation, from_rpc

WAIT_SECONDS = 30.0
FINAL = (
    operations_pb2.OPERATION_STATE_DONE,
    operations_pb2.OPERATION_STATE_FAILED,
    operations_pb2.OPERATION_STATE_CANCELLED,
)


def create_job(service, **spec):
    """Creates a job by any specification and waits until it is ready."""
    with Stubs(service.address) as stubs:
        return stubs.create_job(**spec)


def attach(service, job_id, **options):
    """A training client with a session of its own."""
    with Stubs(service.address) as stubs:
        model_id = stubs.attach(job_id, **options)
    return gradwire.TrainingClient(service, job_id, model_id)


class Stubs:
    """The services of one server on one channel."""

    def __init__(self, address):
        self.address = address
        self.channel = grpc.insecure_channel(
            address, [("grpc.use_local_subchannel_pool", 1)]
        )
        self.jobs = jobs_pb2_grpc.JobServiceStub(self.channel)
        self.sessions = sessions_pb2_grpc.SessionServiceStub(self.channel)
        self.training = training_pb2_grpc.TrainingServiceStub(self.channel)
        self.operations = operations_pb2_grpc.OperationServiceStub(self.channel)
        self.checkpoints = checkpoints_pb2_grpc.CheckpointServiceStub(
            self.channel
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()

    def start_job(self, job_id=None, **spec):
        job_id = job_id or f"job-{uuid.uuid4().hex[:12]}"
        self.jobs.CreateJob(
            jobs_pb2.CreateJobRequest(
                job_id=job_id, spec=jobs_pb2.JobSpec(**spec)
            )
        )
        return job_id

    def watch(self, job_id, stop):
        """The first state of the job for which stop(job) holds."""
        watching = self.jobs.WatchJob(jobs_pb2.WatchJobRequest(job_id=job_id))
        try:
            return next(job for job in watching if stop(job))
        finally:
            watching.cancel()

    def create_job(self, job_id=None, **spec):
        job_id = self.start_job(job_id, **spec)
        job = self.watch(
            job_id,
            lambda job: job.ready or job.state == jobs_pb2.JOB_STATE_FAILED,
        )
        assert job.ready, job
        return job_id

    def delete_job(self, job_id):
        request = jobs_pb2.DeleteJobRequest(job_id=job_id, force=True)
        return self.jobs.DeleteJob(request)

    def restart_job(self, job_id):
        request = jobs_pb2.RestartJobRequest(job_id=job_id)
        return self.jobs.RestartJob(request)

    def new_session(self):
        request = sessions_pb2.CreateSessionRequest()
        return self.sessions.CreateSession(request).session_id

    def attach(self, job_id, session_id=None, take_over=True, **options):
        """The id of a new handle on the job's model."""
        return self.training.CreateModel(
            training_pb2.CreateModelRequest(
                session_id=session_id or self.new_session(),
                model_seq_id=1,
                job_id=job_id,
                take_over=take_over,
                **options,
            )
        ).model_id

    def wait(self, op_id):
        """The operation, final."""
        request = operations_pb2.WaitOperationRequest(
            op_id=op_id, timeout_seconds=WAIT_SECONDS
        )
        while True:
            operation = self.operations.WaitOperation(request)
            if operation.state in FINAL:
                return operation


@dataclasses.dataclass
class Model:
    """A handle. Every method takes the number that is due unless told."""

    stubs: Stubs
    model_id: str

    def info(self):
        request = training_pb2.GetModelInfoRequest(model_id=self.model_id)
        return self.stubs.training.GetModelInfo(request)

    def due(self):
        return self.info().next_seq_id

    def _stream(self, method, request, header, parts):
        def messages():
            yield request(header=header)
            for part in parts:
                if isinstance(part, data_pb2.CommitRecord):
                    yield request(commit=part)
                else:
                    yield request(chunk=part)

        return method(messages())

    def forward(self, parts, seq=None, **header):
        return self._stream(
            self.stubs.training.Forward,
            training_pb2.ForwardRequest,
            training_pb2.ForwardHeader(
                model_id=self.model_id,
                seq_id=self.due() if seq is None else seq,
                **header,
            ),
            parts,
        )

    def forward_backward(
        self, parts, seq=None, loss="cross_entropy", config=None
    ):
        return self._stream(
            self.stubs.training.ForwardBackward,
            training_pb2.ForwardBackwardRequest,
            training_pb2.ForwardBackwardHeader(
                model_id=self.model_id,
                seq_id=self.due() if seq is None else seq,
                loss=training_pb2.LossConfig(loss_fn=loss, config=config),
            ),
            parts,
        )

    def backward(self, activation_id, parts, seq=None):
        return self._stream(
            self.stubs.training.Backward,
            training_pb2.BackwardRequest,
            training_pb2.BackwardHeader(
                model_id=self.model_id,
                seq_id=self.due() if seq is None else seq,
                activation_id=activation_id,
            ),
            parts,
        )

    def optim_step(self, seq=None, **params):
        return self.stubs.training.OptimStep(
            training_pb2.OptimStepRequest(
                model_id=self.model_id,
                seq_id=self.due() if seq is None else seq,
                params=operations_pb2.AdamParams(**params),
            )
        )

    def zero_grad(self, seq=None):
        return self.stubs.training.ZeroGrad(
            training_pb2.SequencedRequest(
                model_id=self.model_id,
                seq_id=self.due() if seq is None else seq,
            )
        )

    def save_snapshot(self, name, seq=None, **options):
        return self.stubs.training.SaveSnapshot(
            training_pb2.SaveSnapshotRequest(
                model_id=self.model_id,
                seq_id=self.due() if seq is None else seq,
                name=name,
                **options,
            )
        )

    def save_state(self, name, seq=None, **options):
        return self.stubs.training.SaveState(
            training_pb2.SaveStateRequest(
                model_id=self.model_id,
                seq_id=self.due() if seq is None else seq,
                name=name,
                **options,
            )
        )

    def load_state(self, ref, **options):
        return self.stubs.training.LoadState(
            training_pb2.LoadStateRequest(
                model_id=self.model_id, seq_id=self.due(), ref=ref, **options
            )
        )

    def result(self, ref):
        """The final operation of a reference; raises its failure."""
        operation = self.stubs.wait(ref.op_id)
        if operation.state != operations_pb2.OPERATION_STATE_DONE:
            raise from_operation(operation.error)
        return operation

    def logprobs(self, ref, count):
        """What FetchResult gives, checked against its commit record."""
        self.result(ref)
        reader = wire.LogprobReader(count)
        request = operations_pb2.FetchResultRequest(op_id=ref.op_id)
        for message in self.stubs.operations.FetchResult(request):
            if message.HasField("chunk"):
                reader.add(message.chunk)
            else:
                reader.commit(message.commit)
        assert reader.complete
        return reader.logprobs

    def nothing_accumulated(self):
        """Ends the window: an optimizer step must find it empty."""
        before = self.info()
        step = self.result(self.optim_step(expected_ops=0)).optim_step
        after = self.info()
        return (
            step.skipped
            and step.loss_tokens == step.sequences == 0
            and before.weight_version == after.weight_version
        )


def encode(data):
    return [wire.encode_datum(datum) for datum in data]


def batch(data):
    """The parts of a streamed batch, the commit record last."""
    return list(wire.datum_stream(encode(data)))


def refusal(stubs, call):
    """The error with which call() is refused, at once or as an operation.

    Checks what every status must have: one ErrorInfo of our domain, a
    category, and a message without paths.
    """
    try:
        operation = stubs.wait(call().op_id)
    except grpc.RpcError as error:
        infos = error_infos(error)
        assert len(infos) == 1, error
        assert infos[0].domain == "gradwire"
        found = from_rpc(error)
    else:
        assert operation.state == operations_pb2.OPERATION_STATE_FAILED
        assert operation.error.category in ("USER", "SERVER")
        found = from_operation(operation.error)
    assert re.fullmatch("[A-Z0-9_]+", found.reason)
    assert "/tmp/" not in found.message and ".cc:" not in found.message
    return found


def create_refusal(stubs, request):
    """The error with which a model is not created."""
    try:
        stubs.training.CreateModel(request)
    except grpc.RpcError as error:
        assert len(error_infos(error)) == 1, error
        return from_rpc(error)
    raise AssertionError("the model was created")


def error_infos(error):
    infos = []
    for key, value in error.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        for detail in status_pb2.Status.FromString(value).details:
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info):
                infos.append(info)
    return infos


def gradient_parts(gradients):
    """The parts of a streamed gradient, the commit record last."""
    return list(wire.gradient_stream(gradients))
