"""Hidden states of a prefill, in every format and at several shapes, and next to answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bundles import INT8_CACHES, export
from tests.cuda_on_host import CudaOnHost, pretend_gpu, write_engines
from tests.engine_bundles import HOST, build_here
from tests.pictures import random_picture
from tests.tolerances import LOGITS_FLOAT16, LOGITS_FLOAT32
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline

ROOT = Path(__file__).parents[2]
STAGES = Schedule(stages=(Stage(layer=1, keep=14), Stage(layer=2, keep=6)))
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "int4": {"quantize": parse_plan("all=int4")},
    "int8": {"quantize": parse_plan("all=int8")},
    "int8 head": {"quantize": parse_plan("head=int8")},
    "kv=int8": {"quantize": parse_plan("kv=int8"), "scales": INT8_CACHES},
    "follow-ups": {"follow_ups": True},
    "keep all": {"schedule": Schedule()},
    "before the decoder": {"schedule": Schedule(), "token_method": "divprune", "token_keep": 7},
    "sparsevlm": {"schedule": Schedule(stages=STAGES.stages, method="sparsevlm")},
}


@pytest.mark.parametrize("picture", [None, (48, 48), (90, 30)], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_the_last_row_gives_the_first_logits(checkpoint: Path, form: str, picture: Any) -> None:
    """The head's own product with the last row, in numpy; whatever the number of padding rows."""
    how = {"schedule": STAGES, **FORMATS[form]}
    shown = None if picture is None else random_picture(*picture)
    with Pipeline.from_bundle(
        export(checkpoint, outputs="hidden", **how), cpu_accuracy="float32"
    ) as pipeline:
        manifest = pipeline.manifest
        for prompt in ("w1 w2", " ".join(["w3"] * 40)):
            answer = pipeline.generate(shown, prompt, max_new_tokens=2)
            assert answer.text is not None
            found = pipeline.hidden_states(shown, prompt)
            num_text = answer.statistics.text_tokens
            assert found.values.shape == (num_text + len(found.kept), manifest.dimensions.hidden_size)
            assert found.positions.shape == (manifest.position_axes, len(found.values))
            assert (np.diff(found.positions[0]) > 0).all()
            assert len(found.visual_rows) == len(found.kept) <= answer.statistics.visual_tokens
            if answer.kept:
                assert found.kept.tolist() == answer.kept[-1].tolist()
            if form in ("float32", "keep all", "follow-ups", "float16"):
                weights = _head(checkpoint)
                expected = found.values[-1].astype(np.float32) @ weights.T
                tolerance = LOGITS_FLOAT16 if form == "float16" else LOGITS_FLOAT32
                np.testing.assert_allclose(expected, answer.first_logits, **tolerance)


def _head(checkpoint: Path) -> Any:
    from safetensors.numpy import load_file

    tensors = load_file(checkpoint / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("lm_head.weight"))
    return tensors[name].astype(np.float32)


def test_a_bundle_without_them_says_what_to_do(checkpoint: Path) -> None:
    with (
        Pipeline.from_bundle(export(checkpoint, schedule=STAGES)) as pipeline,
        pytest.raises(ShapeError, match=r"expected a bundle with them, .*; export with --outputs hidden"),
    ):
        pipeline.hidden_states(None, "w1")


def test_an_answer_under_way_is_ended_or_goes_on_in_its_slot(checkpoint: Path) -> None:
    for batch in (1, 2):
        with Pipeline.from_bundle(
            export(checkpoint, outputs="hidden", schedule=STAGES, batch=batch)
        ) as pipeline:
            own = pipeline.generate(random_picture(48, 48), "w1", max_new_tokens=6, min_new_tokens=6).text
            answer = pipeline.generate(random_picture(48, 48), "w1", max_new_tokens=6, min_new_tokens=6)
            next(iter(answer))
            assert len(pipeline.hidden_states(None, "w2").kept) == 0
            if batch == 1:
                with pytest.raises(ShapeError, match="another was started"):
                    _ = answer.text
            else:
                assert answer.text == own


def test_a_selection_of_ones_own_has_its_own_rows(checkpoint: Path) -> None:
    with Pipeline.from_bundle(export(checkpoint, outputs="hidden", schedule=STAGES)) as pipeline:
        picture = random_picture(48, 48)
        usual = pipeline.hidden_states(picture, "w1 w2")
        again = pipeline.hidden_states(
            picture, "w1 w2", override=lambda stage, _tokens, keep: _kept(stage, keep)
        )
        assert again.kept.tolist() != usual.kept.tolist()
        assert again.values.shape == usual.values.shape
        np.testing.assert_array_equal(again.positions, usual.positions)


def _kept(_stage: int, keep: int) -> Any:
    return np.arange(keep, dtype=np.int32)


def test_on_the_pretended_gpu_they_are_those_of_the_cpu(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(checkpoint, tmp_path / "bundle", outputs="hidden", schedule=STAGES)
    write_engines(folder, host=HOST)
    pretend_gpu(monkeypatch, CudaOnHost(), HOST)
    found = []
    for backend in ("onnxruntime", "tensorrt"):
        with Pipeline.from_bundle(folder, backend=backend) as pipeline:
            found.append(pipeline.hidden_states(random_picture(48, 48), "w1 w2"))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("form", ["float16", "int8"])
def test_the_head_builds(checkpoint: Path, tmp_path: Path, form: str) -> None:
    bundle = open_bundle(export(checkpoint, outputs="hidden", **{"schedule": STAGES, **FORMATS[form]}))
    assert build_here(bundle, tmp_path, graphs={"head"})["head"] > 0


def test_the_example_runs(checkpoint: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    random_picture(48, 48).save(picture)
    bundle = export(checkpoint, outputs="hidden", schedule=STAGES)
    command = [sys.executable, str(ROOT / "examples" / "action_head.py"), str(bundle)]
    done = subprocess.run(
        [*command, "--image", str(picture), "--prompt", "w1 w2"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "16 actions of 7 numbers" in done.stdout
