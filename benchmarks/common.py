# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks in Python share: their JSON line and their probes."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable

FIELDS = [
    *("bench", "commit", "device", "driver", "model", "mode", "dtype"),
    *("optimizer", "T", "tokens", "packing", "microbatch", "recompute"),
    *("rounds", "ms", "tok_s", "mfu_c", "mcu", "hfu", "gbps", "peak_mem"),
    *("ceil_gemm", "ceil_copy", "clock_before", "clock_after", "baseline"),
    *("ratio", "dloss", "grad_cos"),
]


def print_line(bench: str, **values: object) -> None:
    """One JSON line: FIELDS, null where not given, and whatever else is."""
    line: dict[str, object] = dict.fromkeys(FIELDS)
    line |= {"bench": bench, "commit": commit(), "device": device()}
    line |= values
    print(json.dumps(line), flush=True)


def commit() -> str | None:
    """The tree's commit, "-dirty" if it has changes; None outside git.

    Of packed programs (tests/gpu/pack.sh) it is theirs.
    """
    if os.environ.get("GRADWIRE_COMMIT"):
        return os.environ["GRADWIRE_COMMIT"]
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def device() -> str:
    """The processor and the extensions that decide its matmuls' speed."""
    info = pathlib.Path("/proc/cpuinfo").read_text()
    found = re.search(r"model name\s*:\s*(.*)", info)
    flags = [
        flag
        for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        if re.search(rf"\b{flag}\b", info)
    ]
    name = found.group(1) if found else platform.machine()
    return f"{name}, {os.cpu_count()} cores, {' '.join(flags)}"


def clock_mhz() -> float | None:
    """The mean of what the system says of the cores' clocks."""
    info = pathlib.Path("/proc/cpuinfo").read_text()
    values = [float(x) for x in re.findall(r"cpu MHz\s*:\s*([\d.]+)", info)]
    return statistics.mean(values) if values else None


def peak_bytes(pid: int | str) -> int:
    """The largest resident set of a process so far."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no VmHWM for process {pid}")


def children(pid: int) -> list[int]:
    """Its child processes."""
    tasks = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    return [int(c) for task in tasks for c in task.read_text().split()]


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def milliseconds(seconds: list[float]) -> list[float]:
    """Median, least and most."""
    return [
        1e3 * statistics.median(seconds),
        1e3 * min(seconds),
        1e3 * max(seconds),
    ]


def alternate(
    ways: dict[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """Each way's seconds, a round of all after a round of all."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(way())
    return seconds


def gemm_ceiling(
    shapes: list[tuple[int, int, int]], dtype: str, threads: int
) -> float:
    """The best FLOP/s of PyTorch's product over (m, k, n), normal data."""
    import torch

    torch.set_num_threads(threads)
    best = 0.0
    for m, k, n in shapes:
        a, b = torch.randn(m, k), torch.randn(k, n)
        if dtype == "bf16":
            a, b = a.bfloat16(), b.bfloat16()
        out = a @ b
        seconds = [
            timed(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
            for _ in range(8)
        ]
        best = max(best, 2.0 * m * k * n / min(seconds))
    return best


def triad_ceiling(threads: int) -> float:
    """The best bytes/s of a = b + c * s over arrays beyond any cache."""
    import torch

    torch.set_num_threads(threads)
    n = 1 << 26
    a, b, c = torch.empty(n), torch.randn(n), torch.randn(n)
    seconds = [
        timed(lambda: torch.add(b, c, alpha=2.0, out=a)) for _ in range(6)
    ]
    return 12.0 * n / min(seconds)
