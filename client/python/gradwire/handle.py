# SPDX-License-Identifier: Apache-2.0
"""Sequenced access to one model: numbers, uploads, waits, and requests that a
power loss of the server's machine has undone."""

from __future__ import annotations

import concurrent.futures
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from gradwire import wire
from gradwire._proto.gradwire.v1 import data_pb2, operations_pb2, training_pb2
from gradwire.errors import GradwireError, from_operation, invalid, stream_ended
from gradwire.future import Future, Outcome, Workers, in_worker
from gradwire.types import ForwardBackwardResult
from gradwire.unsynced import Request, Unsynced
from gradwire.window import Window, drops_gradients

if TYPE_CHECKING:
    from gradwire.service_client import ServiceClient

_NUM_WORKERS = 64
_WAIT_SECONDS = 30.0
# For what may wait behind a request that was lost.
_MOMENT_SECONDS = 1.0
_MOST_LOSSES = 8  # of one request, in a row
_TELL_SECONDS = 10.0  # after which close() says what it waits for
_LOOK_SECONDS = 1.0  # between two looks whether the server is there
# What of a result comes with the answer to the wait for it.
_ARRAY_BYTES = 1 << 20
_log = logging.getLogger("gradwire")

Started = Callable[[str], None]


class Call(Request, Protocol):
    # Whether the server has taken all of it, where `started` does not say so.
    taken: bool

    def run(self, seq: int, started: Started) -> Any:
        """Sends it and waits for its result."""


