# SPDX-License-Identifier: Apache-2.0
"""A fault at each file call of a whole server, or of its rank, one call at a
time.

By default a sample of the calls, another one each day. The last line is JSON:
how many calls each fault can meet, and which were met.

GRADWIRE_FAULTS=all: every call. GRADWIRE_FAULT_AT: this call alone.
GRADWIRE_FAULT_SEED: which sample. docs/recovery.md.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import time
import traceback

import gradwire
import pytest
from fault_promises import (
    STEPS,
    Told,
    attach,
    check_files,
    check_jobs,
    create,
    logprobs_now,
    settled,
    train,
)
from fault_scenarios import SCENARIOS, Client, Died, Refused, Scenario
from file_faults import (
    FAULTS,
    STOPPED,
    Broken,
    Fault,
    Server,
    Stubs,
    calls,
    find_shim,
)
from gradwire.local_server import find_server

ALL = os.environ.get("GRADWIRE_FAULTS") == "all"
AT = int(os.environ.get("GRADWIRE_FAULT_AT", "0"))
SEED = int(os.environ.get("GRADWIRE_FAULT_SEED", time.time() // 86400))
SAMPLES = 1
# Calls come from several threads, so that their number is not always the same:
# after so many in a row that no call had, the index is through.
BEYOND = 2
# What gradwired ends with if it cannot tell where it serves, or use its state
# directory.
UNTOLD, UNUSABLE = 2, 3

pytestmark = pytest.mark.skipif(
    "GRADWIRE_SANITIZED" in os.environ, reason="run without sanitizers"
)


@pytest.fixture(scope="module")
def shim():
    try:
        find_server()
    except gradwire.GradwireError as error:
        pytest.skip(error.message)
    if find_shim() is None:
        pytest.skip(
            "libfault_shim.so was not found; run `bazel build "
            "//tests/faults:libfault_shim.so`"
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # Of the end-to-end tests, whose folder `file_faults` has made known.
    from conftest import save_model

    return save_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def want(shim, model, tmp_path_factory):
    """What the steps give where nothing fails."""
    folder = tmp_path_factory.mktemp("undisturbed")
    scenario = Scenario(model, folder)
    with scenario.server() as (_, stubs):
        create(stubs, scenario.spec)
        assert stubs.watch("job", settled).ready
        reply = attach(stubs, stubs.new_session())
        trained = calls.Model(stubs, reply.model_id)
        results = train(trained, 0, STEPS, 1)
        return results, logprobs_now(trained)


@pytest.fixture(scope="module")
def scenarios(shim, model, tmp_path_factory):
    """scenarios(name): each is prepared once."""
    prepared = {}

    def get(name):
        if name not in prepared:
            folder = tmp_path_factory.mktemp(name)
            prepared[name] = SCENARIOS[name](model, folder)
        return prepared[name]

    return get


@pytest.fixture(scope="module")
def tally(request):
    """(scenario, fault, calls, those that were met) of each test."""
    rows = []
    yield rows
    if not rows:
        return
    line = {"seed": SEED, "faults": sum(len(met) for *_, met in rows)}
    for name, kind, most, met in rows:
        told = len(met) if ALL else met
        line.setdefault(name, {})[kind] = {"calls": most, "met": told}
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{json.dumps(line)}", flush=True)


def run(scenario, want, folder, kind, at):
    """One life with the fault, and one without: the fault."""
    shutil.copytree(
        scenario.state,
        folder / "state",
        ignore=shutil.ignore_patterns("*.sock"),
    )
    fault = Fault(folder / "control", kind, at, scenario.program)
    logs = folder / "faulty.log", folder / "clean.log"
    try:
        told = suffer(scenario, folder / "state", logs[0], fault)
        recover(scenario, folder / "state", logs[1], told, want)
    except Exception as error:
        said = [f"{type(scenario).__name__}, {fault}: {error!r}"]
        said += traceback.format_tb(error.__traceback__)
        for log in logs:
            if log.exists():
                text = log.read_text(errors="replace")
                said += [f"--- {log.name}", *text.splitlines()[-20:]]
        raise Broken("\n".join(said)) from error
    shutil.rmtree(folder)
    return fault


def suffer(scenario, state, log, fault):
    """What the client of a server with a fault was told until the end."""
    told = Told()
    if scenario.from_the_start:
        fault.arm()
    with Server(state, log, fault) as server:
        if not server.serves():
            check_refusal(server, fault)
        else:
            with Client(server, fault, told) as client:
                fault.arm()
                with contextlib.suppress(Died, Refused):
                    scenario.suffer(client)
            # A fault may meet the end, too; half of those that came earlier
            # have none.
            if fault.fired and fault.at % 2:
                server.process.kill()
                want = [-signal.SIGKILL]
            else:
                server.process.terminate()
                want = STOPPED
            if server.ended() not in want and not died(server, fault):
                raise Broken(f"it ended with {server.ended()}")
    # SQLite syncs its log once more before it takes over into the database what
    # was in it before.
    if fault.resynced and "/gradwire.db" not in fault.what:
        raise Broken("a failed sync was made again, of the same data")
    return told


def died(server, fault):
    return server.ended() == -signal.SIGKILL and fault.ends_server


def check_refusal(server, fault):
    """Of a server that has ended instead of serving."""
    if died(server, fault):
        return
    last = server.said()[-1]
    want = UNTOLD if "port file" in last else UNUSABLE
    if not fault.fired or server.ended() != want:
        raise Broken(f"it ended with {server.ended()}")
    if " error " not in last or not re.search("disk|directory|file", last):
        raise Broken(f"it ended with no word of why: {last}")


def recover(scenario, state, log, told, want):
    """The next server, of which everything is asked."""
    with Server(state, log) as server:
        if not server.serves():
            raise Broken(f"the next one ended with {server.ended()}")
        check_jobs(state)
        with Stubs(server.address) as stubs:
            scenario.check(stubs, told, want)
        if (status := server.stop()) not in STOPPED:
            raise Broken(f"the next one ended with {status}")
    check_files(state)


@pytest.fixture(scope="module")
def counted(scenarios, want, tmp_path_factory):
    """counted(name): how many calls each fault can meet in a scenario."""
    found = {}

    def count(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("count") / name
            found[name] = run(scenarios(name), want, folder, "kill", 0).calls
        return found[name]

    return count


def sample(most, rng):
    """Numbers of calls."""
    if AT:
        return [AT]
    return rng.sample(range(1, most + 1), min(SAMPLES, most))


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.timeout(0 if ALL else 300)
def test_nothing_that_was_told_is_lost(
    name, kind, scenarios, want, counted, tally, tmp_path
):
    scenario = scenarios(name)
    most = counted(name)[kind]
    assert most > 4, "the library does not see the server's calls"
    met, broken = [], []
    tally.append((name, kind, most, met))

    def meet(at):
        try:
            fault = run(scenario, want, tmp_path / str(at), kind, at)
        except Broken as error:
            broken.append(str(error))
            return True
        if fault.fired:
            met.append(at)
        return fault.fired

    if ALL:
        at, beyond = 1, 0
        while beyond < BEYOND:
            beyond = 0 if meet(at) else beyond + 1
            at += 1
        assert len(met) + len(broken) >= most // 2, met
    else:
        for at in sample(most, random.Random(f"{name} {kind} {SEED}")):
            meet(at)
    assert not broken, "\n\n".join(broken)
