"""Peak rates of this device, measured in the same run: a large product for FLOP/s, a large copy for bytes/s."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_parts.clock import differences_ms, mark

_RUNS = 10


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Rates that no part of a model can exceed by much."""

    flops_per_s: float
    """Rate of one square product in the model's type."""
    bytes_per_s: float
    """Read and written together, while copying."""
    matmul_size: int
    copy_bytes: int


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Return both rates; sizes are small on a CPU."""
    gpu = device.type == "cuda"
    size, count = (8192, 1 << 30) if gpu else (512, 1 << 24)
    left = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    right = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    product = torch.empty(size, size, device=device, dtype=dtype)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product_ms = median_ms(lambda: torch.matmul(left, right, out=product), device=device)
    copy_ms = median_ms(lambda: target.copy_(source), device=device)
    return Ceilings(
        flops_per_s=2.0 * size**3 / (1e-3 * product_ms),
        bytes_per_s=2.0 * count / (1e-3 * copy_ms),
        matmul_size=size,
        copy_bytes=count,
    )


def median_ms(function: Callable[[], Any], *, device: torch.device, runs: int = _RUNS) -> float:
    """Return the median time of one call, after two warm-up calls."""
    for _ in range(2):
        function()
    times = []
    for _ in range(runs):
        marks = [mark(device)]
        function()
        marks.append(mark(device))
        times += differences_ms(marks, device)
    return statistics.median(times)
