"""How SparseVLM's K rows split into kept tokens and clusters; the derivation is in ``sparse_vlm``. Needs no torch."""

from __future__ import annotations


def split_of(num_visual: int, num_keep: int) -> tuple[int, int, int]:
    """Return how many tokens are kept, how many clusters there are and how many tokens are in one.

    Args:
        num_visual: V.
        num_keep: K, rows that go on.
    """
    excess = num_visual - num_keep
    if excess <= 0:
        return num_keep, 0, 0
    num_merged = min((100 * excess + 10) // 97 + 1 - excess, num_keep // 2)
    num_removed = num_visual - (num_keep - num_merged)
    return num_keep - num_merged, num_merged, 3 * num_removed // 10 + 1
