# SPDX-License-Identifier: Apache-2.0
"""A rank that computes nothing: a test says what it answers.

As a program, which gradwired starts in gradwire_rank's place, it answers by
itself: the logprobs of a datum are its rank, and FAKE_RANK_DELAY seconds pass
for each rank below the last before it sends any.
"""

import argparse
import json
import os
import queue
import signal
import threading
import time

import grpc
from gradwire import wire
from gradwire._proto.gradwire.v1 import (
    data_pb2,
    jobs_pb2,
    operations_pb2,
)
from rank_proto import rank_pb2, rank_pb2_grpc

LONG = 60
VERSION = "0.1.0"
VOCAB = 97

# A file. Then each forward decides something, and a load notes what is known.
CHOICES = "FAKE_RANK_CHOICES"


class FakeRank:
    """One stream to a supervisor. `beat`: seconds between heartbeats, or 0."""

    def __init__(
        self,
        address,
        job_id,
        token,
        rank=0,
        world_size=1,
        version=VERSION,
        beat=0.2,
        credentials=None,
    ):
        self.rank = rank
        self.world_size = world_size
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
        ]
        self._channel = (
            grpc.secure_channel(address, credentials, options)
            if credentials
            else grpc.insecure_channel(address, options)
        )
        self._events = queue.Queue()
        self._commands = queue.Queue()
        self._ended = threading.Event()
        self.error = None
        stub = rank_pb2_grpc.RankServiceStub(self._channel)
        self._call = stub.Connect(iter(self._events.get, None))
        self.send(
            hello=rank_pb2.RankHello(
                job_id=job_id,
                rank=rank,
                pid=os.getpid(),
                join_token=token,
                version=version,
                world_size=world_size,
            )
        )
        threading.Thread(target=self._read, daemon=True).start()
        if beat:
            threading.Thread(
                target=self._beat, args=(beat,), daemon=True
            ).start()

    def _read(self):
        try:
            for command in self._call:
                self._commands.put(command)
        except grpc.RpcError as error:
            self.error = error
        self._ended.set()
        self._events.put(None)
        self._commands.put(None)

    def _beat(self, seconds):
        while not self._ended.wait(seconds):
            self.send(heartbeat=rank_pb2.RankHeartbeat())

    def send(self, **event):
        self._events.put(rank_pb2.RankEvent(**event))

    def next(self, kind=None, seconds=LONG):
        """The next command, or None at the end of the stream."""
        command = self._commands.get(timeout=seconds)
        if kind is not None:
            assert command is not None, self.error
            assert command.WhichOneof("command") == kind, command
        return command

    def has_ended(self, seconds=LONG):
        return self._ended.wait(seconds)

    def close(self):
        """As if the process had gone."""
        self._call.cancel()
        self._channel.close()

    def be_ready(self, quadratic=0.0):
        profile = jobs_pb2.Profile(
            vocab_size=VOCAB,
            max_context_length=64,
            max_top_k=8,
            world_size=self.world_size,
            trainable=True,
            device="fake",
        )
        self.send(
            ready=rank_pb2.RankReady(profile=profile, quadratic=quadratic)
        )

    def exchange(self, address, group=0):
        """What all ranks have given."""
        self.send(address=rank_pb2.RankAddress(group=group, address=address))
        return list(self.next("addresses").addresses.address)

    def send_logprobs(self, command_id, values):
        """values: (index of a datum, its logprobs), in order."""
        logprobs = rank_pb2.RankLogprobs(command_id=command_id)
        for index, numbers in values:
            item = logprobs.chunk.items.add(datum_index=index)
            item.logprobs.CopyFrom(
                wire.encode_tensor(numbers, data_pb2.DATA_TYPE_FLOAT32)
            )
        self.send(logprobs=logprobs)

    def send_done(self, command, version=0, step=0, **result):
        if not result:
            result = default_result(command)
        self.send(
            done=rank_pb2.RankDone(
                command_id=command.command_id,
                weight_version=version,
                optimizer_step=step,
                **result,
            )
        )


def default_result(command):
    """The result that says nothing, of the kind that the command wants."""
    return {
        "forward": {
            "forward": operations_pb2.ForwardResult(
                datum_count=len(command.forward.rank_of)
            )
        },
        "backward": {"backward": operations_pb2.BackwardResult()},
        "optim_step": {"optim_step": operations_pb2.OptimStepResult()},
        "zero_grad": {"zero_grad": operations_pb2.ZeroGradResult()},
        "save_snapshot": {"snapshot": operations_pb2.SnapshotResult()},
        "end_save": {"snapshot": operations_pb2.SnapshotResult()},
        "release_activation_id": {
            "release": operations_pb2.ReleaseActivationsResult()
        },
        "reset": {"dropped_ops": 0},
        "taint": {"dropped_ops": 0},
    }[command.WhichOneof("command")]


def error(reason, **metadata):
    """For send(failed=) and send_done(error=)."""
    return operations_pb2.OperationError(
        code=grpc.StatusCode.UNAVAILABLE.value[0],
        reason=reason,
        message=f"the fake rank says {reason}",
        category="SERVER",
        metadata={key: str(value) for key, value in metadata.items()},
    )


def note_choices(rank, load):
    if CHOICES in os.environ:
        known = [rank.rank, *(choices.decode() for choices in load.choices)]
        with open(os.environ[CHOICES], "a") as file:
            file.write(json.dumps(known) + "\n")


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def serve(rank, delay):
    """Answers commands until the stream ends."""
    held = {}  # own datums, by activation id
    datums, gradients = [], []
    crashes = False
    forwards = 0
    while (command := rank.next()) is not None:
        kind = command.WhichOneof("command")
        if kind == "load":
            address = f"rank {rank.rank}".encode()
            everybody = rank.exchange(address)
            assert everybody[rank.rank] == address
            assert len(set(everybody)) == rank.world_size
            note_choices(rank, command.load)
            rank.be_ready()
        elif kind == "datums":
            datums += command.datums.datums
        elif kind == "gradients":
            gradients += command.gradients.items
        elif kind == "forward":
            if crashes:
                crash()
            forward = command.forward
            own = [i for i, r in enumerate(forward.rank_of) if r == rank.rank]
            forwards += 1
            if CHOICES in os.environ:
                choices = f"rank {rank.rank}, forward {forwards}".encode()
                rank.send(choices=rank_pb2.RankChoices(choices=choices))
            assert len(datums) == len(own)
            held[forward.activation_id] = own
            time.sleep(delay * (rank.world_size - 1 - rank.rank))
            rank.send_logprobs(
                command.command_id,
                [(i, [-float(rank.rank)] * forward.tokens[i]) for i in own],
            )
            rank.send_done(command)
            datums = []
        elif kind == "backward":
            own = held.pop(command.backward.activation_id)
            assert {g.datum_index for g in gradients} <= set(own)
            rank.send_done(command)
            gradients = []
        elif command.save_snapshot.directory.endswith("/crashes"):
            # With what comes beside it, if anything does.
            crashes = True
            threading.Timer(0.5, crash).start()
        elif kind != "joined":
            rank.send_done(command)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--supervisor")
    parser.add_argument("--job_id")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--world_size", type=int)
    args, _ = parser.parse_known_args()
    rank = FakeRank(
        args.supervisor,
        args.job_id,
        os.environ["GRADWIRE_JOIN_TOKEN"],
        args.rank,
        args.world_size,
    )
    serve(rank, float(os.environ.get("FAKE_RANK_DELAY", "0")))


if __name__ == "__main__":
    main()
