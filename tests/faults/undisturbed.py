# SPDX-License-Identifier: Apache-2.0
"""The run that nobody disturbs, by which the others are judged."""

import os
import statistics

import gradwire
import pytest
from gradwire.local_server import find_server
from life import Broken, Life
from verdict import differences, different_files

STEPS = 12
SEED = int(os.environ.get("GRADWIRE_KILL_SEED", "1"))


@pytest.fixture(scope="module")
def server():
    try:
        return find_server()
    except gradwire.GradwireError as error:
        pytest.skip(error.message)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # Of the end-to-end tests, whose folder `life` has made known.
    from conftest import save_model

    return save_model("llama", tmp_path_factory.mktemp("model"))


class Undisturbed:
    def __init__(self, folder, model, world_size):
        with Life(folder, model, world_size, STEPS) as life:
            life.start_server()
            life.start_client()
            life.finish()
            self.journal = life.entries()
            self.files = life.files()
        times = [e["t"] for e in self.journal if e["name"] == "update"]
        assert len(times) == STEPS and len(self.files) > 2 * STEPS // 4
        gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
        self.step_seconds = statistics.median(gaps)

    def judge(self, life, client_died):
        """Raises unless the life's run is this one."""
        problems = differences(self.journal, life.entries(), client_died)
        problems += different_files(self.files, life.files())
        if problems:
            told = "\n".join(problems)
            kinds = [kind for kind, _ in life.kills]
            raise Broken(life.tell(f"after {kinds}:\n{told}"))
