"""Does a model fit a device: the estimate against real bundles, verdicts for known models, and what would fit."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from tests.schedules import schedule_for, schedule_of
from trio_edge.export.check.fit import FitImage, FitInputs, check_fit, estimate, remedies
from trio_edge.export.cli import main
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.profiling.predict.models import MODELS
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.bundle.manifest import VisionDimensions
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.trio.cost.devices import DEVICES, find_device
from trio_edge.trio.cost.memory import Texts, Tiles, TokenSelection, num_head_blocks, tiles_of

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30
CLIP = Tiles(num_tiles=5, patches=577, hidden_size=1024, intermediate_size=4096)
SMALL = FitImage(num_visual=1176, tiles=CLIP._replace(num_tiles=2), pixel_bytes=8 * 3 * 336**2)


def llava_next_7b(**changes: Any) -> FitInputs:
    """LLaVA-NeXT-7B in float16 at 11.1 %."""
    inputs = FitInputs(
        decoder=MODELS["llava-next-7b"].decoder,
        vision_params=325_000_000,
        image=FitImage(num_visual=2880, tiles=CLIP, pixel_bytes=20 * 3 * 336**2),
        schedule=schedule_of("1:460,10:270,15:110"),
        max_text=256,
        max_new_tokens=256,
        small_image=SMALL,
    )
    return dataclasses.replace(inputs, **changes)


def usable(name: str) -> int:
    return find_device(name).usable_bytes


def test_float16_7b_does_not_fit_orin_nano_and_int4_alone_would_not_either() -> None:
    warning = check_fit(llava_next_7b(), find_device("orin-nano-8"))
    assert warning is not None
    assert "\n" not in warning
    assert warning.startswith(
        "--target jetson-orin-nano-8: expected at most 5.9 GiB (8.0 less 2.1 for the system)"
    )
    assert "--quantize all=int4 alone would not fit (6.5)" in warning


def test_float16_7b_does_not_fit_orin_nx_and_int4_would() -> None:
    warning = check_fit(llava_next_7b(), find_device("orin-nx-16"))
    assert warning is not None
    assert warning.endswith("--quantize all=int4 would fit (6.5)")


@pytest.mark.parametrize("name", ["agx-orin-64", "agx-orin-32", "rtx-4090"])
def test_float16_7b_fits_large_devices(name: str) -> None:
    assert check_fit(llava_next_7b(), find_device(name)) is None


def test_combination_is_offered_where_no_single_change_fits() -> None:
    warning = check_fit(llava_next_7b(), find_device("orin-nano-8"))
    assert warning is not None
    assert warning.endswith("; --quantize all=int4 + --image-size 336x336 --only-image-sizes would fit (4.8)")


def test_model_that_nothing_makes_small_enough_is_said_so() -> None:
    target = dataclasses.replace(find_device("orin-nano-8"), memory_bytes=3 * GIB)
    warning = check_fit(llava_next_7b(), target)
    assert warning is not None
    assert warning.endswith("choose a smaller model")


@pytest.mark.parametrize(("method", "matrices"), [("fastv", 2), ("dart", 1)])
def test_stages_of_other_methods_repeat_what_makes_keys_and_queries(method: str, matrices: int) -> None:
    schedule = Schedule(stages=(Stage(layer=2, keep=460),), method=method)
    parts = estimate(llava_next_7b(schedule=schedule), usable_bytes=0).parts
    assert parts["repeated weights"] == matrices * 4096 * 4096 * 2


def test_boundary_belongs_to_what_fits() -> None:
    total = estimate(llava_next_7b(), usable_bytes=0).total_bytes
    assert estimate(llava_next_7b(), usable_bytes=total).fits
    assert not estimate(llava_next_7b(), usable_bytes=total - 1).fits


def test_every_remedy_is_smaller_than_the_request() -> None:
    inputs = llava_next_7b(schedule=Schedule(), element_bytes=4)
    before = estimate(inputs, usable_bytes=0).total_bytes
    options = remedies(inputs, usable_bytes=0)
    assert [option.label for option in options[:5]] == [
        "--dtype float16",
        "--quantize all=int4",
        "--keep 11.1%",
        "--image-size 336x336 --only-image-sizes",
        "--max-text 64 --max-new-tokens 64",
    ]
    weights_of_stages = estimate(
        dataclasses.replace(inputs, schedule=llava_next_7b().schedule), usable_bytes=0
    ).parts["repeated weights"]
    for option in options:
        assert option.fit.total_bytes < before + weights_of_stages, option.label
    assert options[-1].fit.total_bytes == min(option.fit.total_bytes for option in options)


def test_changes_that_are_made_already_are_not_offered() -> None:
    inputs = llava_next_7b(quantize=parse_plan("all=int4"), small_image=None, max_text=64, max_new_tokens=64)
    assert remedies(inputs, usable_bytes=0) == []
    warning = check_fit(inputs, dataclasses.replace(find_device("orin-nano-8"), memory_bytes=3 * GIB))
    assert warning is not None
    assert warning.endswith("no option makes it smaller; choose a smaller model")


def test_quantized_parts_are_smaller_and_leave_the_rest() -> None:
    full, four, outliers, eight = (
        estimate(llava_next_7b(quantize=parse_plan(plan)), usable_bytes=0).parts
        for plan in ("none", "int4", "int4,outliers=10%", "head=int8,vision=int8")
    )
    decoder = llava_next_7b().decoder
    assert four["decoder weights"] == pytest.approx(0.30 * full["decoder weights"])
    assert outliers["decoder weights"] == pytest.approx(0.40 * full["decoder weights"])
    assert eight["head and vision weights"] == pytest.approx(0.5 * full["head and vision weights"])
    # probes share all but the attention of quantized layers, of which they read keys, values and output again
    assert full["repeated weights"] == 0
    attention = 3 * decoder.hidden_size**2
    layer = 4 * decoder.hidden_size**2 + 3 * decoder.hidden_size * decoder.intermediate_size
    share = 3 / decoder.num_layers * attention / layer
    assert four["repeated weights"] == pytest.approx(share * four["decoder weights"])
    assert eight["repeated weights"] == 0
    small = four
    assert small["KV caches"] == full["KV caches"]


def test_activations_hold_the_attention_scores_of_the_first_range() -> None:
    rows = 2880 + 256
    assert estimate(llava_next_7b(), usable_bytes=0).parts["workspace"] > 32 * rows**2 * (4 + 2)


def test_a_whole_image_needs_the_scores_of_one_block_of_heads() -> None:
    tower = VisionDimensions(
        num_layers=32, hidden_size=1280, intermediate_size=3420, patches_per_tile=None, projector_weights=0
    )
    tiles = tiles_of(tower, {"P": 5184, "N": 1296})
    inputs = dataclasses.replace(
        llava_next_7b(schedule=Schedule(), max_text=8),
        image=FitImage(num_visual=8, tiles=tiles, pixel_bytes=0),
    )
    scores = 5184**2 * 2 * 2
    assert estimate(inputs, usable_bytes=0).parts["workspace"] == 6 * 5184 * 1280 * 2 + scores


@pytest.mark.parametrize(
    ("num_heads", "num_patches", "blocks"),
    [(16, 1024, 1), (16, 1025, 2), (16, 2304, 8), (16, 5120, 16), (16, 65536, 16), (0, 10, 1)],
)
def test_blocks_of_heads_are_equal_and_as_few_as_fit(num_heads: int, num_patches: int, blocks: int) -> None:
    assert num_head_blocks(num_heads, num_patches) == blocks


def test_int8_caches_are_half_of_float16_ones() -> None:
    whole, rounded = (
        estimate(llava_next_7b(quantize=parse_plan(plan)), usable_bytes=0).parts
        for plan in ("none", "kv=int8")
    )
    assert 2 * rounded["KV caches"] == whole["KV caches"]
    assert rounded["decoder weights"] == whole["decoder weights"]


def test_a_selection_before_the_decoder_leaves_small_caches_and_needs_its_own_scratch_memory() -> None:
    whole = llava_next_7b(schedule=Schedule(), max_text=64)
    chosen = dataclasses.replace(whole, token_selection=TokenSelection("divprune", 160, 4096))
    with_clip = dataclasses.replace(chosen, texts=Texts(400, 77, 768))
    parts, before = (estimate(inputs, usable_bytes=0).parts for inputs in (chosen, whole))
    rows = [inputs.entering + 64 + 256 for inputs in (chosen, whole)]
    assert parts["KV caches"] * rows[1] == before["KV caches"] * rows[0]
    assert parts["workspace"] == 8 * 2880 * 4096 + 12 * 2880**2 < before["workspace"]
    clip = 400 * (6 * 77 * 768 * 2 + 2 * 77 * 4 * 768 * 2)
    assert estimate(with_clip, usable_bytes=0).parts["workspace"] == clip > parts["workspace"]


@pytest.mark.parametrize("fixture", ["keep_all_bundle", "reduced_bundle"])
def test_weights_and_caches_are_those_of_the_exported_bundle(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    manifest = open_bundle(request.getfixturevalue(fixture)).manifest
    tiles = Tiles(num_tiles=5, patches=10, hidden_size=32, intermediate_size=64)
    inputs = FitInputs(
        decoder=manifest.dimensions,
        element_bytes=4,
        vision_params=manifest.graph("vision").weight_bytes // 4,
        image=FitImage(num_visual=manifest.visual_sizes[-1], tiles=tiles, pixel_bytes=0),
        schedule=manifest.schedule,
        max_text=manifest.text_buckets[-1],
        max_new_tokens=manifest.max_new_tokens,
    )
    parts = estimate(inputs, usable_bytes=0).parts
    weights = sum(count for name, count in parts.items() if name.endswith("weights"))
    assert weights == pytest.approx(sum(graph.weight_bytes for graph in manifest.graphs), rel=0.05)
    assert parts["KV caches"] == manifest.kv_bytes


def test_unknown_target_gives_one_line_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["nonsense", "--target", "orin-nano-9", "--out", str(tmp_path / "bundle")])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert [line for line in lines if line.startswith("trio-export: --target: expected one of ")] == lines
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("memory_bytes", "warns"), [(1 << 20, True), (1 << 34, False)])
def test_export_warns_before_tracing_when_the_target_is_too_small(
    memory_bytes: int,
    warns: bool,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_arguments: object, **_settings: object) -> None:
        raise CheckpointError("stopped where tracing starts")

    target = dataclasses.replace(
        find_device("orin-nano-8"), name="toy", memory_bytes=memory_bytes, reserve_bytes=1
    )
    monkeypatch.setitem(DEVICES, "toy", target)
    monkeypatch.setattr("trio_edge.export.bundle.trace_graphs", stop)
    main([str(checkpoint), "--keep", "all", "--target", "toy", "--quiet", "--out", str(tmp_path / "bundle")])
    lines = capsys.readouterr().err.splitlines()
    warnings = [
        line for line in lines if line.startswith("trio-export: warning: --target toy: expected at most")
    ]
    assert len(warnings) == warns
    assert lines[-1] == "trio-export: stopped where tracing starts"


@pytest.mark.parametrize("method", ["trio", "fastv", "sparsevlm"])
def test_the_advised_keep_is_that_of_the_chosen_method(method: str) -> None:
    """FastV's one stage at layer 2 leaves other caches, and repeats weights that TRIO's stages share."""
    inputs = llava_next_7b(schedule=Schedule(method=method))
    (remedy,) = (one for one in remedies(inputs, usable_bytes=0) if one.label == "--keep 11.1%")
    schedule = schedule_for(0.111, method=method, num_layers=32, num_visual=2880)
    assert remedy.fit == estimate(dataclasses.replace(inputs, schedule=schedule), usable_bytes=0)
    assert (remedy.fit.parts["repeated weights"] > 0) == (method != "trio")


def test_keep_all_with_a_method_advises_for_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[FitInputs] = []

    def stop(inputs: FitInputs, _target: object) -> None:
        seen.append(inputs)
        raise CheckpointError("stopped")

    monkeypatch.setattr("trio_edge.export.bundle.check_fit", stop)
    arguments = [
        "--keep",
        "all",
        "--method",
        "fastv",
        "--target",
        "orin-nano-8",
        "--out",
        str(tmp_path / "bundle"),
    ]
    assert main([str(checkpoint), *arguments]) == 2
    assert seen[0].schedule.method == "fastv"
