"""Encoder reduction: the reference's window and global selection with merging, and its bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.matmul_flops import example_feeds, matmul_flops
from tests.pictures import random_picture
from trio_edge.export.graphs.vision.clip import check_encoder_keep, merge_dropped, select_patches
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
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


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tile keeps 32 of its 64 patches, and layer 1 on 40 of the picture's 5 * 32."""
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("ck") / "ck", num_layers=2, patch_size=3)
    return export(checkpoint, schedule=Schedule(stages=(Stage(layer=1, keep=40),)), encoder_keep=32)


def test_encoder_reduction_combines_with_stages_and_draws(bundle: Path) -> None:
    with Pipeline.from_bundle(bundle) as pipeline:
        answer = pipeline.generate(random_picture(48, 48), "w1 w2", max_new_tokens=3)
        _ = answer.text
        assert pipeline.manifest.max_visual == 5 * 32
        assert answer.statistics.visual_tokens == 5 * 32
        assert answer.statistics.kept_tokens == (40,)
        assert answer.boxes.shape == (160, 4)
        small = pipeline.generate(random_picture(24, 40), "w1 w2", max_new_tokens=3)
        _ = small.text
        assert small.statistics.visual_tokens == 3 * 32


def test_the_average_keep_is_a_share_of_the_picture_without_encoder_reduction(bundle: Path) -> None:
    """5 tiles of 64 patches, and newlines that encoder reduction has none of; two layers see 160 and 40."""
    manifest = open_bundle(bundle).manifest
    assert manifest.cost.image_tokens is not None
    assert manifest.cost.image_tokens > 5 * 64 > manifest.cost.num_visual == 5 * 32
    assert manifest.average_keep == pytest.approx((160 + 40) / (2 * manifest.cost.image_tokens))
    assert manifest.cost.full_kv_bytes / manifest.cost.reduced_kv_bytes > 2.5


def test_the_merging_of_dropped_patches_is_counted(bundle: Path) -> None:
    """Beside the class row of one layer, local and global one here: query and scores, 2 F² + 2 P F in each of 5 tiles."""
    manifest = open_bundle(bundle).manifest
    graph = manifest.graph("vision")
    products = matmul_flops(bundle / graph.file, example_feeds(graph, graph.profiles[-1]))
    class_row = 5 * (2 * 32**2 + 2 * 65 * 32)
    assert manifest.cost.reduced_flops["vision"] == products - class_row
