# SPDX-License-Identifier: Apache-2.0
"""A server without a model that goes away, comes back and loses power.

It keeps numbers, repetitions and commits as docs and protos define them. The
log-probability of a target is minus its id. What it keeps outlives its gRPC
server, as a state directory outlives a process.
"""

import collections
import concurrent.futures
import contextlib
import threading
import time

import grpc
from google.rpc import error_details_pb2, status_pb2
from gradwire import wire
from gradwire._proto.gradwire.v1 import (
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

DONE = operations_pb2.OPERATION_STATE_DONE
FAILED = operations_pb2.OPERATION_STATE_FAILED
CANCELLED = operations_pb2.OPERATION_STATE_CANCELLED
BLOCKED = operations_pb2.OPERATION_STATE_BLOCKED_ON_GAP


def read_batch(header, messages, chunk, commit):
    """The datums that came with a header or behind it, if their commit record
    is right."""
    digest, datums = wire.Digest(), []
    if header.HasField("datums_commit"):
        for datum in header.datums.datums:
            digest.add_datum(datum)
        assert header.datums_commit == digest.commit()
        return list(header.datums.datums)
    for message in messages:
        if message.WhichOneof("message") == commit:
            assert getattr(message, commit) == digest.commit()
            return datums
        for datum in getattr(message, chunk).datums:
            digest.add_datum(datum)
            datums.append(datum)
    raise AssertionError("the batch has no commit record")


def logprobs_of(datums):
    digest, chunk = wire.Digest(), data_pb2.LogprobChunk()
    # Last datum first: items may come in any order.
    for index in reversed(range(len(datums))):
        target = datums[index].loss_fn_inputs["target_tokens"]
        tensor = wire.encode_tensor(
            -wire.decode_tensor(target), data_pb2.DATA_TYPE_FLOAT32
        )
        digest.add_tensor(tensor)
        chunk.items.add(datum_index=index, logprobs=tensor)
    return chunk, digest.commit()


def abort(context, reason, code):
    status = status_pb2.Status(code=code.value[0], message="made by a test")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason))
    details = (("grpc-status-details-bin", status.SerializeToString()),)
    context.set_trailing_metadata(details)
    context.abort(code, status.message)