class Handle:
    """Calls are executed in the order in which they are made here, whatever
    the order in which their uploads arrive. Thread-safe."""

    def __init__(self, service: ServiceClient, job_id: str, model_id: str):
        self.service = service
        self.job_id = job_id
        self.model_id = model_id
        self._lock = threading.Lock()  # guards the nine below
        self._next_seq = 1
        self._window = Window()
        self._outcomes: list[Outcome] = []
        self._closed = False
        self._open: set[int] = set()  # numbers whose calls are under way
        self._outages = service.patience.outages
        self._sending_again = False
        self._given_up = 0  # the number that was said to be lost for good
        # Numbers whose calls have failed without an outcome that the server
        # has recorded: it may wait for them.
        self._abandoned: set[int] = set()
        self._workers = Workers(_NUM_WORKERS)
        self._unsynced = Unsynced()

    def reserve_after(self, seq: int) -> int | None:
        """The next number, if nothing was submitted after `seq`."""
        with self._lock:
            if self._next_seq != seq + 1:
                return None
            self._next_seq += 1
            self._open.add(seq + 1)
            return seq + 1

    def release(self, seq: int, error: GradwireError | None = None) -> None:
        """Ends what reserve_after has begun: with the failure, if it failed."""
        with self._lock:
            self._open.discard(seq)
            if error is not None and not error.final:
                self._abandoned.add(seq)

    def submit(
        self,
        what: str,
        call: Call,
        *,
        adds_gradient: bool = False,
        ends_window: Callable[[Window], None] | None = None,
    ) -> Future[Any]:
        """The future of a call that takes the next numbers.

        ends_window: gets the window that ends here, under the lock. If the
            call fails, its gradients are there still, and the next window's.
        """
        future: Future[Any] = Future(what)
        inner, operation = future._inner, _Started(self)
        future._on_cancel = operation.cancel

        def run() -> None:
            try:
                result = call.run(seq, operation.set)
            except BaseException as error:
                told = isinstance(error, GradwireError)
                # The server has taken it, and will execute it, though nobody
                # here will know how it ends.
                taken = (operation.is_known() or call.taken) and not (
                    told and error.final
                )
                with self._lock:
                    if adds_gradient and not taken:
                        window.fail()
                    if (
                        ends_window is not None
                        and not taken
                        and not drops_gradients(error)
                    ):
                        window.go_on(following)
                    if told and not error.final and not taken:
                        self._abandoned.update(range(seq, seq + call.width))
                # The server's failures are on its disk before they are
                # answered; what the user's code raised is told it again.
                ended(keep=taken or not told)
                inner.set_exception(error)
            else:
                ended(keep=True)
                inner.set_result(result)

        def ended(keep: bool) -> None:
            if keep:
                self._unsynced.keep(seq, call)
            with self._lock:
                self._open.difference_update(range(seq, seq + call.width))

        with self._lock:
            if self._closed:
                raise invalid(
                    "CLIENT_CLOSED",
                    "the training client is closed; create another one",
                    grpc.StatusCode.FAILED_PRECONDITION,
                )
            seq = self._next_seq
            self._next_seq += call.width
            self._open.update(range(seq, self._next_seq))
            window = self._window
            if adds_gradient:
                window.ops += 1
            if ends_window is not None:
                self._window = Window()
                ends_window(window)
            following = self._window
            self._outcomes = [
                o
                for o in self._outcomes
                if not o.settled() or (o.failed() and not o.read)
            ]
            self._outcomes.append(future._outcome)
            self._workers.submit(run)
        return future

    def settle(self, most_away: float = math.inf) -> None:
        """Waits until every call has its outcome, or until the server has been
        away for so many seconds. Nothing in a loss, which would wait for
        itself."""
        if in_worker():
            return
        with self._lock:
            waiting = {o.inner: o.what for o in self._outcomes}
        began, told = time.monotonic(), False
        while waiting:
            done, _ = concurrent.futures.wait(waiting, _LOOK_SECONDS)
            for inner in done:
                del waiting[inner]
            calls = ", ".join(sorted(set(waiting.values())))
            if waiting and self.service.patience.away_for() >= most_away:
                _log.error(
                    "%d calls on model %s were not waited for, as the server "
                    "is away: %s",
                    len(waiting),
                    self.model_id,
                    calls,
                )
                return
            if waiting and not told:
                told = time.monotonic() - began >= _TELL_SECONDS
                if told:
                    _log.warning(
                        "waiting for %d calls on model %s: %s",
                        len(waiting),
                        self.model_id,
                        calls,
                    )

    def unread(self) -> list[Outcome]:
        """Failures that nobody has read, the oldest first."""
        with self._lock:
            return [o for o in self._outcomes if o.failed() and not o.read]

    def repeat(self, attempt: Callable[[], Any]) -> Any:
        """`attempt`, repeated while the server is away."""

        def after_outages() -> Any:
            self._send_lost(of_new_outages=True)
            return attempt()

        return self.service.patience.run(after_outages)

    def send(self, method: Callable[..., Any], request: Any) -> str:
        """Sends a request; the name of its operation."""
        return self.repeat(lambda: self.service.attempt(method, request)).op_id

    def upload(
        self,
        method: Any,
        request: Any,
        header: Any,
        datums: list[Any],
    ) -> str:
        """Sends a batch; the name of its operation."""
        if wire.fits_header(datums):
            wire.fill_header(header, wire.datum_stream(datums))
            whole = request(header=header)
            return self.send(self.service.send_whole[request], whole)

        def messages() -> Any:
            yield request(header=header)
            for part in wire.datum_stream(datums):
                if isinstance(part, data_pb2.CommitRecord):
                    yield request(commit=part)
                else:
                    yield request(chunk=part)

        return self.repeat(
            lambda: method(messages(), metadata=self.service.call_metadata)
        ).op_id

    def wait(self, op_id: str) -> Any:
        """The operation, done; raises its failure."""
        hold, outages = _MOMENT_SECONDS, self.service.patience.outages

        def attempt() -> Any:
            calm = self.service.patience.outages == outages
            request = operations_pb2.WaitOperationRequest(
                op_id=op_id,
                timeout_seconds=hold if calm else _MOMENT_SECONDS,
                array_bytes=_ARRAY_BYTES,
            )
            wait = self.service.operations.WaitOperation
            return self.service.attempt(wait, request, 2 * _WAIT_SECONDS)

        while True:
            operation = self.repeat(attempt)
            if operation.state == operations_pb2.OPERATION_STATE_DONE:
                self.note_synced(operation)
                return operation
            raise_if_failed(operation)
            outages = self.service.patience.outages
            hold = _WAIT_SECONDS
            if operation.state == operations_pb2.OPERATION_STATE_BLOCKED_ON_GAP:
                hold = _MOMENT_SECONDS
                self._send_lost()

    def result(self, operation: Any, count: int) -> ForwardBackwardResult:
        """Of a finished operation, whose arrays are fetched if they have not
        come with it, and checked against their commit record."""

        def fetch() -> wire.LogprobReader:
            reader = wire.LogprobReader(count)
            for message in self.service.operations.FetchResult(
                operations_pb2.FetchResultRequest(op_id=operation.op_id),
                metadata=self.service.call_metadata,
            ):
                if message.HasField("chunk"):
                    reader.add(message.chunk)
                else:
                    reader.commit(message.commit)
            if not reader.complete:
                raise stream_ended(f"the result of {operation.op_id}")
            return reader

        if operation.HasField("logprobs_commit"):
            reader = wire.LogprobReader(count)
            reader.add(operation.logprobs)
            reader.commit(operation.logprobs_commit)
        else:
            reader = self.repeat(fetch)
        return wire.to_result(reader, operation.forward)

    def raise_if_final(self, *seqs: int) -> None:
        """Raises the failure that is recorded for one of the numbers."""
        for seq in seqs:
            request = operations_pb2.GetOperationRequest(
                model_id=self.model_id, seq_id=seq
            )
            get = self.service.operations.GetOperation
            try:
                raise_if_failed(self.service.call_once(get, request))
            except GradwireError as error:
                if error.final:
                    raise

    def note_synced(self, operation: Any) -> None:
        """Lets go of what a result says is on the server's disk."""
        through = operation.durable_through_seq
        if operation.HasField("optim_step") and not through:
            # A step is answered once it is on the disk: this server has none.
            through = operation.seq_id
        self._unsynced.synced_through(through)

    # What a power loss has undone. It takes an outage, so nothing is asked for
    # while there is none.

    def send_lost_if_missed(self, seq: int) -> None:
        """Sends what was lost if the operation of this number waits for it.

        The server may go away and come back between two calls, none of which
        has then met an outage.
        """
        request = operations_pb2.GetOperationRequest(
            model_id=self.model_id, seq_id=seq
        )
        get = self.service.operations.GetOperation
        try:
            operation = self.service.call_once(get, request)
        except GradwireError:
            return  # whoever waits for the operation is told
        if operation.state == operations_pb2.OPERATION_STATE_BLOCKED_ON_GAP:
            self._send_lost()

    def _send_lost(self, of_new_outages: bool = False) -> None:
        """Begins to send what the server has lost, if it has lost anything.

        In a thread of its own: the first of these may wait for a call that is
        under way and waits here.
        """
        outages = self.service.patience.outages
        with self._lock:
            if of_new_outages and self._outages == outages:
                return
            self._outages = outages
            if self._sending_again:
                return
            if of_new_outages and not self._unsynced.since(0):
                return
            self._sending_again = True
        try:
            threading.Thread(
                target=self._send_again, name="gradwire-lost", daemon=True
            ).start()
        except RuntimeError:  # the interpreter is about to end
            with self._lock:
                self._sending_again = False

    def _send_again(self) -> None:
        try:
            self._send_until_calm()
        except BaseException:
            with self._lock:
                self._sending_again = False
            raise

    def _send_until_calm(self) -> None:
        request = training_pb2.GetModelInfoRequest(model_id=self.model_id)
        info = self.service.training.GetModelInfo
        while True:
            outages = self.service.patience.outages
            try:
                missing = self.service.call(info, request).next_seq_id
                self._send_since(missing)
            except GradwireError as error:
                # The calls that wait for it are told in their turn.
                _log.debug("what is missing was not learned: %s", error)
            with self._lock:
                if self.service.patience.outages == outages:
                    # With the question, so that no later loss goes unseen.
                    self._sending_again = False
                    return

    def _send_since(self, missing: int) -> None:
        lost = self._unsynced.since(missing)
        kept = bool(lost) and lost[0][0] <= missing
        with self._lock:
            self._abandoned = {n for n in self._abandoned if n >= missing}
            abandoned = sorted(self._abandoned)
            to_come = missing in self._open or missing >= self._next_seq
            known = kept or to_come or missing in self._abandoned
            said = self._given_up == missing
            if not known:
                self._given_up = missing
        if not known and not said:
            _log.error(
                "operation %d of model %s was lost by the server and is no "
                "longer kept here; what comes after it will fail with "
                "SEQUENCE_GAP. Load the last checkpoint",
                missing,
                self.model_id,
            )
        for seq, call in lost:
            try:
                call.send_again(seq)
            except GradwireError as error:
                _log.debug("operation %d was not taken again: %s", seq, error)
        for seq in abandoned:
            self._fill(seq)

    def _fill(self, seq: int) -> None:
        """Uses a number that nobody will use, so that the next one's turn
        comes: by a request that the server refuses, which changes nothing."""
        request = training_pb2.OptimStepRequest(
            model_id=self.model_id,
            seq_id=seq,
            params=operations_pb2.AdamParams(learning_rate=-1.0),
        )
        try:
            self.service.call(self.service.training.OptimStep, request)
        except GradwireError as error:
            _log.debug("number %d was offered: %s", seq, error)


