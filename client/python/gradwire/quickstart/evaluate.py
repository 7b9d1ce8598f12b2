# SPDX-License-Identifier: Apache-2.0
"""What a Hugging Face directory answers, and whether it is what was trained.

Both read the directory with transformers alone: the result must be good
without gradwire.
"""

import dataclasses
import math

import numpy as np
import torch

from gradwire.quickstart import data


def _load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def answer(path, tokenizer, prompts, max_new_tokens=40) -> list[str]:
    """The model's greedy answers."""
    model = _load(path)
    answers = []
    for prompt in prompts:
        tokens = torch.tensor([data.prompt_tokens(tokenizer, prompt)])
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        reply = output[0][tokens.shape[1] :]
        answers.append(tokenizer.decode(reply, skip_special_tokens=True))
    return answers


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far the server's log-probabilities are from transformers'."""

    mean: float  # of the differences
    largest: float
    allowed: float  # where the largest one is
    ok: bool


def agreement(path, datums, served, precision) -> Agreement:
    """Compares transformers in float32 with what the server computed.

    The allowance follows from the arithmetic. With u the unit roundoff, a
    block's output carries a relative error of u / sqrt(3) in the mean square
    for each of the few results that are rounded on its way, times sqrt(terms)
    where sums of that many terms are themselves kept in the precision. Over
    the blocks these errors add like a random walk. An error of relative size
    r in the last hidden state h, in no particular direction, moves a logit
    h.w by about r |h| |w| / sqrt(hidden); a log-probability is a logit less a
    mean over logits, whose w is of a usual length, and is itself rounded. No
    position may differ by more than four of these standard deviations, nor
    all of them by more than one in the mean square.
    """
    roundings_per_block = 4
    model = _load(path)
    config = model.config
    if precision == "bf16":
        u, terms = torch.finfo(torch.bfloat16).eps / 2, 1
    else:
        u = torch.finfo(torch.float32).eps / 2
        terms = config.intermediate_size
    blocks = 2 * config.num_hidden_layers
    relative = u * math.sqrt(blocks * roundings_per_block * terms / 3)
    head = model.get_output_embeddings().weight.detach()
    lengths = head.norm(dim=-1)
    usual = lengths.square().mean()
    u_float = torch.finfo(torch.float32).eps / 2

    differences, sigmas = [], []
    for datum, logprobs in zip(datums, served, strict=True):
        tokens = torch.as_tensor(np.asarray(token_ids(datum)))[None]
        targets = torch.as_tensor(
            np.asarray(datum.loss_fn_inputs["target_tokens"])
        ).long()
        with torch.no_grad():
            output = model(tokens, output_hidden_states=True)
        expected = torch.log_softmax(output.logits[0], -1)
        expected = expected.gather(1, targets[:, None])[:, 0]
        hidden = output.hidden_states[-1][0]
        of_hidden = (
            relative
            * hidden.norm(dim=-1)
            * (lengths[targets].square() + usual).sqrt()
            / math.sqrt(config.hidden_size)
        )
        of_result = u_float * expected.abs()
        sigmas.append((of_hidden.square() + of_result.square()).sqrt())
        differences.append((torch.as_tensor(logprobs) - expected).abs())
    difference = torch.cat(differences)
    sigma = torch.cat(sigmas)
    score = difference / sigma
    worst = int(difference.argmax())
    return Agreement(
        mean=float(difference.mean()),
        largest=float(difference[worst]),
        allowed=float(4 * sigma[worst]),
        ok=bool(score.max() <= 4 and score.square().mean().sqrt() <= 1),
    )


def token_ids(datum):
    """The ids that a datum feeds to the model."""
    chunks = getattr(datum.model_input, "chunks", None)
    if chunks is None:
        return [int(token) for token in datum.model_input]
    return [token for chunk in chunks for token in chunk.tokens]
