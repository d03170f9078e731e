"""FLOPs and visual tokens of one answer against the manifest's own count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from trio_edge.calibration.evaluate.answer_cost import prefill_flops, processed_tokens
from trio_edge.runtime.bundle.reader import open_bundle

if TYPE_CHECKING:
    from pathlib import Path


def test_the_manifests_picture_costs_what_the_manifest_says(
    reduced_bundle: Path, keep_all_bundle: Path
) -> None:
    for bundle, kept in ((reduced_bundle, (14, 6)), (keep_all_bundle, ())):
        manifest = open_bundle(bundle).manifest
        cost = manifest.cost
        flops = prefill_flops(manifest, image_tokens=[cost.num_visual], kept=kept, num_text=cost.num_text)
        assert flops == pytest.approx(sum(cost.reduced_flops.values()), rel=1e-6)


def test_a_selection_that_computes_nothing_costs_no_stage(reduced_bundle: Path) -> None:
    manifest = open_bundle(reduced_bundle).manifest
    sizes = {"image_tokens": [manifest.cost.num_visual], "kept": (14, 6), "num_text": manifest.cost.num_text}
    saved = prefill_flops(manifest, **sizes) - prefill_flops(manifest, **sizes, select=False)
    assert saved == pytest.approx(manifest.cost.reduced_flops["select"], rel=1e-6)


def test_a_smaller_picture_costs_less(reduced_bundle: Path) -> None:
    manifest = open_bundle(reduced_bundle).manifest
    small, large = (prefill_flops(manifest, image_tokens=[n], kept=(14, 6), num_text=9) for n in (20, 40))
    assert 0 < small < large


def test_processed_tokens_count_every_layer(reduced_bundle: Path) -> None:
    """Three layers: all 20, then 14, then 6."""
    manifest = open_bundle(reduced_bundle).manifest
    assert processed_tokens(manifest, image_tokens=[20], kept=(14, 6)) == pytest.approx(40 / 3)