class Sequenced:
    """A call of one request and one operation.

    send: sends it under a number; the operation's name.
    read: makes the result of the finished operation.
    """

    width = 1
    taken = False

    def __init__(
        self,
        handle: Handle,
        send: Callable[[int], str],
        read: Callable[[Any], Any],
        size: int = 0,
    ):
        self._handle = handle
        self._send = send
        self._read = read
        self._size = size

    def size(self) -> int:
        return self._size

    def run(self, seq: int, started: Started = lambda op_id: None) -> Any:
        losses = 0
        while True:
            op_id = self._send(seq)
            started(op_id)
            try:
                return self._read(self._handle.wait(op_id))
            except GradwireError as error:
                losses += 1
                lost = error.reason == "OPERATION_NOT_FOUND"
                if not lost or losses == _MOST_LOSSES:
                    raise

    def send_again(self, seq: int) -> None:
        self._send(seq)


def raise_if_failed(operation: Any) -> None:
    if operation.state in (
        operations_pb2.OPERATION_STATE_FAILED,
        operations_pb2.OPERATION_STATE_CANCELLED,
    ):
        raise from_operation(operation.error)


class _Started:
    """The server's name of an operation, once there is one."""

    def __init__(self, handle: Handle):
        self._handle = handle
        self._op_id = ""

    def set(self, op_id: str) -> None:
        self._op_id = op_id

    def is_known(self) -> bool:
        return bool(self._op_id)

    def cancel(self) -> bool:
        if not self._op_id:
            return False
        service = self._handle.service
        operation = service.call(
            service.operations.CancelOperation,
            operations_pb2.CancelOperationRequest(op_id=self._op_id),
        )
        return operation.state == operations_pb2.OPERATION_STATE_CANCELLED
