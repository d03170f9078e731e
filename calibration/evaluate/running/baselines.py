"""Selections that look at nothing but positions: the floors that a real method must beat.

Each returns a function for ``Pipeline.generate(override=…)``; kept tokens are nested from stage to stage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trio_edge.runtime.decoder import SelectorOverride

BASELINES = ("random", "uniform", "base-tile-first")


def baseline(name: str, *, seed: int, base_tokens: int) -> SelectorOverride:
    """Return the baseline called ``name``.

    Args:
        name: One of ``BASELINES``.
        seed: Of "random"; give each sample its own.
        base_tokens: Visual tokens of the base tile, which come first; 0 without one, then all are alike.
    """
    if name == "random":
        return _random(seed)
    if name == "uniform":
        return lambda _stage, entering, num_keep: evenly_spaced(len(entering), num_keep)
    if name == "base-tile-first":
        return lambda _stage, entering, num_keep: _base_first(entering, num_keep, base_tokens)
    raise ValueError(f"baseline: expected one of {', '.join(BASELINES)}, got {name!r}")


def evenly_spaced(count: int, num_keep: int) -> NDArray[np.int32]:
    """Return ``num_keep`` of ``count`` indices, each in the middle of its equal share, ascending."""
    return np.floor((np.arange(num_keep) + 0.5) * count / max(num_keep, 1)).astype(np.int32)


def _random(seed: int) -> SelectorOverride:
    generator = np.random.default_rng(seed)

    def choose(_stage: int, entering: NDArray[np.int32], num_keep: int) -> NDArray[np.int32]:
        return np.sort(generator.choice(len(entering), num_keep, replace=False)).astype(np.int32)

    return choose


def _base_first(entering: NDArray[np.int32], num_keep: int, base_tokens: int) -> NDArray[np.int32]:
    num_base = int(np.count_nonzero(entering < base_tokens))  # the base tile's tokens come first
    if num_keep <= num_base:
        return evenly_spaced(num_base, num_keep)
    others = num_base + evenly_spaced(len(entering) - num_base, num_keep - num_base)
    return np.concatenate([np.arange(num_base), others]).astype(np.int32)