class FakeServer:
    """`with` starts it; `start` and `stop` are a process's beginning and end.

    ran: what took effect, in order, as (seq, kind).
    cuts: point -> how many connections break there.
    at: point -> what is called there, once.
    fails: seq -> reason of the UNAVAILABLE that is its recorded outcome.
    refuses: seq -> reason for which it is not taken; its number stays open.
    has_log: else a step is never durable.
    hold_seconds: the longest that WaitOperation holds a call.
    """

    def __init__(self):
        self.ran = []
        self.cuts = collections.Counter()
        self.at = {}
        self.fails = {}
        self.refuses = {}
        self.has_log = True
        self.hold_seconds = 30.0
        self.heartbeats = 0
        self.watches = 0
        self.handles = []  # of the one job; the last one may write
        self.requests = {}  # (model_id, seq) -> (kind, content)
        self.operations = {}  # (model_id, seq) -> Operation
        self.batches = {}  # (model_id, seq) -> datums
        self.steps = 0
        self._durable = {}  # model_id -> seq
        self._port = 0
        self._server = None
        self.changed = threading.Condition()

    # Its life.

    @property
    def address(self):
        return f"127.0.0.1:{self._port}"

    def start(self):
        server = grpc.server(concurrent.futures.ThreadPoolExecutor(32))
        for add, servicer in (
            (jobs_pb2_grpc.add_JobServiceServicer_to_server, Jobs),
            (sessions_pb2_grpc.add_SessionServiceServicer_to_server, Sessions),
            (training_pb2_grpc.add_TrainingServiceServicer_to_server, Training),
            (
                operations_pb2_grpc.add_OperationServiceServicer_to_server,
                Operations,
            ),
        ):
            add(servicer(self), server)
        self._port = server.add_insecure_port(f"127.0.0.1:{self._port}")
        server.start()
        self._server = server

    def stop(self):
        server, self._server = self._server, None
        if server is not None:
            server.stop(None).wait()

    def restart(self):
        self.stop()
        self.start()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def lose_power(self):
        """Forgets what was not on the disk."""
        with self.changed:
            for key in list(self.requests):
                model_id, seq = key
                if seq > self._durable.get(model_id, 0):
                    for kept in (self.requests, self.operations, self.batches):
                        kept.pop(key, None)
            self.ran = [
                (seq, kind) for seq, kind in self.ran if self._survives(seq)
            ]

    def _survives(self, seq):
        return seq <= self._durable.get(self.handles[-1], 0)

    def cut(self, context, point):
        """Breaks the connection here, if the test wants it."""
        self.at.pop(point, lambda: None)()
        with self.changed:
            if not self.cuts[point]:
                return
            self.cuts[point] -= 1
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    # Its operations.

    def due(self, model_id):
        seq = 1
        while (model_id, seq) in self.operations:
            seq += 1
        return seq

    def submit(self, context, model_id, seq, kind, content, batch=()):
        key = model_id, seq
        with self.changed:
            if model_id not in self.handles:
                abort(context, "MODEL_NOT_FOUND", grpc.StatusCode.NOT_FOUND)
            if key in self.requests:
                if self.requests[key] != (kind, content):
                    code = grpc.StatusCode.INVALID_ARGUMENT
                    abort(context, "SEQ_REUSED", code)
            elif model_id != self.handles[-1]:
                code = grpc.StatusCode.FAILED_PRECONDITION
                abort(context, "HANDLE_FENCED", code)
            elif seq in self.refuses:
                code = grpc.StatusCode.RESOURCE_EXHAUSTED
                abort(context, self.refuses[seq], code)
            else:
                bad = kind == "optim_step" and content.params.learning_rate < 0
                self.requests[key] = "refused" if bad else kind, content
                self.batches[key] = list(batch)
                self._run(model_id)
                if bad:
                    code = grpc.StatusCode.INVALID_ARGUMENT
                    abort(context, "OPTION_OUT_OF_RANGE", code)
        return training_pb2.OperationRef(op_id=f"{model_id}.{seq}", seq_id=seq)

    def _run(self, model_id):
        while (key := (model_id, self.due(model_id))) in self.requests:
            kind, content = self.requests[key]
            operation = operations_pb2.Operation(
                op_id=f"{model_id}.{key[1]}", seq_id=key[1], state=DONE
            )
            if key[1] in self.fails:
                operation.state = FAILED
                operation.error.code = grpc.StatusCode.UNAVAILABLE.value[0]
                operation.error.reason = self.fails[key[1]]
            elif kind == "abort":
                operation.state = CANCELLED
            elif kind == "optim_step":
                self.steps += 1
                operation.optim_step.optimizer_step = self.steps
                operation.optim_step.effective.CopyFrom(content.params)
                if self.has_log:
                    self._durable[model_id] = key[1]
            elif kind == "backward":
                operation.backward.metrics["loss:sum"] = -1
            elif kind in ("forward", "forward_backward"):
                operation.forward.metrics["loss:sum"] = 5
            self.operations[key] = operation
            self.ran.append((key[1], kind))
            self.changed.notify_all()

    def find(self, context, op_id):
        model_id, seq = op_id.rsplit(".", 1)
        if (model_id, int(seq)) not in self.requests:
            abort(context, "OPERATION_NOT_FOUND", grpc.StatusCode.NOT_FOUND)
        return model_id, int(seq)

    def wait(self, context, op_id, seconds):
        end = time.monotonic() + min(seconds, self.hold_seconds)
        with self.changed:
            while True:
                key = self.find(context, op_id)
                if key in self.operations:
                    return self.finished(key)
                left = end - time.monotonic()
                if left <= 0 or not context.is_active():
                    return operations_pb2.Operation(state=BLOCKED)
                self.changed.wait(min(left, 0.05))

    def finished(self, key):
        operation = operations_pb2.Operation()
        operation.CopyFrom(self.operations[key])
        operation.durable_through_seq = self._durable.get(key[0], 0)
        operation.durable = key[1] <= operation.durable_through_seq
        return operation


class Jobs(jobs_pb2_grpc.JobServiceServicer):
    def __init__(self, server):
        self._server = server

    def GetServerInfo(self, request, context):
        self._server.cut(context, "GetServerInfo")
        return jobs_pb2.ServerInfo(version="fake")

    def CreateJob(self, request, context):
        self._server.cut(context, "CreateJob")
        return jobs_pb2.Job(job_id=request.job_id)

    def WatchJob(self, request, context):
        self._server.watches += 1
        yield jobs_pb2.Job(state=jobs_pb2.JOB_STATE_PENDING)
        if self._server.cuts["end of WatchJob"]:
            self._server.cuts["end of WatchJob"] -= 1
            return
        self._server.cut(context, "WatchJob")
        yield jobs_pb2.Job(state=jobs_pb2.JOB_STATE_RUNNING, ready=True)
        while context.is_active():
            time.sleep(0.02)

    def GetProfile(self, request, context):
        self._server.cut(context, "GetProfile")
        return jobs_pb2.Profile(precision="f32")


class Sessions(sessions_pb2_grpc.SessionServiceServicer):
    def __init__(self, server):
        self._server = server

    def CreateSession(self, request, context):
        self._server.cut(context, "CreateSession")
        config = sessions_pb2.ClientConfig(heartbeat_interval_seconds=0.05)
        return sessions_pb2.CreateSessionResponse(
            session_id="session", config=config
        )

    def Heartbeat(self, request, context):
        with self._server.changed:
            self._server.heartbeats += 1
            self._server.changed.notify_all()
        return sessions_pb2.HeartbeatResponse()

    def FinishSession(self, request, context):
        return sessions_pb2.FinishSessionResponse()


