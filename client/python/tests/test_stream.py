# SPDX-License-Identifier: Apache-2.0
"""What travels between a client and a server, with a server in this process.

The server checks commits and numbers as docs and protos define them; it has no
model: the log-probability of a target is minus its id.
"""

import concurrent.futures
import copy
import types

import grpc
import numpy as np
import pytest

gradwire = pytest.importorskip("gradwire")
if not hasattr(gradwire, "Datum"):
    pytest.skip("the client is not installed", allow_module_level=True)
pytest.importorskip("torch")
from fake_server import DONE, abort, logprobs_of, read_batch  # noqa: E402
from gradwire import wire  # noqa: E402
from gradwire._proto.gradwire.v1 import (  # noqa: E402
    operations_pb2,
    operations_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)


class Training(training_pb2_grpc.TrainingServiceServicer):
    def __init__(self):
        self.results = {}
        self.log = {}
        self.expired = False

    def _done(self, seq, **result):
        op = operations_pb2.Operation(op_id=f"op-{seq}", state=DONE, **result)
        self.results[op.op_id] = op
        return training_pb2.OperationRef(op_id=op.op_id, seq_id=seq)

    def ForwardBackward(self, requests, context):
        header = next(requests).header
        datums = read_batch(header, requests, "chunk", "commit")
        self.log[header.seq_id] = ("forward_backward", datums)
        self.results[f"arrays-op-{header.seq_id}"] = logprobs_of(datums)
        forward = operations_pb2.ForwardResult(metrics={"loss:sum": 5})
        return self._done(header.seq_id, forward=forward)

    def OptimStep(self, request, context):
        self.log[request.seq_id] = ("optim_step", request.params)
        step = operations_pb2.OptimStepResult(
            grad_norm=2, effective=request.params
        )
        return self._done(request.seq_id, optim_step=step)

    def ForwardBackwardCustom(self, requests, context):
        header = next(requests).header
        seq = header.forward_seq_id
        assert header.backward_seq_id == seq + 1
        datums = read_batch(header, requests, "datums", "datums_commit")
        self.log[seq] = ("forward", datums)
        chunk, commit = logprobs_of(datums)
        answer = training_pb2.CustomResponse
        yield answer(forward_accepted=training_pb2.OperationRef(seq_id=seq))
        yield answer(logprobs=chunk)
        yield answer(logprobs_commit=commit)
        done = operations_pb2.Operation(state=DONE)
        done.forward.metrics["tokens:sum"] = 3
        yield answer(forward_done=done)
        digest, gradients = wire.Digest(), {}
        for message in requests:
            kind = message.WhichOneof("message")
            if kind == "abort":
                self.log[seq + 1] = ("abort", message.abort.reason)
                return
            if kind == "gradients_commit":
                assert message.gradients_commit == digest.commit()
                break
            for item in message.gradients.items:
                digest.add_tensor(item.d_logprobs)
                gradients[item.datum_index] = wire.decode_tensor(
                    item.d_logprobs
                ).tolist()
        if self.expired:
            abort(context, "ACTIVATIONS_EXPIRED", grpc.StatusCode.NOT_FOUND)
        self.log[seq + 1] = ("backward", gradients)
        done = operations_pb2.Operation(state=DONE)
        done.backward.metrics["loss:sum"] = -1
        yield answer(backward_done=done)


class Operations(operations_pb2_grpc.OperationServiceServicer):
    def __init__(self, training):
        self._results = training.results

    def WaitOperation(self, request, context):
        return self._results[request.op_id]

    def FetchResult(self, request, context):
        chunk, commit = self._results[f"arrays-{request.op_id}"]
        yield operations_pb2.FetchResultResponse(chunk=chunk)
        yield operations_pb2.FetchResultResponse(commit=commit)


@pytest.fixture
def world():
    training = Training()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(8))
    training_pb2_grpc.add_TrainingServiceServicer_to_server(training, server)
    operations_pb2_grpc.add_OperationServiceServicer_to_server(
        Operations(training), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with gradwire.ServiceClient(address=f"127.0.0.1:{port}") as service:
        client = gradwire.TrainingClient(service, "job", "model")
        yield types.SimpleNamespace(client=client, server=training)
    server.stop(None).wait()


DATA = [
    gradwire.Datum.from_tokens([1, 2, 3]),
    gradwire.Datum.from_tokens([1, 4]),
]


def square(data, logprobs):
    return sum(lp.sum() for lp in logprobs) ** 2, {"mine:mean": 7}


def test_custom_step_sends_the_gradient_and_announces_it(world):
    step = world.client.forward_backward_custom(DATA, square)
    update = world.client.optim_step()
    result = step.result(60)
    assert [lp.tolist() for lp in result.logprobs] == [[-2, -3], [-4]]
    assert result.loss == result.metrics["loss:sum"] == 81
    assert result.metrics["surrogate:sum"] == -1
    assert result.metrics["mine:mean"] == 7
    assert result.metrics["tokens:sum"] == 3
    assert not result.recomputed
    assert update.result(60).grad_norm == 2
    log = world.server.log
    assert log[2] == ("backward", {0: [-18, -18], 1: [-18]})
    kind, params = log[3]
    assert (kind, params.expected_ops) == ("optim_step", 1)
    assert params.eps == 1e-12


def test_the_users_exception_aborts_the_backward(world):
    def broken(data, logprobs):
        raise ZeroDivisionError("mine")

    step = world.client.forward_backward_custom(DATA, broken)
    with pytest.raises(ZeroDivisionError, match="mine"):
        step.result(60)
    assert world.server.log[2] == ("abort", "ZeroDivisionError")
    update = world.client.optim_step()
    update.result(60)
    assert world.server.log[3][1].expected_ops == 0


def test_expired_activations_take_the_two_pass_form(world):
    world.server.expired = True
    calls = []

    data = copy.deepcopy(DATA)

    def counted(data, logprobs):
        calls.append(1)
        # Used for something else by then.
        data[0].loss_fn_inputs["target_tokens"][...] = 7
        return square(data, logprobs)

    result = world.client.forward_backward_custom(data, counted).result(60)
    assert result.recomputed
    assert result.loss == 81
    assert len(calls) == 1
    kind, datums = world.server.log[2]
    assert kind == "forward_backward"
    weights = [wire.decode_tensor(d.loss_fn_inputs["weights"]) for d in datums]
    assert [w.tolist() for w in weights] == [[18, 18], [18]]
    targets = [
        wire.decode_tensor(d.loss_fn_inputs["target_tokens"]) for d in datums
    ]
    assert [t.tolist() for t in targets] == [[2, 3], [4]]


def test_numbers_follow_the_order_of_the_calls(world):
    futures = []
    for _ in range(8):
        futures.append(
            world.client.forward_backward(DATA, loss_fn="cross_entropy")
        )
        futures.append(world.client.optim_step())
    for future in futures:
        future.result(60)
    kinds = [world.server.log[seq][0] for seq in range(1, 17)]
    assert kinds == ["forward_backward", "optim_step"] * 8
    assert np.all(futures[0].result().logprobs[0] == [-2, -3])


def test_closed_client_refuses_calls(world):
    world.client.close()
    with pytest.raises(gradwire.UserError) as caught:
        world.client.optim_step()
    assert caught.value.reason == "CLIENT_CLOSED"
