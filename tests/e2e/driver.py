# SPDX-License-Identifier: Apache-2.0
"""A client in another network namespace: reads calls, writes answers."""

import json
import sys

import calls
import gradwire
import gradwire.errors
import grpc
from conftest import sequences
from gradwire._proto.gradwire.v1 import jobs_pb2


def describe(job):
    return {
        "state": jobs_pb2.JobState.Name(job.state),
        "ready": job.ready,
        "reason": job.status_reason,
        "message": job.status_message,
        "metadata": dict(job.error.metadata),
    }


def settled(job):
    return job.ready or job.state == jobs_pb2.JOB_STATE_FAILED


class Calls:
    def __init__(self, address):
        self.stubs = calls.Stubs(address)
        self.service = gradwire.ServiceClient(address=address)

    def start(self, job, **spec):
        return self.stubs.start_job(job, **spec)

    def restart(self, job):
        self.stubs.restart_job(job)

    def settle(self, job):
        return describe(self.stubs.watch(job, settled))

    def failed(self, job):
        return describe(
            self.stubs.watch(
                job, lambda j: j.state == jobs_pb2.JOB_STATE_FAILED
            )
        )

    def train(self, job, vocab, steps):
        """The losses of some steps, each waited for."""
        client = calls.attach(self.service, job)
        data = sequences(vocab, (9, 17, 5, 12))
        losses = []
        for _ in range(steps):
            result = client.forward_backward(data, "cross_entropy")
            client.optim_step(gradwire.AdamParams(learning_rate=1e-3)).result()
            losses.append(result.result().metrics["loss:sum"])
        return losses

    def save(self, job, name):
        client = calls.attach(self.service, job)
        return {"path": client.save_state(name).result().path}

    def load(self, job, path):
        client = calls.attach(self.service, job)
        client.load_state_with_optimizer(path).result()

    def delete(self, job):
        self.stubs.delete_job(job)


def main():
    target = Calls(sys.argv[1])
    for line in sys.stdin:
        arguments = json.loads(line)
        call = arguments.pop("call")
        try:
            answer = getattr(target, call)(**arguments)
        except (gradwire.GradwireError, grpc.RpcError) as error:
            if isinstance(error, grpc.RpcError):
                error = gradwire.errors.from_rpc(error)
            answer = {"error": error.reason, "metadata": error.metadata}
        print(json.dumps(answer), flush=True)


main()
