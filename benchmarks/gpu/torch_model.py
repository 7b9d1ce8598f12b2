# SPDX-License-Identifier: Apache-2.0
"""Qwen3 in plain PyTorch, and the fastest way to its attention."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.geometry import Geometry


class RmsNorm(nn.Module):
    """Over the last dimension, in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Causal, grouped, with QK-norm and rotated halves."""

    def __init__(self, g: Geometry, grouped: bool):
        super().__init__()
        q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
        self.q_proj = nn.Linear(g.hidden, q, bias=False)
        self.k_proj = nn.Linear(g.hidden, kv, bias=False)
        self.v_proj = nn.Linear(g.hidden, kv, bias=False)
        self.o_proj = nn.Linear(q, g.hidden, bias=False)
        self.q_norm = RmsNorm(g.head_dim, g.rms_eps)
        self.k_norm = RmsNorm(g.head_dim, g.rms_eps)
        self.geometry, self.grouped = g, grouped

    def forward(self, x, cos, sin):
        g = self.geometry
        heads = (*x.shape[:2], -1, g.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = attend(q, k, v, self.grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def rotate(x, cos, sin):
    """(a, b) to (a cos - b sin, b cos + a sin), in float32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def attend(q, k, v, grouped: bool):
    """SDPA by key-value heads as they are, or one for each query head."""
    if not grouped:
        repeats = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=grouped
    )


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, g: Geometry):
        super().__init__()
        self.gate_proj = nn.Linear(g.hidden, g.ffn, bias=False)
        self.up_proj = nn.Linear(g.hidden, g.ffn, bias=False)
        self.down_proj = nn.Linear(g.ffn, g.hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer."""

    def __init__(self, g: Geometry, grouped: bool):
        super().__init__()
        self.input_layernorm = RmsNorm(g.hidden, g.rms_eps)
        self.self_attn = Attention(g, grouped)
        self.post_attention_layernorm = RmsNorm(g.hidden, g.rms_eps)
        self.mlp = Mlp(g)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """What Hugging Face calls `model`."""

    def __init__(self, g: Geometry, grouped: bool):
        super().__init__()
        self.embed_tokens = nn.Embedding(g.vocab, g.hidden)
        self.layers = nn.ModuleList(Block(g, grouped) for _ in range(g.layers))
        self.norm = RmsNorm(g.hidden, g.rms_eps)


class Qwen3(nn.Module):
    """From ids [sequences, length] to logprobs of targets, float32."""

    def __init__(self, g: Geometry, grouped: bool = True):
        super().__init__()
        self.model = Trunk(g, grouped)
        self.geometry = g
        if not g.tied:
            self.lm_head = nn.Linear(g.hidden, g.vocab, bias=False)
        # Tokens of a piece of the head; 0: all at once.
        self.head_tokens = 0
        # Blocks from the first on that keep their input alone.
        self.checkpointed = 0

    def rope(self, length: int, device) -> tuple[torch.Tensor, torch.Tensor]:
        g = self.geometry
        even = torch.arange(0, g.head_dim, 2, device=device).float()
        angles = torch.outer(
            torch.arange(length, device=device).float(),
            1.0 / g.rope_theta ** (even / g.head_dim),
        )
        return angles.cos(), angles.sin()

    def forward(self, ids, targets, compute: torch.dtype):
        # An embedding is not cast by autocast; the residual stream is bf16.
        x = self.model.embed_tokens(ids).to(compute)
        cos, sin = self.rope(ids.shape[1], ids.device)
        for i, layer in enumerate(self.model.layers):
            if i < self.checkpointed:
                x = torch.utils.checkpoint.checkpoint(
                    layer, x, cos, sin, use_reentrant=False
                )
            else:
                x = layer(x, cos, sin)
        x = self.model.norm(x).flatten(0, 1)
        last = self.model.embed_tokens if self.geometry.tied else self.lm_head
        return head(x, last.weight, targets.flatten(), self.head_tokens)


def logprobs_of(x, weight, targets):
    """Log-softmax over the whole vocabulary, in float32."""
    logits = F.linear(x, weight).float()
    return -F.cross_entropy(logits, targets, reduction="none")


def head(x, weight, targets, piece: int):
    """By pieces of tokens whose logits the backward makes again, if any."""
    if piece <= 0:
        return logprobs_of(x, weight, targets)
    return torch.cat(
        [
            torch.utils.checkpoint.checkpoint(
                logprobs_of, a, weight, b, use_reentrant=False
            )
            for a, b in zip(x.split(piece), targets.split(piece), strict=True)
        ]
    )


def use_backend(backend: SDPBackend) -> None:
    """Every SDPA from here on, compiled ones too."""
    cuda = torch.backends.cuda
    cuda.enable_flash_sdp(backend == SDPBackend.FLASH_ATTENTION)
    cuda.enable_cudnn_sdp(backend == SDPBackend.CUDNN_ATTENTION)
    cuda.enable_mem_efficient_sdp(backend == SDPBackend.EFFICIENT_ATTENTION)
    cuda.enable_math_sdp(backend == SDPBackend.MATH)


def seconds_of(call: Callable[[], object], device: str, rounds: int) -> float:
    """The least of some, after two that warm up; the GPU's work included."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(2):
        timed()
    return min(timed() for _ in range(rounds))


def attention_ways(device: str) -> list[tuple[SDPBackend, bool]]:
    """SDPA's backends, each with and without grouped heads."""
    backends = [SDPBackend.MATH]
    if device == "cuda":
        backends = [
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
        ]
    return list(itertools.product(backends, [True, False]))


def attention_operands(
    g: Geometry, sequences: int, length: int, device: str
) -> list[torch.Tensor]:
    """q, k, v and d_out as a layer's SDPA gets them, normal data."""
    made = [
        torch.randn(
            (sequences, length, heads, g.head_dim),
            device=device,
            dtype=torch.bfloat16,
        ).transpose(1, 2)
        for heads in (g.heads, g.kv_heads, g.kv_heads, g.heads)
    ]
    return [x.requires_grad_() for x in made[:3]] + made[3:]


def best_attention(
    g: Geometry, sequences: int, length: int, device: str
) -> tuple[SDPBackend, bool]:
    """The fastest way on this device, forward and backward together."""
    q, k, v, d_out = attention_operands(g, sequences, length, device)
    best, best_seconds = None, float("inf")
    for backend, grouped in attention_ways(device):

        def run(backend=backend, grouped=grouped):
            with sdpa_kernel(backend):
                attend(q, k, v, grouped).backward(d_out)

        try:
            seconds = seconds_of(run, device, 5)
        except RuntimeError:  # it does not take these shapes
            continue
        if seconds < best_seconds:
            best, best_seconds = (backend, grouped), seconds
    if best is None:
        raise SystemExit("no backend of SDPA takes the model's attention")
    return best
