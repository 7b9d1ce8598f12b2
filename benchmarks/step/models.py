# SPDX-License-Identifier: Apache-2.0
"""The three models of the step benchmark, and the work a step of each is."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import transformers


@dataclasses.dataclass(frozen=True)
class Model:
    """A geometry and its batch: `sequences` of `length` tokens."""

    config: transformers.PretrainedConfig
    sequences: int
    length: int

    def useful_flops(self, lengths: list[int]) -> float:
        """Of a forward and backward over sequences of these lengths.

        Three times a forward's 2 N per token and causal attention: half of
        4 q len^2 for each layer and sequence. N has the head, tied or not, and
        no embedding look-up.
        """
        c = self.config
        head_dim = c.hidden_size // c.num_attention_heads
        q = c.num_attention_heads * head_dim
        kv = c.num_key_value_heads * head_dim
        layer = c.hidden_size * (2 * q + 2 * kv + 3 * c.intermediate_size)
        weights = c.num_hidden_layers * layer + c.hidden_size * c.vocab_size
        attention = 2 * c.num_hidden_layers * q * sum(n * n for n in lengths)
        return 3.0 * (2.0 * weights * sum(lengths) + attention)

    def matmul_shapes(self) -> list[tuple[int, int, int]]:
        """(tokens, inputs, outputs) of the layers' products."""
        c, tokens = self.config, self.sequences * self.length
        head_dim = c.hidden_size // c.num_attention_heads
        qkv = (c.num_attention_heads + 2 * c.num_key_value_heads) * head_dim
        return [
            (tokens, c.hidden_size, qkv),
            (tokens, c.hidden_size, 2 * c.intermediate_size),
            (tokens, c.intermediate_size, c.hidden_size),
        ]

    def full_lengths(self) -> list[int]:
        return [self.length] * self.sequences

    def ids(self, lengths: list[int] | None = None) -> list[np.ndarray]:
        """Random ids, one more than each length: inputs and targets."""
        rng = np.random.default_rng(0)
        return [
            rng.integers(0, self.config.vocab_size, n + 1)
            for n in lengths or self.full_lengths()
        ]

    def save(self, directory: pathlib.Path) -> str:
        """Random weights of one seed, as a Hugging Face directory."""
        import torch

        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(self.config)
        model.save_pretrained(directory)
        return str(directory)


def _common(hidden, ffn, layers, heads, kv_heads, vocab) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    }


MODELS = {
    "smollm2-135m": Model(
        transformers.LlamaConfig(**_common(576, 1536, 30, 9, 3, 49152)), 4, 512
    ),
    "qwen-width": Model(
        transformers.Qwen2Config(**_common(896, 4864, 4, 14, 2, 151936)),
        2,
        512,
    ),
    "tiny": Model(
        transformers.LlamaConfig(**_common(256, 768, 4, 4, 2, 4096)), 8, 256
    ),
}
