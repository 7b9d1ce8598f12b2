# SPDX-License-Identifier: Apache-2.0
"""A loss that no server has: every token as surprising as the average one.

It pulls the log-probabilities of a text together without making the text more
likely, and shows that a loss may tie all tokens of a batch to each other.

    gradwire serve &
    python examples/own_loss.py MODEL_DIRECTORY
"""

import sys

import gradwire
import torch
from transformers import AutoTokenizer

TEXT = "The harbour is quiet at night. Only the lighthouse is awake."

if len(sys.argv) != 2:
    sys.exit("usage: python examples/own_loss.py MODEL_DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
datum = gradwire.Datum.from_tokens(tokenizer(TEXT)["input_ids"])


def evenness(data, logprobs):
    everything = torch.cat(logprobs)
    loss = everything.var()
    return loss, {"logprob:mean": everything.mean().item()}


with gradwire.ServiceClient() as service:
    policy = service.create_training_client(base_model=sys.argv[1])
    for _ in range(10):
        step = policy.forward_backward_custom([datum], evenness)
        policy.optim_step(gradwire.AdamParams(learning_rate=1e-5))
        metrics = step.result().metrics
        print(
            f"variance {metrics['loss:sum']:.3f}  "
            f"mean logprob {metrics['logprob:mean']:.3f}"
        )
