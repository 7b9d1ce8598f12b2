# SPDX-License-Identifier: Apache-2.0
"""Two losses in plain Python.

A loss gets the datums and one tensor of log-probabilities for each; it returns
a scalar and metrics. gradwire differentiates it on the client and sends the
gradient to the server.
"""

import torch
import torch.nn.functional as F


def sft(data, logprobs):
    """The mean negative log-probability of the answers' tokens."""
    answers = [d.response(lp) for d, lp in zip(data, logprobs, strict=True)]
    tokens = sum(len(answer) for answer in answers)
    loss = -sum(answer.sum() for answer in answers) / tokens
    return loss, {"nll:mean": loss.item()}


def dpo(reference, beta):
    """Direct preference optimisation.

    The loss expects pairs: chosen, rejected, chosen, rejected, and so on.
    reference: the log-probability of each whole answer under the model from
    which the training must not stray, in the order of the datums.
    """
    reference = torch.as_tensor(reference, dtype=torch.float32)

    def loss_fn(data, logprobs):
        answers = torch.stack(
            [d.response(lp).sum() for d, lp in zip(data, logprobs, strict=True)]
        )
        gain = answers - reference
        margin = beta * (gain[0::2] - gain[1::2])
        loss = -F.logsigmoid(margin).mean()
        return loss, {
            "margin:mean": margin.mean().item(),
            "accuracy:mean": (margin > 0).float().mean().item(),
        }

    return loss_fn
