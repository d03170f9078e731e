"""Every level of a bundle gives, bit for bit, what a bundle exported with that level alone gives; so does "auto", from below."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import pytest

from tests.bundles import INT8_CACHES, export
from tests.checkpoints import save_checkpoint
from tests.engine_bundles import build_here
from tests.pictures import random_picture
from tests.several_images import FAMILIES, MAX_IMAGES, Family, stages_of
from tests.tolerances import LOGITS_FLOAT16, LOGITS_FLOAT32
from trio_edge.export.options import LevelRequest
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.export.quantize.scales import CalibratedScales
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.runtime.decisions.questions import Question
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

KEEPS = {"usual": (30, 11), "quick": (13, 4), "small": (9, 4), "full": ()}
FORMS = {"qwen2_5_vl": "84x84", "qwen3_vl": "96x96", "qwen3_5": "96x96", "mistral3": "56x56", "llava": None}
"""Form of the level "small"; other families have a base tile."""
PROMPTS = ("w3 w1", " ".join(f"w{number % 9}" for number in range(40)))
"""A question for the smallest text bucket, and one for the largest."""
QUESTION = Question.choice("w1 w2", ["w3", "w4 w5", "w6"])


class Levelled(NamedTuple):
    many: Pipeline
    alone: dict[str, Pipeline]


def levels_of(family: Family, name: str) -> list[LevelRequest]:
    found = []
    for level, keeps in KEEPS.items():
        schedule = Schedule(positions=family.positions, stages=stages_of(family, *keeps))
        form = FORMS.get(name, "base") if level == "small" else None
        found.append(LevelRequest(level, schedule, form))
    return found


def export_levels(
    folder: Path, levels: Sequence[LevelRequest], **options: Any
) -> tuple[Path, dict[str, Path]]:
    """Return the bundle with all levels, and one with each of them alone."""
    alone = {level.name: export(folder, levels=(level,), **options) for level in levels}
    return export(folder, levels=tuple(levels), **options), alone


@pytest.fixture(scope="module", params=list(FAMILIES))
def levelled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Levelled]:
    family = FAMILIES[request.param]
    folder = family.save(tmp_path_factory.mktemp(request.param) / "ck")
    options = {"max_images": MAX_IMAGES, **dict(family.options)}
    many, alone = export_levels(folder, levels_of(family, request.param), **options)
    opened = {name: Pipeline.from_bundle(bundle, threads=1) for name, bundle in alone.items()}
    with Pipeline.from_bundle(many, threads=1) as pipeline:
        yield Levelled(pipeline, opened)
    for other in opened.values():
        other.close()


def pictures(count: int) -> list[Any]:
    sizes = [(60, 45), (37, 101)]
    return [random_picture(*sizes[number], seed=number) for number in range(count)]


def answer(pipeline: Pipeline, count: int, prompt: str, level: str | None = None, **more: Any) -> Any:
    made = pipeline.generate(pictures(count), prompt, level=level, max_new_tokens=6, temperature=0, **more)
    _ = made.text
    return made


def assert_same(ours: Any, theirs: Any, tolerance: dict[str, float] | None = None) -> None:
    assert ours.token_ids == theirs.token_ids
    if (
        ours.statistics.level == "small"
    ):  # alone, the vision graph's sizes are constants, and constants round otherwise
        tolerance = LOGITS_FLOAT32
    if tolerance is not None:
        np.testing.assert_allclose(ours.first_logits, theirs.first_logits, **tolerance)
    else:
        np.testing.assert_array_equal(ours.first_logits, theirs.first_logits)
    assert len(ours.kept) == len(theirs.kept)
    for kept, others in zip(ours.kept, theirs.kept):
        np.testing.assert_array_equal(kept, others)
    for name in ("visual_tokens", "kept_tokens", "average_keep", "text_tokens", "kv_bytes"):
        assert getattr(ours.statistics, name) == getattr(theirs.statistics, name), name


def test_a_level_is_the_bundle_with_that_level_alone(levelled: Levelled) -> None:
    # Levels take turns in one memory, so each runs after another one's rows.
    for prompt in PROMPTS:
        for count in (0, 1, 2):
            for level, alone in levelled.alone.items():
                ours, theirs = answer(levelled.many, count, prompt, level), answer(alone, count, prompt)
                assert (ours.statistics.level, theirs.statistics.level) == (level, level)
                assert_same(ours, theirs)


def test_the_first_level_is_the_default(levelled: Levelled) -> None:
    assert_same(answer(levelled.many, 1, PROMPTS[0]), answer(levelled.alone["usual"], 1, PROMPTS[0]))


@pytest.mark.parametrize("chain", [("quick", "full"), ("small", "quick", "usual", "full")])
def test_auto_goes_up_to_what_the_last_level_gives(
    levelled: Levelled, chain: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    margins = {**dict.fromkeys(chain, 1.0), chain[-1]: 0.0}
    monkeypatch.setattr(levelled.many, "_margins", margins)
    for prompt in PROMPTS:
        for count in (0, 1, 2):
            ours = answer(levelled.many, count, prompt, "auto")
            assert_same(ours, answer(levelled.alone[chain[-1]], count, prompt))
            assert ours.statistics.levels_below == chain[:-1]
            # Between levels with the same images, neither tower nor first layer range runs again.
            sizes = {levelled.alone[name].manifest.visual_sizes for name in chain}
            if len(sizes) == 1:
                recorded = levelled.many.level_named(chain[-1]).decoder.timeline.recorded
                assert "prefix" not in recorded
                assert "segment_1" in recorded or "suffix" in recorded


def test_auto_stays_where_it_is_sure(levelled: Levelled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levelled.many, "_margins", {"quick": 1e-9, "full": 0.0})
    ours = answer(levelled.many, 1, PROMPTS[0], "auto")
    assert_same(ours, answer(levelled.alone["quick"], 1, PROMPTS[0]))
    assert (ours.statistics.levels_below, ours.statistics.level) == ((), "quick")
    first, second, *_ = np.sort(np.exp(ours.first_logits - np.logaddexp.reduce(ours.first_logits)))[::-1]
    assert ours.statistics.margin == pytest.approx(first - second, rel=1e-4)


def test_decisions_at_a_level_and_going_up(levelled: Levelled, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [QUESTION, Question.choice("w4", ["w5", "w3"]), Question.score("w2", ["w7", "w8", "w1"])]
    for asked in (questions[:1], questions):
        for level, alone in levelled.alone.items():
            ours = levelled.many.decide(pictures(1), asked, level=level)
            theirs = alone.decide(pictures(1), asked)
            for one, other in zip(ours, theirs):
                tolerance = LOGITS_FLOAT32 if level == "small" else {"rtol": 0.0}
                np.testing.assert_allclose(one.probabilities, other.probabilities, **tolerance)
        monkeypatch.setattr(levelled.many, "_margins", {"quick": 1.0, "usual": 1.0, "full": 0.0})
        ours = levelled.many.decide(pictures(1), asked, level="auto")
        theirs = levelled.alone["full"].decide(pictures(1), asked)
        assert [one.probabilities for one in ours] == [one.probabilities for one in theirs]
        assert {one.statistics.levels_below for one in ours} == {("quick", "usual")}
        margins = [one.margin for one in levelled.many.decide(pictures(1), asked, level="quick")]
        # Only the questions that leave doubt are asked again.
        monkeypatch.setattr(levelled.many, "_margins", {"quick": max(margins), "full": 0.0})
        again = levelled.many.decide(pictures(1), asked, level="auto")
        expected = ["quick" if margin == max(margins) else "full" for margin in margins]
        assert [one.statistics.level for one in again] == expected
        # What was sure enough below is not judged by a higher level's margin.
        monkeypatch.setattr(levelled.many, "_margins", {"quick": max(margins), "usual": 1.0, "full": 0.0})
        again = levelled.many.decide(pictures(1), asked, level="auto")
        assert [one.statistics.level for one in again] == expected


VARIANTS: dict[str, dict[str, Any]] = {
    "float16": {"dtype": "float16"},
    "int8": {"quantize": parse_plan("all=int8")},
    "int4 and a cache in int8": {"quantize": parse_plan("all=int4,kv=int8"), "scales": INT8_CACHES},
    "follow-ups": {"follow_ups": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_levels_of_other_formats(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_checkpoint(tmp_path / "ck", num_layers=3)
    options = {"max_images": 2, "scales": CalibratedScales(), **VARIANTS[variant]}
    levels = [level for level in levels_of(FAMILIES["llava_next"], "llava_next") if level.image_form is None]
    many, alone = export_levels(folder, levels, **options)
    keep = {"keep_images": 2} if variant == "follow-ups" else {}
    with Pipeline.from_bundle(many, threads=1, **keep) as pipeline:
        for level, bundle in alone.items():
            with Pipeline.from_bundle(bundle, threads=1, **keep) as own:
                # Alone, "full" is one layer range: float16 is not rounded within it, and a question's rows run apart in all.
                tolerance = {"float16": LOGITS_FLOAT16, "follow-ups": LOGITS_FLOAT32}.get(variant)
                for prompt in (*PROMPTS, PROMPTS[0]):
                    theirs = answer(own, 1, prompt)
                    assert_same(
                        answer(pipeline, 1, prompt, level), theirs, tolerance if level == "full" else None
                    )
                if level == "full":
                    monkeypatch.setattr(pipeline, "_margins", {"quick": 1.0, "usual": 1.0, "full": 0.0})
                    up = answer(pipeline, 1, PROMPTS[1], "auto")
                    assert_same(up, answer(pipeline, 1, PROMPTS[1], "full"))
                    assert_same(up, answer(own, 1, PROMPTS[1]), tolerance)


def test_weights_and_memory_of_several_levels(levelled: Levelled) -> None:
    many = levelled.many.manifest
    alone = {name: pipeline.manifest for name, pipeline in levelled.alone.items()}
    largest = max(manifest.device_weight_ratio for manifest in alone.values())
    assert many.device_weight_ratio <= 1.03 * largest
    assert many.kv_capacities == tuple(
        max(many.at_level(name).kv_capacities[index] for name in alone)
        for index in range(len(many.kv_capacities))
    )
    for name, manifest in alone.items():
        own = many.at_level(name)
        assert own.visual_sizes == manifest.visual_sizes
        assert own.schedule == manifest.schedule
        assert own.cost == manifest.cost
        assert own.image_processing == manifest.image_processing
        if manifest.schedule.stages:
            assert own.kv_capacities == manifest.kv_capacities
    assert set(many.level_names) == {*alone}
    work = [sum(many.at_level(name).cost.reduced_flops.values()) for name in many.level_names]
    assert work == sorted(work)


def test_tensorrt_builds_every_graph(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "ck")
    bundle = open_bundle(export(folder, levels=tuple(levels_of(FAMILIES["llava_next"], "llava_next"))))
    sizes = build_here(bundle, tmp_path)
    assert sizes.keys() == {graph.name for graph in bundle.manifest.graphs}
    for graph in bundle.manifest.graphs:  # each level's own profiles, one engine for all
        names = [profile.name for profile in graph.profiles]
        assert len(names) == len(set(names))


def test_a_manifest_at_a_level_is_whole(levelled: Levelled) -> None:
    many = levelled.many.manifest
    for name in many.level_names:
        own = many.at_level(name)
        assert own.levels == ()
        assert own.at_level(name) is own
        used = {launch.runs for program in own.programs for launch in program.launches if launch.profiles}
        assert {graph.name for graph in own.graphs} == used
        assert msgspec.json.decode(msgspec.json.encode(own), type=type(own)) == own
