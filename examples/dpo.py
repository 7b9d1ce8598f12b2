# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimisation with the loss in Python.

gradwire serve &
python examples/dpo.py MODEL_DIRECTORY
"""

import argparse

import gradwire
import torch
import torch.nn.functional as F
from gradwire.quickstart import data
from transformers import AutoTokenizer

BETA = 0.1

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a Hugging Face directory")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
args = parser.parse_args()
tokenizer = AutoTokenizer.from_pretrained(args.model)


def answer_sums(datums, logprobs):
    """The log-probability of each whole answer."""
    sums = [
        torch.as_tensor(d.response(lp)).sum()
        for d, lp in zip(datums, logprobs, strict=True)
    ]
    return torch.stack(sums)


def dpo(reference):
    def loss_fn(datums, logprobs):
        gain = answer_sums(datums, logprobs) - reference
        margin = BETA * (gain[0::2] - gain[1::2])  # chosen less rejected
        loss = -F.logsigmoid(margin).mean()
        return loss, {"margin:mean": margin.mean().item()}

    return loss_fn


with gradwire.ServiceClient() as service:
    policy = service.create_training_client(base_model=args.model)
    batches = [
        [
            data.to_datum(tokenizer, pair.prompt, text)
            for pair in pairs
            for text in (pair.chosen, pair.rejected)
        ]
        for pairs in data.batches(
            data.preferences(), args.pairs, args.steps, seed=0
        )
    ]
    # Before any step the policy is its own reference.
    scored = [policy.forward(datums) for datums in batches]
    for datums, future in zip(batches, scored, strict=True):
        reference = answer_sums(datums, future.result().logprobs)
        step = policy.forward_backward_custom(datums, dpo(reference))
        policy.optim_step(
            gradwire.AdamParams(learning_rate=5e-6, grad_clip_norm=1.0)
        )
        print({k: round(v, 4) for k, v in step.result().metrics.items()})
