# SPDX-License-Identifier: Apache-2.0
"""The GPU itself: what it is, its ceilings, its clocks, its memory."""

from __future__ import annotations

import subprocess

import torch

from gpu.torch_model import seconds_of

# Dense bf16, of H100 SXM and H200 alike.
PEAK_FLOPS = 989.4e12


def query(*fields: str) -> list[str]:
    """What nvidia-smi says of the first GPU; empty if it says nothing."""
    try:
        done = subprocess.run(
            [
                "nvidia-smi",
                "--id=0",
                f"--query-gpu={','.join(fields)}",
                "--format=csv,noheader,nounits",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return [value.strip() for value in done.stdout.split(",")]


def need() -> None:
    """Ends the program where there is no GPU that PyTorch can use."""
    if not query("name"):
        raise SystemExit(
            "this machine has no GPU (nvidia-smi lists none): nothing was "
            "measured"
        )
    if not torch.cuda.is_available():
        raise SystemExit(
            f"PyTorch {torch.__version__} sees no GPU: nothing was measured; "
            "install a build with CUDA"
        )


def clocks() -> list[float] | None:
    """Of the multiprocessors and the memory, in MHz."""
    values = query("clocks.sm", "clocks.mem")
    return [float(value) for value in values] or None


def used_bytes() -> int:
    """By all processes, their contexts included."""
    return int(query("memory.used")[0]) << 20


def total_bytes() -> int:
    return int(query("memory.total")[0]) << 20


def peak_flops(name: str) -> float | None:
    """What `mfu_c` is a share of; None for other GPUs."""
    return PEAK_FLOPS if "H100" in name or "H200" in name else None


def gemm_ceiling(shapes: list[tuple[int, int, int]]) -> float:
    """The best FLOP/s of bf16 products (m, k, n) and of 8192^3."""
    best = 0.0
    for m, k, n in [(8192, 8192, 8192), *shapes]:
        a = torch.randn((m, k), device="cuda", dtype=torch.bfloat16)
        b = torch.randn((n, k), device="cuda", dtype=torch.bfloat16)
        out = a @ b.T
        seconds = seconds_of(
            lambda a=a, b=b, out=out: [
                torch.mm(a, b.T, out=out) for _ in range(10)
            ],
            "cuda",
            8,
        )
        best = max(best, 10 * 2.0 * m * k * n / seconds)
    torch.cuda.empty_cache()
    return best


def copy_ceiling() -> float:
    """Bytes/s, read and written, of a copy of 1 GiB."""
    a = torch.randn(1 << 28, device="cuda")
    b = torch.empty_like(a)
    seconds = seconds_of(lambda: [b.copy_(a) for _ in range(10)], "cuda", 8)
    return 10 * 2.0 * (4 << 28) / seconds
