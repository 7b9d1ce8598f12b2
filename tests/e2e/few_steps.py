# SPDX-License-Identifier: Apache-2.0
"""Steps of a small llama, and what they give bit for bit."""

import gradwire
from conftest import MODELS, sequences

DATA = sequences(MODELS["llama"][1]["vocab_size"], (9, 17, 5, 12))


def train(client, steps=1):
    """What each step gave."""
    out = []
    for _ in range(steps):
        half = client.forward_backward(DATA, "cross_entropy")
        update = client.optim_step(gradwire.AdamParams(learning_rate=1e-2))
        out.append(
            (
                [lp.tobytes() for lp in half.result().logprobs],
                update.result().grad_norm,
            )
        )
    return out
