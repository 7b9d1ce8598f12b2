# SPDX-License-Identifier: Apache-2.0
"""A training script goes on when its server goes away, comes back, and has
forgotten what was not on its disk."""

import asyncio
import gc
import itertools
import logging
import subprocess
import sys
import threading
import time
import weakref

import pytest

gradwire = pytest.importorskip("gradwire")
if not hasattr(gradwire, "Datum"):
    pytest.skip("the client is not installed", allow_module_level=True)
pytest.importorskip("torch")
from fake_server import FakeServer, away  # noqa: E402
from gradwire.unsynced import Unsynced  # noqa: E402
from gradwire.window import Window  # noqa: E402

# Of waits that end early where all is well.
LONG = 60
DATA = [
    gradwire.Datum.from_tokens([1, 2, 3]),
    gradwire.Datum.from_tokens([1, 4]),
]
LOGPROBS = [[-2, -3], [-4]]


@pytest.fixture
def server():
    with FakeServer() as server:
        yield server


@pytest.fixture
def service(server):
    service = gradwire.ServiceClient(address=server.address)
    yield service
    try:
        service.close(wait=False)
    except gradwire.GradwireError:
        pass  # a test has read what it wanted to


@pytest.fixture
def client(service):
    return service.create_training_client("model", job_id="job")


def pair(client):
    return (
        client.forward_backward(DATA, "cross_entropy"),
        client.optim_step(),
    )


def logprobs(future):
    return [lp.tolist() for lp in future.result(LONG).logprobs]


class Loss:
    """Counts how often it is computed."""

    def __init__(self, error=None):
        self.calls = 0
        self._error = error

    def __call__(self, data, logprobs):
        self.calls += 1
        if self._error is not None:
            raise self._error
        return sum(lp.sum() for lp in logprobs) ** 2, {}


# The connection.


def test_an_address_without_a_server_is_said_at_once(server):
    server.stop()
    service = gradwire.ServiceClient(address=server.address)
    began = time.monotonic()
    with pytest.raises(gradwire.UnreachableError) as caught:
        service.create_training_client("model")
    assert time.monotonic() - began < service.patience.seconds / 10
    assert str(caught.value).startswith(
        "SERVER_UNREACHABLE: no gradwire server answers at " + server.address
    )
    assert "gradwire serve" in str(caught.value)
    assert "tried for" not in str(caught.value)


def test_calls_wait_for_a_server_that_is_away(server, service, caplog):
    service.get_server_info()
    answers = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(service.get_server_info().version)
        )
        for _ in range(4)
    ]
    with caplog.at_level(logging.WARNING, "gradwire"), away(server):
        for thread in threads:
            thread.start()
        while service.patience.outages == 0:
            time.sleep(0.01)
    for thread in threads:
        thread.join(LONG)
    assert answers == ["fake"] * 4
    texts = [record.getMessage() for record in caplog.records]
    assert len([t for t in texts if "is away" in t]) == 1
    assert len([t for t in texts if "is back after" in t]) == 1
    assert len(texts) == 2
    assert service.patience.outages == 1


def test_late_news_from_before_an_outage_is_no_news(caplog):
    patience = gradwire.patience.Patience("here", 1.0)
    error = gradwire.errors.stream_ended("a call")
    early = time.monotonic()
    with caplog.at_level(logging.WARNING, "gradwire"):
        patience.lost(time.monotonic(), error)
        patience.found(early)  # an answer that was on its way
        assert caplog.text.count("is back") == 0
        patience.found(time.monotonic())
        patience.lost(early, error)  # a failure that was noticed late
    assert patience.outages == 1
    assert caplog.text.count("is away") == caplog.text.count("is back") == 1


def test_a_server_is_found_within_a_second(server, service):
    service.get_server_info()
    found = []

    def call():
        service.get_server_info()
        found.append(time.monotonic())

    thread = threading.Thread(target=call)
    with away(server):
        thread.start()
        time.sleep(1.0)
    back = time.monotonic()
    thread.join(LONG)
    # A longest pause of the call and one of the connection, with its jitter.
    assert found[0] - back < 2.5


