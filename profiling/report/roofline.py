"""Which of the machine's limits a graph is near, in numbers and in words.

A graph that makes fewer FLOPs for each byte than the machine can is bounded by memory, else by arithmetic. One that
reaches little of its bound waits for something else: launches, short loops, few rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from trio_edge.profiling.report.profile import Bound, Ceilings

NEAR = 0.15
"""Share of a ceiling below which it is not what bounds a graph."""


class Verdict(NamedTuple):
    """Where a graph stands."""

    bound: Bound
    of_ceiling: float
    text: str


def judge(*, flops: float, moved_bytes: float, milliseconds: float, ceilings: Ceilings) -> Verdict:
    """Return the verdict on one call.

    Args:
        flops: Of the call.
        moved_bytes: At least; above 0.
        milliseconds: That it took; above 0.
        ceilings: Of this machine.
    """
    of_compute = 1e3 * flops / milliseconds / ceilings.flops_per_s
    of_memory = 1e3 * moved_bytes / milliseconds / ceilings.bytes_per_s
    memory_bound = flops / moved_bytes < ceilings.flops_per_s / ceilings.bytes_per_s
    share, ceiling = (of_memory, "bandwidth") if memory_bound else (of_compute, "the matmul rate")
    if share < NEAR:
        return Verdict("neither", share, f"bound by neither: {100 * share:.2g} % of {ceiling}")
    if memory_bound and share > 1:
        return Verdict(
            "memory", share, f"memory-bound, {100 * share:.0f} % of bandwidth: its data stays in caches"
        )
    if share > 1:
        return Verdict(
            "compute", share, f"compute-bound, {100 * share:.0f} % of the matmul rate: that was disturbed"
        )
    return Verdict(
        "memory" if memory_bound else "compute",
        share,
        f"{'memory' if memory_bound else 'compute'}-bound, {100 * share:.0f} % of {ceiling}",
    )
