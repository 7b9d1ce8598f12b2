# SPDX-License-Identifier: Apache-2.0
"""Qwen3's geometries, and directories with random weights; torch alone."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import torch


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A Qwen3 model."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    vocab: int = 151936
    positions: int = 40960
    rope_theta: float = 1e6
    rms_eps: float = 1e-6
    tied: bool = True  # the head is the embedding

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each parameter by its Hugging Face name."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        block = {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.q_norm": (self.head_dim,),
            "self_attn.k_norm": (self.head_dim,),
            "self_attn.o_proj": (self.hidden, q),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }
        return (
            {"model.embed_tokens.weight": (self.vocab, self.hidden)}
            | {
                f"model.layers.{i}.{name}.weight": shape
                for i in range(self.layers)
                for name, shape in block.items()
            }
            | {"model.norm.weight": (self.hidden,)}
            | (
                {}
                if self.tied
                else {"lm_head.weight": (self.vocab, self.hidden)}
            )
        )

    def sampled(self) -> list[str]:
        """Parameters whose gradients stand for all: of each kind and depth."""
        return [
            "model.embed_tokens.weight",
            "model.norm.weight",
            *([] if self.tied else ["lm_head.weight"]),
            *(
                f"model.layers.{i}.{name}.weight"
                for i in sorted({0, self.layers // 2, self.layers - 1})
                for name in (
                    "input_layernorm",
                    "self_attn.q_proj",
                    "self_attn.v_proj",
                    "self_attn.k_norm",
                    "mlp.gate_proj",
                    "mlp.down_proj",
                )
            ),
        ]

    def useful_flops(self, sequences: int, length: int) -> float:
        """Of a forward and backward: 3 (2 N tokens + causal attention)."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = self.hidden * (2 * q + 2 * kv + 3 * self.ffn)
        weights = self.layers * layer + self.hidden * self.vocab
        tokens = sequences * length
        attention = 2.0 * self.layers * q * length * tokens
        return 3.0 * (2.0 * weights * tokens + attention)

    def matmul_shapes(self, tokens: int) -> list[tuple[int, int, int]]:
        """(tokens, inputs, outputs) of the layers' products."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (tokens, self.hidden, q + 2 * kv),
            (tokens, q, self.hidden),
            (tokens, self.hidden, 2 * self.ffn),
            (tokens, self.ffn, self.hidden),
        ]

    def config(self) -> dict:
        """config.json."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_eps,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
        }

    def save(self, directory: pathlib.Path, device: str) -> pathlib.Path:
        """Random bf16 weights of one seed, in one file of safetensors."""
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(self.config()))
        header: dict[str, dict] = {}
        end = 0
        for name, shape in self.shapes().items():
            begin, end = end, end + 2 * torch.Size(shape).numel()
            header[name] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [begin, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        text = len(text).to_bytes(8, "little") + text
        file = torch.from_file(
            str(directory / "model.safetensors"),
            shared=True,
            size=len(text) + end,
            dtype=torch.uint8,
        )
        file[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        data = file[len(text) :]
        generator = torch.Generator(device).manual_seed(0)
        for name, shape in self.shapes().items():
            drawn = torch.randn(shape, generator=generator, device=device)
            drawn.mul_(0.02)
            if len(shape) == 1:  # norms are near one
                drawn += 1.0
            data[slice(*header[name]["data_offsets"])] = (
                drawn.bfloat16().flatten().view(torch.uint8).cpu()
            )
        return directory


def load(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    """The tensors of a directory that Geometry.save wrote, by name."""
    path = directory / "model.safetensors"
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    data = torch.from_file(
        str(path), size=path.stat().st_size, dtype=torch.uint8
    )[8 + size :]
    return {
        name: data[slice(*entry["data_offsets"])]
        .clone()
        .view(torch.bfloat16)
        .reshape(entry["shape"])
        for name, entry in header.items()
    }


GEOMETRIES = {
    "Qwen3-0.6B": Geometry(1024, 3072, 28, 16, 8),
    "Qwen3-1.7B": Geometry(2048, 6144, 28, 16, 8),
    "Qwen3-4B": Geometry(2560, 9728, 36, 32, 8),
    "Qwen3-8B": Geometry(4096, 12288, 36, 32, 8, tied=False),
    # Of tests.
    "tiny": Geometry(64, 96, 2, 4, 2, 32, vocab=256, positions=64),
    "tiny-untied": Geometry(
        64, 96, 2, 4, 2, 32, vocab=256, positions=64, tied=False
    ),
}