def test_patience_ends(server):
    # More than what gRPC waits between two attempts to connect.
    service = gradwire.ServiceClient(address=server.address, patience=3.0)
    service.get_server_info()
    server.stop()
    with pytest.raises(gradwire.UnreachableError, match="tried for") as caught:
        service.get_server_info()
    assert caught.value.reason == "SERVER_UNREACHABLE"
    server.start()
    # The next one begins anew.
    assert service.get_server_info().version == "fake"
    service.close()


def test_a_call_without_an_answer_is_repeated(server, service, monkeypatch):
    service.get_server_info()
    hold, once = threading.Event(), threading.Lock()
    cut = server.cut

    def slow(context, point):
        if once.acquire(blocking=False):
            hold.wait(LONG)
        cut(context, point)

    monkeypatch.setattr(server, "cut", slow)
    request = gradwire.service_client.jobs_pb2.GetServerInfoRequest()
    method = service._jobs.GetServerInfo
    assert service.call(method, request, timeout=0.2).version == "fake"
    hold.set()


def test_closing_ends_the_waiting(server):
    service = gradwire.ServiceClient(address=server.address)
    client = service.create_training_client("model")
    server.stop()
    step = client.optim_step()
    while service.patience.outages == 0:
        time.sleep(0.01)
    service.close(wait=False)
    with pytest.raises(gradwire.GradwireError) as caught:
        step.result(LONG)
    assert caught.value.reason == "CLIENT_CLOSED"


@pytest.mark.parametrize(
    "point",
    [
        "CreateJob",
        "WatchJob",
        "end of WatchJob",
        "CreateSession",
        "CreateModel",
        "GetProfile",
        "GetModelInfo",
    ],
)
def test_a_client_is_created_through_an_interruption(server, service, point):
    service.get_server_info()
    server.cuts[point] = 2
    client = service.create_training_client("model", job_id="job")
    assert client.info().precision == "f32"
    assert server.cuts[point] == 0
    assert len(server.handles) == 1


def test_heartbeats_go_on(server, service, client):
    def beats(number):
        with server.changed:
            assert server.changed.wait_for(
                lambda: server.heartbeats >= number, LONG
            )

    beats(1)
    with away(server):
        while service.patience.outages == 0:
            time.sleep(0.01)
    beats(server.heartbeats + 2)


# Calls on a model, over the end of the server's process.


def test_training_goes_on_over_restarts(server, client):
    futures = []
    for _ in range(12):
        futures += [pair(client)]
        if len(futures) % 3 == 0:
            server.restart()
    for index, (gradient, update) in enumerate(futures):
        assert logprobs(gradient) == LOGPROBS
        assert update.result(LONG).optimizer_step == index + 1
    kinds = ["forward_backward", "optim_step"] * 12
    assert server.ran == list(enumerate(kinds, 1))
    client.check()


@pytest.mark.parametrize(
    "point",
    [
        "before forward_backward",
        "after forward_backward",
        "WaitOperation",
        "FetchResult",
        "end of FetchResult",
        "before optim_step",
        "after optim_step",
    ],
)
def test_a_cut_anywhere_changes_nothing(server, client, point):
    server.cuts[point] = 2
    gradient, update = pair(client)
    assert logprobs(gradient) == LOGPROBS
    assert update.result(LONG).optimizer_step == 1
    assert server.ran == [(1, "forward_backward"), (2, "optim_step")]
    assert server.cuts[point] == 0


CUSTOM_POINTS = [
    "custom header",
    "custom datums",
    "custom logprobs",
    "custom forward",
    "custom gradients",
    "custom backward",
    "custom result",
]


@pytest.mark.parametrize("point", [*CUSTOM_POINTS, "end of custom step"])
def test_the_loss_is_computed_once(server, client, point):
    server.cuts[point] = 2
    loss = Loss()
    step = client.forward_backward_custom(DATA, loss)
    update = client.optim_step()
    assert logprobs(step) == LOGPROBS
    assert step.result().loss == 81
    assert update.result(LONG).optimizer_step == 1
    assert loss.calls == 1
    kinds = ["forward", "backward", "optim_step"]
    assert server.ran == list(enumerate(kinds, 1))
    assert server.cuts[point] == 0
    sent = [d for d in server.requests["job.0", 2][1].values()]
    assert sorted(map(len, sent)) == [4, 8]


