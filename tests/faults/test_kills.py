# SPDX-License-Identifier: Apache-2.0
"""Kill anything at any time, and the training is the same in every bit.

A script trains a tiny model while {client, rank, supervisor, all} die of
SIGKILL, or the server is restarted, or told to end and killed when its grace is
over (0 to 25 s), at random moments. In the end all results,
the final weights and the optimizer's state must equal those of a run that
nobody disturbed. A last line of JSON has the count, the outcome and how long it
took from a kill to the next result.

GRADWIRE_KILLS: how many (30). GRADWIRE_KILL_SEED: which (1).
"""

import collections
import json
import os
import random
import time

import pytest
from life import KINDS, Life, recovers
from undisturbed import SEED, STEPS, Undisturbed, model, server
from verdict import differences, different_files, percentile

__all__ = ["model", "server"]  # fixtures
KILLS = int(os.environ.get("GRADWIRE_KILLS", "30"))
KILLS_IN_A_LIFE = 8
# Kills that meet a recovery which is under way.
AGAIN = 0.25
FAILPOINTS = (
    "oplog.before_append",
    "oplog.after_append",
    "oplog.after_sync",
    "op.before_execute",
    "op.after_execute",
    "op.after_record",
    "op.before_reply",
    "op.after_reply",
    "checkpoint.before_reference",
    "checkpoint.after_reference",
    "checkpoint.after_trim",
)
DEATHS_BY_FAILPOINT = 3
# Passes until death, at most; the rarer the place, the fewer, so that each
# death comes before the run ends.
PASSES = {"oplog.after_sync": 4, "checkpoint": 1}


@pytest.fixture(scope="module")
def undisturbed(server, model, tmp_path_factory):
    """undisturbed(world_size): the run to compare with."""
    runs = {}

    def run(world_size):
        if world_size not in runs:
            folder = tmp_path_factory.mktemp("undisturbed")
            runs[world_size] = Undisturbed(folder, model, world_size)
        return runs[world_size]

    return run


class Tally:
    def __init__(self):
        self.seconds = collections.defaultdict(list)
        self.lives = 0
        self.broken = 0

    def line(self):
        kills = sum(map(len, self.seconds.values()))
        # The run may have ended before there was another result.
        timed = {
            kind: [s for s in seconds if s is not None]
            for kind, seconds in sorted(self.seconds.items())
        }
        return json.dumps(
            {
                "kills": kills,
                "lives": self.lives,
                "lives_that_differ": self.broken,
                "outcome": "differs" if self.broken else "bit-identical",
                "seed": SEED,
                "recovery_seconds": {
                    kind: {
                        "kills": len(self.seconds[kind]),
                        "p50": round(percentile(seconds, 0.5), 3),
                        "p99": round(percentile(seconds, 0.99), 3),
                    }
                    for kind, seconds in timed.items()
                    if seconds
                },
            }
        )


@pytest.fixture(scope="module")
def tally(request):
    tally = Tally()
    yield tally
    if tally.lives:
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"\n{tally.line()}", flush=True)


def live(life, kinds, kills, rng, step_seconds):
    """Lets a run live through some kills, to its end."""
    life.start_server()
    life.start_client()
    life.next_result(0)
    while len(life.kills) < kills and life.client.is_alive():
        time.sleep(rng.uniform(0, step_seconds))
        dead = []
        moment = None
        while True:
            kind = rng.choice(kinds)
            dead.append(kind)
            ended = life.kill(kind, rng)
            moment = moment or ended
            life.start_server()
            life.start_client()
            if rng.random() > AGAIN:
                break
            time.sleep(rng.uniform(0, step_seconds))
        found = life.next_result(ended)
        seconds = None if found is None else found - ended
        # Of those in a row, the last one is recovered from.
        life.kills += [(kind, None) for kind in dead[:-1]]
        life.kills.append((dead[-1], seconds))
    life.finish()


def kill_and_compare(folder, model, undisturbed, tally, kinds, kills, rng):
    with Life(folder, model, undisturbed[0], STEPS) as life:
        run = undisturbed[1]
        tally.lives += 1
        tally.broken += 1
        live(life, kinds, kills, rng, run.step_seconds)
        for kind, seconds in life.kills:
            tally.seconds[kind].append(seconds)
        run.judge(life, client_died=bool({"client", "all"} & set(kinds)))
        tally.broken -= 1
        return len(life.kills)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_undisturbed_run_is_the_same_every_time(
    model, undisturbed, tmp_path, world_size
):
    want = undisturbed(world_size)
    again = Undisturbed(tmp_path, model, world_size)
    assert not differences(want.journal, again.journal, client_died=False)
    assert not different_files(want.files, again.files)


@pytest.mark.parametrize("world_size", [1, 2])
def test_clients_that_die_change_nothing(
    model, undisturbed, tally, tmp_path, world_size
):
    rng = random.Random(f"client {world_size} {SEED}")
    run = world_size, undisturbed(world_size)
    kill_and_compare(tmp_path, model, run, tally, ("client",), 6, rng)


@pytest.mark.parametrize("world_size", [1, 2])
def test_whatever_dies_nothing_changes(
    server, model, undisturbed, tally, tmp_path, world_size
):
    if not recovers(server):
        pytest.skip("this gradwired does not rebuild a job after a crash")
    rng = random.Random(f"kills {world_size} {SEED}")
    run = world_size, undisturbed(world_size)
    left, number = KILLS // 2, 0
    while left > 0:
        # Where no client dies, no result may be missing.
        kinds = (
            KINDS
            if number % 2
            else (
                "rank",
                "supervisor",
                "restart",
                "preempted",
            )
        )
        left -= kill_and_compare(
            tmp_path / str(number),
            model,
            run,
            tally,
            kinds,
            min(left, KILLS_IN_A_LIFE),
            rng,
        )
        number += 1


@pytest.mark.parametrize("name", FAILPOINTS)
def test_death_at_a_failpoint(server, model, undisturbed, tmp_path, name):
    binary = "gradwired_failpoints"
    if not server.with_name(binary).exists():
        pytest.skip(
            f"{binary} was not found beside gradwired; run `bazel build "
            f"//server:{binary}`"
        )
    rng = random.Random(f"{name} {SEED}")
    most = PASSES.get(name, PASSES.get(name.split(".")[0], 12))
    with Life(tmp_path, model, 1, STEPS, binary) as life:
        life.start_client()
        for _ in range(DEATHS_BY_FAILPOINT):
            life.start_server(failpoint=f"{name}:{rng.randint(1, most)}")
            life.wait_for_death()
            life.kills.append((name, None))
        life.start_server()
        life.finish()
        undisturbed(1).judge(life, client_died=False)
