"""``--clip`` refuses bad checkpoints; a bundle takes the right weights from a CLIP checkpoint."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.clip_checkpoints import save_clip_checkpoint
from tests.qwen_checkpoints import save_qwen_checkpoint
from trio_edge.export.checkpoints.checkpoint import read_checkpoint
from trio_edge.export.families.clip import read_clip
from trio_edge.export.options import ExportOptions
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError

if TYPE_CHECKING:
    from pathlib import Path

EADP: dict[str, Any] = {"token_method": "eadp", "token_keep": 15}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip_checkpoint(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("method", [None, "divprune"])
def test_clip_without_a_method_that_reads_the_question_is_refused(method: Any, tmp_path: Path) -> None:
    keep = None if method is None else 15
    with pytest.raises(ScheduleError, match=r"--clip: expected --token-method cdpruner or eadp with it, got"):
        ExportOptions(model="tiny", out=tmp_path, token_method=method, token_keep=keep, clip="folder")


def test_another_model_than_clip_is_refused_before_its_weights_are_read(checkpoint: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"expected a CLIP model for --clip, got 'llava_next'; name one"
    ):
        read_clip(str(checkpoint))


def test_clip_of_another_width_than_the_vision_tower_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = save_clip_checkpoint(tmp_path / "clip", vision_width=48)
    with pytest.raises(
        CheckpointError, match=r"vision tower was taken from, of width 32, got one of width 48"
    ):
        export(checkpoint, clip=str(other), **EADP)


def test_clip_beside_a_reduction_in_the_encoder_is_refused(tmp_path: Path, clip: Path) -> None:
    llava = save_checkpoint(tmp_path / "llava", family="llava", patch_size=3)
    with pytest.raises(
        ScheduleError, match=r"--clip: expected a LLaVA with .* no --encoder-keep, got another"
    ):
        export(llava, clip=str(clip), encoder_keep=32, **EADP)


def test_a_model_without_a_clip_tower_is_refused(tmp_path: Path, clip: Path) -> None:
    qwen = save_qwen_checkpoint(tmp_path / "qwen")
    with pytest.raises(ScheduleError, match=r"--clip: expected a LLaVA with one layer of features"):
        export(qwen, clip=str(clip), **EADP)


def test_weights_of_another_shape_than_the_configuration_are_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    broken = save_clip_checkpoint(tmp_path / "clip")
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    config["projection_dim"] = 21
    (broken / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"'visual_projection.weight'|'text_projection.weight'"):
        export(checkpoint, clip=str(broken), **EADP)


def test_ids_without_an_embedding_are_refused(tmp_path: Path) -> None:
    broken = save_clip_checkpoint(tmp_path / "clip")
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["vocab_size"] = 59
    (broken / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"start and end tokens and ids below 59, got .* ids up to 59"):
        read_clip(str(broken))


def test_only_the_text_tower_and_the_way_into_its_space_are_taken(checkpoint: Path, clip: Path) -> None:
    before = read_checkpoint(str(checkpoint))
    names = read_clip(str(clip)).merged_with(before).tensors.keys() - before.tensors.keys()
    taken = (
        "clip.text_model.",
        "clip.text_projection.",
        "clip.visual_projection.",
        "clip.vision_model.post_",
    )
    assert all(name.startswith(taken) for name in names)
    assert {"clip.visual_projection.weight", "clip.vision_model.post_layernorm.weight"} <= names