def test_a_server_that_ends_while_the_loss_is_computed(server, client):
    loss = Loss()

    def slow(data, logprobs):
        server.restart()
        return loss(data, logprobs)

    step = client.forward_backward_custom(DATA, slow)
    assert step.result(LONG).loss == 81
    assert loss.calls == 1
    assert server.ran == [(1, "forward"), (2, "backward")]


@pytest.mark.parametrize("point", [*CUSTOM_POINTS[:4], "custom abort"])
def test_what_a_loss_raises_gives_its_number_up_all_the_same(
    server, client, point
):
    server.cuts[point] = 2
    loss = Loss(ZeroDivisionError("mine"))
    step = client.forward_backward_custom(DATA, loss)
    with pytest.raises(ZeroDivisionError, match="mine"):
        step.result(LONG)
    assert client.optim_step().result(LONG).optimizer_step == 1
    assert loss.calls == 1
    kinds = ["forward", "abort", "optim_step"]
    assert server.ran == list(enumerate(kinds, 1))


def test_a_recorded_failure_is_not_repeated(server, client):
    server.fails = {1: "COLLECTIVE_TIMEOUT", 2: "COLLECTIVE_FAILED"}
    gradient = client.forward_backward(DATA, "cross_entropy")
    custom = client.forward_backward_custom(DATA, Loss())
    for future, reason in (
        (gradient, "COLLECTIVE_TIMEOUT"),
        (custom, "COLLECTIVE_FAILED"),
    ):
        with pytest.raises(gradwire.GradwireError) as caught:
            future.result(LONG)
        assert caught.value.reason == reason


def test_a_server_that_has_lost_everything_says_so(server, client):
    logprobs(client.forward_backward(DATA, "cross_entropy"))
    with away(server):
        server.requests.clear()
        server.operations.clear()
        server.handles.clear()
    for future in (
        client.forward_backward(DATA, "cross_entropy"),
        client.forward_backward_custom(DATA, Loss()),
        client.optim_step(),
    ):
        with pytest.raises(gradwire.GradwireError) as caught:
            future.result(LONG)
        assert caught.value.reason == "MODEL_NOT_FOUND"


# Power losses.


def test_what_a_power_loss_has_undone_is_sent_again(server, client):
    loss = Loss()
    first = client.forward_backward(DATA, "cross_entropy")
    custom = client.forward_backward_custom(DATA, loss)
    scores = client.forward(DATA[:1])
    assert logprobs(first) == logprobs(custom) == LOGPROBS
    assert logprobs(scores) == LOGPROBS[:1]
    with away(server):
        server.lose_power()
        assert server.ran == []
        update = client.optim_step()
    assert update.result(LONG).optimizer_step == 1
    kinds = [
        "forward_backward",
        "forward",
        "backward",
        "forward",
        "optim_step",
    ]
    assert server.ran == list(enumerate(kinds, 1))
    assert loss.calls == 1
    # Of the next step, nothing of this one is sent again.
    assert client._unsynced.since(0) == []


def test_a_custom_step_waits_behind_what_was_lost(server, client):
    logprobs(client.forward_backward(DATA, "cross_entropy"))
    with away(server):
        server.lose_power()
        step = client.forward_backward_custom(DATA, Loss())
    assert step.result(LONG).loss == 81
    kinds = ["forward_backward", "forward", "backward"]
    assert server.ran == list(enumerate(kinds, 1))


def test_a_custom_step_sends_what_was_lost_unnoticed(server, client):
    logprobs(client.forward_backward(DATA, "cross_entropy"))
    server.lose_power()  # and is back before anything calls it
    step = client.forward_backward_custom(DATA, Loss())
    assert step.result(LONG).loss == 81
    assert client.service.patience.outages == 0
    kinds = ["forward_backward", "forward", "backward"]
    assert server.ran == list(enumerate(kinds, 1))


def test_power_is_lost_again_and_again(server, client):
    for outages in range(1, 6):
        client.forward_backward(DATA, "cross_entropy").result(LONG)
        with away(server):
            server.lose_power()
            while client.service.patience.outages < outages:
                time.sleep(0.01)
    assert client.optim_step().result(LONG).optimizer_step == 1
    kinds = ["forward_backward"] * 5 + ["optim_step"]
    assert server.ran == list(enumerate(kinds, 1))


