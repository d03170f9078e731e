"""Measures a way: warm-up, CUDA graphs of the parts that can be one, median times, peak memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_parts.clock import differences_ms, mark, wait
from gpu_parts.way import Part, Way

DECODE = "decode"
WARM_UPS = {"cuda": 3, "cpu": 1}
"""Runs before those that are timed."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Times and memory of one way with one schedule; times are medians in milliseconds."""

    way: str
    parts_ms: dict[str, float]
    """In the order in which a prefill runs them."""
    ttft_ms: float
    """All parts, one after the other: from the image's pixels on the device to the first token on the device."""
    decode_ms: float
    """One token."""
    peak_bytes: int | None
    """Peak memory of this process on the device, with weights; None if unknown."""
    kv_bytes: int
    """KV rows after a prefill."""
    cuda_graphs: tuple[str, ...] = ()
    """Parts that were one CUDA graph."""
    notes: tuple[str, ...] = ()
    """Parts that did not run as asked, with the reason."""


def measure(way: Way, *, repeats: int, num_tokens: int, cuda_graphs: bool) -> Measured:
    """Run ``way`` several times.

    Args:
        way: With its buffers allocated.
        repeats: Timed prefills.
        num_tokens: Timed decode steps; the caches must have room for twice as many.
        cuda_graphs: Whether parts become CUDA graphs; only on a GPU.
    """
    device = way.subject.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    runs = [part.run for part in way.parts]
    decode: Callable[[], Any] = way.decode
    for _ in range(WARM_UPS[device.type]):
        for run in runs:
            run()
    for _ in range(WARM_UPS[device.type]):
        decode()
    captured, notes = _Captured(device), []
    if cuda_graphs and device.type == "cuda":
        runs = [captured.wrap(part) for part in way.parts]
        decode = captured.wrap(Part(DECODE, way.decode))
        notes = captured.failures
        for run in runs:
            run()
    names = [part.name for part in way.parts]
    times = _prefill_times(runs, repeats=repeats, device=device)
    decode_times = []
    way.buffers.rewind()
    for _ in range(num_tokens):
        marks = [mark(device)]
        decode()
        marks.append(mark(device))
        decode_times += differences_ms(marks, device)
    return Measured(
        way=way.name,
        parts_ms={name: statistics.median(run[index] for run in times) for index, name in enumerate(names)},
        ttft_ms=statistics.median(sum(run) for run in times),
        decode_ms=statistics.median(decode_times),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        kv_bytes=way.buffers.kv_bytes,
        cuda_graphs=tuple(captured.names),
        notes=tuple(notes),
    )


def _prefill_times(runs: list[Callable[[], Any]], *, repeats: int, device: torch.device) -> list[list[float]]:
    """Return per run the milliseconds of each part; nothing waits for the device between parts."""
    times = []
    for _ in range(repeats):
        marks = [mark(device)]
        for run in runs:
            run()
            marks.append(mark(device))
        times.append(differences_ms(marks, device))
    return times


class _Captured:
    """CUDA graphs that share one pool of memory, launched in the order in which they were captured."""

    def __init__(self, device: torch.device) -> None:
        self.names: list[str] = []
        self.failures: list[str] = []
        self._device, self._pool = device, None

    def wrap(self, part: Part) -> Callable[[], Any]:
        """Return a function that launches the part as a CUDA graph; its own function if it cannot be one."""
        if not part.capturable:
            part.run()
            return part.run
        graph = torch.cuda.CUDAGraph()
        wait(self._device)
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                part.run()
        except RuntimeError as error:
            wait(self._device)
            self.failures.append(f"{part.name} is no CUDA graph: {str(error).splitlines()[0]}")
            return part.run
        self._pool = graph.pool()
        self.names.append(part.name)
        graph.replay()
        return graph.replay
