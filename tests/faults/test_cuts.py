# SPDX-License-Identifier: Apache-2.0
"""Cut the network at any byte, and the training is the same in every bit."""

import random
import time

from life import Life, free_port
from proxy import Proxy
from undisturbed import SEED, STEPS, Undisturbed, model, server

__all__ = ["model", "server"]  # fixtures
CUTS = 20


def test_a_network_that_is_cut_changes_nothing(server, model, tmp_path):
    want = Undisturbed(tmp_path / "undisturbed", model, 1)
    rng = random.Random(f"cuts {SEED}")
    with (
        Life(tmp_path / "cut", model, 1, STEPS) as life,
        Proxy(free_port(), life.port) as network,
    ):
        life.reach_server_through(network.port)
        life.start_server()
        life.start_client()
        life.next_result(0)
        cuts = 0
        while life.client.is_alive() and cuts < CUTS:
            # A step's requests and results are some 30 kB.
            until = network.bytes + rng.randrange(12000)
            while network.bytes < until and life.client.is_alive():
                time.sleep(0.0005)
            network.cut()
            cuts += 1
            if rng.random() < 0.3:
                time.sleep(rng.uniform(0, 0.2))  # away for a while
            network.open()
        life.finish()
        want.judge(life, client_died=False)
        assert cuts > CUTS // 4