def test_what_is_waited_for_is_sent_again(server, client):
    with server.changed:  # nothing runs
        server.requests["job.0", 0] = "", ""
    later = client.submit("late", Later(client))
    server.hold_seconds = 0.05
    step = client.optim_step()
    while ("job.0", 2) not in server.requests:
        time.sleep(0.01)
    with away(server):
        server.lose_power()
    later.result(LONG)
    assert step.result(LONG).optimizer_step == 1
    assert server.ran == [(1, "zero_grad"), (2, "optim_step")]


class Later:
    """Holds its number until the one after it has been lost and sent again."""

    width = 1
    taken = False

    def __init__(self, client):
        self._client = client

    def size(self):
        return 0

    def run(self, seq, started):
        while self._client.service.patience.outages == 0:
            time.sleep(0.01)
        self.send_again(seq)

    def send_again(self, seq):
        training = self._client.service.training
        request = gradwire.training_client.training_pb2.SequencedRequest(
            model_id=self._client.model_id, seq_id=seq
        )
        self._client.send(training.ZeroGrad, request)


def test_a_gap_shows_a_loss_that_nobody_noticed(server, client):
    logprobs(client.forward_backward(DATA, "cross_entropy"))
    server.hold_seconds = 0.05
    server.lose_power()
    assert client.optim_step().result(LONG).optimizer_step == 1
    assert client.service.patience.outages == 0
    assert server.ran == [(1, "forward_backward"), (2, "optim_step")]


@pytest.mark.parametrize("point", ["WaitOperation", "begin of FetchResult"])
def test_what_is_no_longer_found_is_sent_again(server, client, point):
    server.at[point] = server.lose_power
    gradient = client.forward_backward(DATA, "cross_entropy")
    assert logprobs(gradient) == LOGPROBS
    client.optim_step().result(LONG)
    assert server.at == {}
    assert server.ran == [(1, "forward_backward"), (2, "optim_step")]


def test_what_can_no_longer_be_sent_is_said(server, client, caplog):
    client._unsynced = Unsynced(limit_bytes=1)
    logprobs(client.forward_backward(DATA, "cross_entropy"))
    server.hold_seconds = 0.05
    server.lose_power()
    with caplog.at_level(logging.ERROR, "gradwire"):
        client.optim_step()
        client.zero_grad()
        while "is no longer kept here" not in caplog.text.replace("\n", " "):
            time.sleep(0.01)
    assert "operation 1 of model job.0 was lost" in caplog.text


def test_a_server_without_a_disk_makes_nobody_keep_anything(server, client):
    server.has_log = False
    for _ in range(3):
        gradient, update = pair(client)
        gradient.result(LONG)
        update.result(LONG)
    client.zero_grad().result(LONG)
    assert [seq for seq, _ in client._unsynced.since(0)] == [7]


def test_requests_are_kept_within_their_limit():
    class Kept:
        def __init__(self, size, width=1):
            self._size, self.width = size, width

        def size(self):
            return self._size

    unsynced = Unsynced(limit_bytes=10)
    unsynced.keep(1, Kept(4))
    unsynced.keep(2, Kept(4, width=2))
    assert [seq for seq, _ in unsynced.since(0)] == [1, 2]
    unsynced.keep(4, Kept(3))  # the oldest goes
    assert [seq for seq, _ in unsynced.since(0)] == [2, 4]
    assert [seq for seq, _ in unsynced.since(3)] == [2, 4]
    assert [seq for seq, _ in unsynced.since(4)] == [4]
    unsynced.synced_through(2)  # one of two numbers is not enough
    assert [seq for seq, _ in unsynced.since(0)] == [2, 4]
    unsynced.synced_through(3)
    assert [seq for seq, _ in unsynced.since(0)] == [4]
    unsynced.keep(5, Kept(7))
    assert [seq for seq, _ in unsynced.since(0)] == [4, 5]
    unsynced.keep(6, Kept(11))  # more than there may be
    assert unsynced.since(0) == []


# A client's own end.