class Training(training_pb2_grpc.TrainingServiceServicer):
    def __init__(self, server):
        self._server = server

    def CreateModel(self, request, context):
        self._server.cut(context, "CreateModel")
        with self._server.changed:
            if self._server.handles and not request.take_over:
                code = grpc.StatusCode.FAILED_PRECONDITION
                abort(context, "MODEL_IN_USE", code)
            self._server.handles.append(f"job.{len(self._server.handles)}")
            return training_pb2.CreateModelResponse(
                model_id=self._server.handles[-1]
            )

    def GetModelInfo(self, request, context):
        self._server.cut(context, "GetModelInfo")
        with self._server.changed:
            return training_pb2.ModelInfo(
                optimizer_step=self._server.steps,
                next_seq_id=self._server.due(request.model_id),
            )

    def _batch(self, requests, context, kind):
        header = next(requests).header
        datums = read_batch(header, requests, "chunk", "commit")
        self._server.cut(context, f"before {kind}")
        ref = self._server.submit(
            context,
            header.model_id,
            header.seq_id,
            kind,
            [d.SerializeToString(deterministic=True) for d in datums],
            datums,
        )
        self._server.cut(context, f"after {kind}")
        return ref

    def Forward(self, requests, context):
        return self._batch(requests, context, "forward")

    def ForwardBackward(self, requests, context):
        return self._batch(requests, context, "forward_backward")

    def _simple(self, request, context, kind):
        self._server.cut(context, f"before {kind}")
        ref = self._server.submit(
            context, request.model_id, request.seq_id, kind, request
        )
        self._server.cut(context, f"after {kind}")
        return ref

    def OptimStep(self, request, context):
        return self._simple(request, context, "optim_step")

    def ZeroGrad(self, request, context):
        return self._simple(request, context, "zero_grad")

    def ForwardBackwardCustom(self, requests, context):
        server, answer = self._server, training_pb2.CustomResponse
        header = next(requests).header
        model_id, seq = header.model_id, header.forward_seq_id
        server.cut(context, "custom header")
        datums = read_batch(header, requests, "datums", "datums_commit")
        content = [d.SerializeToString(deterministic=True) for d in datums]
        ref = server.submit(context, model_id, seq, "forward", content, datums)
        server.cut(context, "custom datums")
        yield answer(forward_accepted=ref)
        forward = server.wait(context, ref.op_id, 60)
        if forward.state == FAILED:
            abort(context, forward.error.reason, grpc.StatusCode.UNAVAILABLE)
        chunk, commit = logprobs_of(datums)
        yield answer(logprobs=chunk)
        server.cut(context, "custom logprobs")
        yield answer(logprobs_commit=commit)
        yield answer(forward_done=forward)
        server.cut(context, "custom forward")
        if server.cuts["end of custom step"]:
            server.cuts["end of custom step"] -= 1
            return
        digest, gradients = wire.Digest(), {}
        kind = ""
        for message in requests:
            kind = message.WhichOneof("message")
            if kind == "abort":
                server.cut(context, "custom abort")
                break
            if kind == "gradients_commit":
                assert message.gradients_commit == digest.commit()
                break
            for item in message.gradients.items:
                digest.add_tensor(item.d_logprobs)
                gradients[item.datum_index] = item.d_logprobs.data
        if kind == "abort":
            server.submit(context, model_id, seq + 1, "abort", "")
            return
        if kind != "gradients_commit":
            abort(context, "MISSING_COMMIT", grpc.StatusCode.INVALID_ARGUMENT)
        server.cut(context, "custom gradients")
        ref = server.submit(context, model_id, seq + 1, "backward", gradients)
        server.cut(context, "custom backward")
        yield answer(backward_accepted=ref)
        backward = server.wait(context, ref.op_id, 60)
        if backward.state == FAILED:
            abort(context, backward.error.reason, grpc.StatusCode.UNAVAILABLE)
        server.cut(context, "custom result")
        yield answer(backward_done=backward)


class Operations(operations_pb2_grpc.OperationServiceServicer):
    def __init__(self, server):
        self._server = server

    def WaitOperation(self, request, context):
        self._server.cut(context, "WaitOperation")
        return self._server.wait(
            context, request.op_id, request.timeout_seconds
        )

    def GetOperation(self, request, context):
        op_id = f"{request.model_id}.{request.seq_id}"
        return self._server.wait(context, op_id, 0)

    def FetchResult(self, request, context):
        self._server.cut(context, "begin of FetchResult")
        with self._server.changed:
            key = self._server.find(context, request.op_id)
            datums = self._server.batches[key]
        chunk, commit = logprobs_of(datums)
        yield operations_pb2.FetchResultResponse(chunk=chunk)
        self._server.cut(context, "FetchResult")
        if self._server.cuts["end of FetchResult"]:
            self._server.cuts["end of FetchResult"] -= 1
            return
        yield operations_pb2.FetchResultResponse(commit=commit)


@contextlib.contextmanager
def away(server):
    """The server is away for the life of the block."""
    server.stop()
    try:
        yield
    finally:
        server.start()
