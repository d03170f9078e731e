"""Encoder reduction: the reference's window and global selection with merging, and its bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.pictures import random_picture
from trio_edge.export.graphs.vision_reduced import check_encoder_keep, merge_dropped, select_patches
from trio_edge.runtime.errors import ScheduleError
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def plain_selection(local: NDArray[np.float64], overall: NDArray[np.float64], *, keep: int) -> list[int]:
    """The specification, patch by patch."""
    side = round(len(local) ** 0.5)
    window, chosen = side // 4, []
    for top in range(0, side, window):
        for left in range(0, side, window):
            patches = [
                row * side + column
                for row in range(top, top + window)
                for column in range(left, left + window)
            ]
            chosen += sorted(patches, key=lambda patch: -local[patch])[: keep // 32]
    others = [patch for patch in np.argsort(-overall) if patch not in chosen]
    return sorted([*chosen, *(int(patch) for patch in others[: keep // 2])])


def plain_merge(tokens: NDArray[np.float64], kept: list[int]) -> NDArray[np.float64]:
    """Every dropped token joins the most similar kept one."""
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    sums, counts = tokens[kept].copy(), np.zeros(len(kept))
    for patch in range(len(tokens)):
        if patch not in kept:
            nearest = int(np.argmax(unit[kept] @ unit[patch]))
            sums[nearest] += tokens[patch]
            counts[nearest] += 1
    return sums / (1 + counts[:, None])


@pytest.mark.parametrize(("side", "keep"), [(8, 32), (12, 64), (24, 96), (24, 288)])
def test_selection_and_merging_equal_the_specification(side: int, keep: int) -> None:
    generator = np.random.default_rng(side + keep)
    local, overall = generator.random((2, 3, side**2))
    tokens = generator.standard_normal((3, side**2, 5))
    kept = select_patches(torch.from_numpy(local).float(), torch.from_numpy(overall).float(), num_keep=keep)
    merged = merge_dropped(torch.from_numpy(tokens).float(), kept)
    for tile in range(3):
        expected = plain_selection(local[tile], overall[tile], keep=keep)
        assert kept[tile].tolist() == expected
        np.testing.assert_allclose(merged[tile], plain_merge(tokens[tile], expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("keep", "side", "reason"),
    [(48, 8, "multiple of 32"), (64, 8, "below 64"), (0, 8, "multiple of 32"), (32, 6, "equal windows")],
)
def test_impossible_budgets_are_refused(keep: int, side: int, reason: str) -> None:
    with pytest.raises(ScheduleError, match=reason):
        check_encoder_keep(keep, patches_per_side=side)


def test_a_bundle_with_encoder_reduction_answers_and_draws(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "ck", num_layers=2, patch_size=3)  # 8 x 8 patches a tile
    with Pipeline.from_bundle(export(checkpoint, tmp_path / "b", encoder_keep=32)) as pipeline:
        answer = pipeline.generate(random_picture(48, 48), "w1 w2", max_new_tokens=3)
        _ = answer.text
        assert pipeline.manifest.max_visual == 5 * 32
        assert answer.statistics.visual_tokens == 5 * 32
        assert answer.boxes.shape == (160, 4)
        small = pipeline.generate(random_picture(24, 40), "w1 w2", max_new_tokens=3)
        _ = small.text
        assert small.statistics.visual_tokens == 3 * 32