def test_another_process_goes_on(server, client):
    pair(client)[1].result(LONG)
    with gradwire.ServiceClient(address=server.address) as restarted:
        with pytest.raises(gradwire.GradwireError) as caught:
            restarted.create_training_client("model", job_id="job")
        assert caught.value.reason == "MODEL_IN_USE"
        again = restarted.create_training_client(
            "model", job_id="job", take_over=True
        )
        assert again.info().optimizer_step == 1
        assert pair(again)[1].result(LONG).optimizer_step == 2
    with pytest.raises(gradwire.GradwireError) as caught:
        client.optim_step().result(LONG)
    assert caught.value.reason == "HANDLE_FENCED"


# Calls that failed without an outcome that the server has recorded.


@pytest.fixture
def hasty(server):
    server.hold_seconds = 0.05
    return server


def reason_of(future):
    with pytest.raises(gradwire.GradwireError) as caught:
        future.result(LONG)
    return caught.value.reason


@pytest.mark.parametrize("custom", [False, True])
def test_a_full_disk_holds_nothing_up_once_there_is_room(
    hasty, client, caplog, custom
):
    hasty.refuses = {1: "STORAGE_FULL", 3: "STORAGE_FULL"}
    if custom:
        failed = client.forward_backward_custom(DATA, Loss())
        others = [client.zero_grad()]  # 3
    else:
        failed = client.forward_backward(DATA, "cross_entropy")
        logprobs_later = client.forward(DATA)
        others = [client.zero_grad()]
    for future in (failed, *others):
        assert reason_of(future) == "STORAGE_FULL"
    step = client.optim_step()
    with pytest.raises(TimeoutError):
        step.result(0.3)
    hasty.refuses.clear()
    # Of what was refused no gradient is expected, and none is there.
    assert step.result(LONG).effective.expected_ops == 0
    if not custom:
        assert logprobs(logprobs_later) == LOGPROBS
    assert "lost by the server" not in caplog.text
    kinds = dict(hasty.ran)
    assert kinds[1] == kinds[3] == "refused"
    assert kinds[4] == "optim_step"


def test_a_number_that_was_never_sent_is_given_back(server):
    # More than what gRPC waits between two attempts to connect.
    service = gradwire.ServiceClient(address=server.address, patience=3.0)
    client = service.create_training_client("model", job_id="job")
    server.hold_seconds = 0.05
    logprobs(client.forward_backward(DATA, "cross_entropy"))
    with away(server):
        gone = client.forward_backward(DATA, "cross_entropy")
        with pytest.raises(gradwire.UnreachableError):
            gone.result(LONG)
    step = client.optim_step()
    assert step.result(LONG).effective.expected_ops == 1
    kinds = ["forward_backward", "refused", "optim_step"]
    assert server.ran == list(enumerate(kinds, 1))
    service.close()


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda c: c.save_state("a", user_metadata={"e": 5}), "user_metadata"),
        (lambda c: c.save_state(5), "name"),
        (lambda c: c.save_state("a", ttl="1h"), "ttl_seconds"),
        (lambda c: c.load_state(7), "ref"),
        (lambda c: c.save_weights_for_sampler("a", parent=7), "parent"),
        (lambda c: c.forward(DATA, top_k=2.5), "top_k"),
        (lambda c: c.forward(DATA, top_k=2**40), "top_k"),
        (lambda c: c.forward_backward(DATA, 5), "loss_fn"),
        (lambda c: c.forward_backward(DATA, "ppo", {"a": "b"}), "config"),
        (lambda c: c.save_state("a\ud800"), "name"),
    ],
)
def test_an_argument_that_cannot_be_takes_no_number(
    server, client, call, field
):
    with pytest.raises(gradwire.UserError) as caught:
        call(client)
    assert caught.value.reason == "BAD_ARGUMENT"
    assert caught.value.metadata["field"] == field
    assert client.optim_step().result(LONG).optimizer_step == 1
    assert server.ran == [(1, "optim_step")]


# Windows whose end has failed.


