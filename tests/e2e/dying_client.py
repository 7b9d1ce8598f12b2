# SPDX-License-Identifier: Apache-2.0
"""A client that goes so far and no further, to be killed there.

    python dying_client.py ADDRESS MODEL_ID SEQ upload|custom

upload: has sent a header and datums, but no commit record. custom: has its
logprobs and has sent half of its gradients. Says "reached" when it is there.
"""

import sys
import threading

import calls
import gradwire
from gradwire import wire
from gradwire._proto.gradwire.v1 import data_pb2, training_pb2


def reached():
    print("reached", flush=True)
    threading.Event().wait()


def without_commit(parts):
    return [p for p in parts if not isinstance(p, data_pb2.CommitRecord)]


def upload(stubs, model_id, seq, data):
    def parts():
        yield from without_commit(calls.batch(data))
        # gRPC asks for the next message once this one is on its way.
        reached()

    calls.Model(stubs, model_id).forward_backward(parts(), seq=seq)


def custom(stubs, model_id, seq, data):
    request = training_pb2.CustomRequest
    delivered = threading.Event()

    def messages():
        yield request(
            header=training_pb2.CustomHeader(
                model_id=model_id, forward_seq_id=seq, backward_seq_id=seq + 1
            )
        )
        for part in calls.batch(data):
            if isinstance(part, data_pb2.CommitRecord):
                yield request(datums_commit=part)
            else:
                yield request(datums=part)
        delivered.wait()
        half = without_commit(calls.gradient_parts(reader.logprobs))
        del half[0].items[len(data) // 2 :]
        yield request(gradients=half[0])
        reached()

    reader = wire.LogprobReader(len(data))
    for message in stubs.training.ForwardBackwardCustom(messages()):
        kind = message.WhichOneof("message")
        if kind == "logprobs":
            reader.add(message.logprobs)
        elif kind == "forward_done":
            delivered.set()


def main():
    address, model_id, seq, where = sys.argv[1:]
    data = [
        gradwire.Datum.from_tokens(range(length)) for length in (9, 17, 5, 12)
    ]
    with calls.Stubs(address) as stubs:
        {"upload": upload, "custom": custom}[where](
            stubs, model_id, int(seq), data
        )


if __name__ == "__main__":
    main()
