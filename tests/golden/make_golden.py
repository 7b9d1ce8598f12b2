# SPDX-License-Identifier: Apache-2.0
"""Makes the golden models and their expected logprobs and gradients.

    .venv/bin/python tests/golden/make_golden.py tests/golden/data

transformers in float64 is the judge. For each geometry a directory holds a tiny
random model (weights representable in bfloat16, so that one answer serves both
precisions) and expected.safetensors, all float32:

    lengths           [sequences]      lengths of the packed sequences
    tokens, targets   [tokens]         ids
    weights           [tokens]         signed; loss = -sum(weights * logprob)
    logprobs          [tokens]
    grad/<parameter>  as the parameter
    noise/...         one for each of the above two

`noise` is how far a result moves, root mean square over samples, if every
module output (and every gradient that flows back through it) is off by a random
relative error of 1: the linear response to rounding. Times the unit roundoff of
an implementation's activation type it is the size of its expected error,
element by element; tests take their tolerance from it.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

SAMPLES = 12
# Small enough for the response to be linear, large against float64 rounding.
PROBE = 2.0**-22

COMMON = {
    "vocab_size": 61,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
# name: (configuration class, fields, lengths of the sequences)
GEOMETRIES = {
    "llama_mha_untied": (
        transformers.LlamaConfig,
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
        },
        [1, 2, 7, 3],
    ),
    "llama_gqa3_tied": (
        transformers.LlamaConfig,
        {
            "hidden_size": 24,
            "intermediate_size": 20,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
        [5, 1, 13],
    ),
    "llama3_rope": (
        transformers.LlamaConfig,
        {
            "hidden_size": 16,
            "intermediate_size": 40,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3,
        },
        [33, 9],
    ),
    "llama_linear_rope_head_dim": (
        transformers.LlamaConfig,
        {
            "hidden_size": 20,
            "intermediate_size": 24,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 6,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 500000.0,
            },
        },
        [4, 11],
    ),
    "qwen2_gqa_tied": (
        transformers.Qwen2Config,
        {
            "hidden_size": 24,
            "intermediate_size": 28,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        [1, 17, 2],
    ),
    "qwen2_untied": (
        transformers.Qwen2Config,
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
            },
        },
        [6, 6],
    ),
    "qwen3_head_dim": (
        transformers.Qwen3Config,
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
        [3, 1, 19],
    ),
    "qwen3_untied": (
        transformers.Qwen3Config,
        {
            "hidden_size": 20,
            "intermediate_size": 36,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "head_dim": 4,
            "tie_word_embeddings": False,
        },
        [8, 5],
    ),
}


def logprobs_of(model, tokens: torch.Tensor, targets: torch.Tensor, lengths):
    """Each sequence alone: no packing, no mask to get wrong."""
    out, begin = [], 0
    for length in lengths:
        ids = tokens[begin : begin + length][None]
        logits = model(input_ids=ids, use_cache=False).logits[0]
        wanted = targets[begin : begin + length]
        out.append(
            torch.log_softmax(logits, -1).gather(-1, wanted[:, None])[:, 0]
        )
        begin += length
    return torch.cat(out)


def results(model, tokens, targets, weights, lengths) -> dict[str, np.ndarray]:
    model.zero_grad()
    logprobs = logprobs_of(model, tokens, targets, lengths)
    (-(weights * logprobs).sum()).backward()
    found = {"logprobs": logprobs.detach().numpy().copy()}
    for name, parameter in model.named_parameters():
        found["grad/" + name] = parameter.grad.numpy().copy()
    return found


def jitter(value: torch.Tensor) -> torch.Tensor:
    return value * (1 + PROBE * (2 * torch.rand_like(value) - 1))


class Rounded(torch.autograd.Function):
    """A relative error of at most PROBE on the value and on its gradient."""

    @staticmethod
    def forward(ctx, value):
        return jitter(value)

    @staticmethod
    def backward(ctx, gradient):
        return jitter(gradient)


def add_noise(model):
    def hook(module, inputs, output):
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            return Rounded.apply(output)
        if isinstance(output, tuple):
            return tuple(
                Rounded.apply(o)
                if isinstance(o, torch.Tensor) and o.is_floating_point()
                else o
                for o in output
            )
        return output

    return [
        m.register_forward_hook(hook) for m in model.modules() if m is not model
    ]


def write(directory: pathlib.Path, kind, fields, lengths) -> None:
    torch.manual_seed(len(directory.name))
    config = kind(**COMMON, **fields)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            parameter.copy_(parameter.to(torch.bfloat16).float())
    state = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    model = model.double().eval()
    total = sum(lengths)
    tokens = torch.randint(0, config.vocab_size, (total,))
    targets = torch.randint(0, config.vocab_size, (total,))
    weights = torch.randn(total, dtype=torch.float32).double()
    weights[::5] = 0
    exact = results(model, tokens, targets, weights, lengths)
    squares = {name: np.zeros_like(value) for name, value in exact.items()}
    hooks = add_noise(model)
    for _ in range(SAMPLES):
        noisy = results(model, tokens, targets, weights, lengths)
        for name, value in noisy.items():
            squares[name] += ((value - exact[name]) / PROBE) ** 2
    for hook in hooks:
        hook.remove()

    directory.mkdir(parents=True, exist_ok=True)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    text = json.loads(config.to_json_string(use_diff=False))
    text["architectures"] = [type(model).__name__]
    text["dtype"] = "float32"
    text.pop("transformers_version", None)
    (directory / "config.json").write_text(
        json.dumps(text, indent=1, sort_keys=True) + "\n"
    )
    expected = {
        "lengths": np.array(lengths),
        "tokens": tokens.numpy(),
        "targets": targets.numpy(),
        "weights": weights.numpy(),
    }
    for name, value in exact.items():
        expected[name] = value
        expected["noise/" + name] = np.sqrt(squares[name] / SAMPLES)
    save_file(
        {n: np.ascontiguousarray(v, np.float32) for n, v in expected.items()},
        directory / "expected.safetensors",
    )
    print(directory.name, total, "tokens")


def main() -> None:
    root = pathlib.Path(sys.argv[1])
    for name, (kind, fields, lengths) in GEOMETRIES.items():
        write(root / name, kind, fields, lengths)


if __name__ == "__main__":
    main()