@pytest.mark.parametrize("reason", ["OPTION_OUT_OF_RANGE", "CANCELLED"])
def test_a_step_that_failed_leaves_its_gradients(server, client, reason):
    server.fails = {3: reason}
    for _ in range(2):
        logprobs(client.forward_backward(DATA, "cross_entropy"))
    assert reason_of(client.optim_step()) == reason
    logprobs(client.forward_backward(DATA, "cross_entropy"))
    assert client.optim_step().result(LONG).effective.expected_ops == 3


@pytest.mark.parametrize(
    "reason", ["ACCUMULATION_MISMATCH", "GRADIENTS_TAINTED"]
)
def test_a_step_that_dropped_its_gradients_leaves_none(server, client, reason):
    server.fails = {2: reason}
    logprobs(client.forward_backward(DATA, "cross_entropy"))
    assert reason_of(client.optim_step()) == reason
    logprobs(client.forward_backward(DATA, "cross_entropy"))
    assert client.optim_step().result(LONG).effective.expected_ops == 1


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_ends_that_fail_in_any_order_leave_all_gradients(order):
    windows = [Window() for _ in range(4)]
    for window in windows[:3]:
        window.ops = 2
    for i in order:
        windows[i].go_on(windows[i + 1])
    assert windows[3].ops == 6
    windows[0].fail()
    assert windows[3].ops == 5


def test_a_step_that_was_taken_and_given_up_has_ended_its_window(server):
    service = gradwire.ServiceClient(address=server.address, patience=1.0)
    client = service.create_training_client("model", job_id="job")
    logprobs(client.forward_backward(DATA, "cross_entropy"))
    server.at["after optim_step"] = lambda: server.cuts.update(
        WaitOperation=10**6
    )
    step = client.optim_step()
    with pytest.raises(gradwire.GradwireError):
        step.result(LONG)
    server.cuts.clear()
    logprobs(client.forward_backward(DATA, "cross_entropy"))
    assert client.optim_step().result(LONG).effective.expected_ops == 1
    assert server.steps == 2
    service.close()


def test_gradients_that_were_not_zeroed_are_there(server, client):
    server.fails = {2: "CANCELLED"}
    logprobs(client.forward_backward(DATA, "cross_entropy"))
    assert reason_of(client.zero_grad()) == "CANCELLED"
    assert client.optim_step().result(LONG).effective.expected_ops == 1


# The end of a script.


def test_close_waits_for_calls_and_raises_what_fails(server, client):
    server.fails = {2: "NONFINITE_GRADIENT"}
    server.at["before forward_backward"] = lambda: time.sleep(0.3)
    client.forward_backward(DATA, "cross_entropy")
    client.optim_step()
    with pytest.raises(gradwire.GradwireError) as caught:
        client.close()
    assert caught.value.reason == "NONFINITE_GRADIENT"
    assert [seq for seq, _ in server.ran] == [1, 2]


def test_a_with_block_loses_no_call(server):
    server.at["before forward_backward"] = lambda: time.sleep(0.3)
    with gradwire.ServiceClient(address=server.address) as service:
        client = service.create_training_client("model", job_id="job")
        pair(client)
    assert server.ran == [(1, "forward_backward"), (2, "optim_step")]


SCRIPT = """
import sys, gradwire
client = gradwire.ServiceClient(sys.argv[1]).create_training_client(
    "model", job_id="job"
)
data = [gradwire.Datum.from_tokens([1, 2, 3])]
for _ in range(5):
    client.forward_backward(data, "cross_entropy")
    client.optim_step()
{end}
"""


@pytest.mark.parametrize(
    ("end", "all_run"), [("", True), ("sys.exit(3)", True), ("1 / 0", False)]
)
def test_a_script_that_just_ends_loses_no_call(server, end, all_run):
    server.fails = {10: "NONFINITE_GRADIENT"}
    if not all_run:
        server.requests["job.0", 0] = "", ""
        server.at["before forward_backward"] = lambda: time.sleep(5)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(end=end), server.address],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if all_run:
        assert [seq for seq, _ in server.ran] == list(range(1, 11))
        assert "optim_step failed and nobody read it" in done.stderr
        assert done.returncode == (3 if end else 0)
    else:
        assert "ZeroDivisionError" in done.stderr
        assert "nobody read" not in done.stderr
        assert time.monotonic() - began < LONG


EXITS_IN_A_BLOCK = """
import sys, gradwire
with gradwire.ServiceClient(sys.argv[1]) as service:
    client = service.create_training_client("model", job_id="job")
    data = [gradwire.Datum.from_tokens([1, 2, 3])]
    for _ in range(5):
        client.forward_backward(data, "cross_entropy")
        client.optim_step()
    sys.exit(4)
"""


def test_an_exit_in_a_block_loses_no_call(server):
    done = subprocess.run(
        [sys.executable, "-c", EXITS_IN_A_BLOCK, server.address],
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert [seq for seq, _ in server.ran] == list(range(1, 11)), done.stderr
    assert done.returncode == 4


def test_a_child_that_was_forked_waits_for_nothing(server, monkeypatch):
    """It has none of the threads that would end a call."""
    hold = threading.Event()
    server.at["before optim_step"] = lambda: hold.wait(LONG)
    with gradwire.ServiceClient(address=server.address) as service:
        client = service.create_training_client("model", job_id="job")
        step = client.optim_step()
        with monkeypatch.context() as child:
            child.setattr("os.getpid", lambda: -1)
            service.settle(LONG)
            service.close()
        assert not step.done()
        hold.set()
        assert step.result(LONG).optimizer_step == 1


def test_a_loss_that_closes_its_client_does_not_wait_for_itself(client):
    def closing(data, logprobs):
        client.close()
        return sum(lp.sum() for lp in logprobs), {}

    step = client.forward_backward_custom(DATA, closing)
    assert step.result(LONG).loss == -9


def test_a_client_that_closes_at_once_tells_of_no_failure(server, caplog):
    service = gradwire.ServiceClient(address=server.address)
    client = service.create_training_client("model")
    server.stop()
    client.optim_step()
    outcome = client._outcomes[0]
    service.close(wait=False)
    while not outcome.settled():
        time.sleep(0.01)
    time.sleep(0.1)
    assert "nobody read it" not in caplog.text


def test_a_result_goes_with_its_future(client):
    gc.disable()
    try:
        future = client.forward(DATA)
        result = weakref.ref(future.result(LONG))
        del future
        # Once the client has seen that it has ended.
        client.forward(DATA).result(LONG)
        while result() is not None:
            time.sleep(0.01)
    finally:
        gc.enable()


ENDS_WITHOUT_ITS_SERVER = """
import sys, gradwire, gradwire.at_exit
gradwire.at_exit._MOST_AWAY_SECONDS = 0.5
client = gradwire.ServiceClient(sys.argv[1]).create_training_client("model")
print("ready", flush=True)
sys.stdin.readline()
client.optim_step()
"""


def test_the_end_of_a_script_does_not_wait_for_a_server_that_is_gone(server):
    with subprocess.Popen(
        [sys.executable, "-c", ENDS_WITHOUT_ITS_SERVER, server.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as script:
        assert script.stdout.readline() == "ready\n"
        server.stop()
        _, said = script.communicate("\n", timeout=LONG)
    assert "1 calls on model" in said
    assert "the server is away: optim_step" in said


# Failures that nobody reads.


def test_a_failure_of_a_dropped_future_is_logged(server, client, caplog):
    server.fails = {1: "NONFINITE_LOSS"}
    server.at["before forward_backward"] = lambda: time.sleep(0.2)
    client.forward_backward(DATA, "cross_entropy")
    client.forward(DATA).result(LONG)
    while "forward_backward failed and nobody read it" not in caplog.text:
        time.sleep(0.01)
    assert caplog.text.count("nobody read it") == 1
    with pytest.raises(gradwire.GradwireError):
        client.check()


def test_an_await_that_was_cut_short_has_read_nothing(server, client):
    hold = threading.Event()
    server.fails = {1: "NONFINITE_LOSS"}
    server.at["before forward_backward"] = lambda: hold.wait(LONG)

    async def cut_short():
        future = client.forward_backward(DATA, "cross_entropy")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_awaited(future), 0.05)
        return future

    future = asyncio.run(cut_short())
    hold.set()
    while not future.done():
        time.sleep(0.01)
    with pytest.raises(gradwire.GradwireError):
        client.check()
    client.check()  # read now


async def _awaited(future):
    return await future
