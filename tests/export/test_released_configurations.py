"""Configuration files as they were released, which differ from what transformers writes today."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.qwen_checkpoints import REDUCED, save_qwen_checkpoint
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage

if TYPE_CHECKING:
    from pathlib import Path

STAGES = Schedule(stages=(Stage(layer=1, keep=14),))


def _qwen(folder: Path) -> tuple[Schedule, dict[str, Any]]:
    """Qwen2.5-VL: the decoder's keys stand at the top, and the element type with them."""
    save_qwen_checkpoint(folder, dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    return REDUCED, {**config.pop("text_config"), **config, "torch_dtype": "bfloat16"}


def _llava(folder: Path) -> tuple[Schedule, dict[str, Any]]:
    """LLaVA: the decoder has an element type of its own, that of the language model it was made from."""
    save_checkpoint(folder, num_layers=2, num_kv_heads=2)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["torch_dtype"] = "bfloat16"
    config["vision_config"]["torch_dtype"] = "float16"
    return STAGES, {**config, "torch_dtype": "float16"}


@pytest.mark.parametrize("make", [_qwen, _llava])
def test_element_types_in_the_configuration_change_nothing(make: Any, tmp_path: Path) -> None:
    schedule, released = make(tmp_path / "today")
    shutil.copytree(tmp_path / "today", tmp_path / "released")
    (tmp_path / "released" / "config.json").write_text(json.dumps(released))
    today, then = (
        open_bundle(export(tmp_path / name, tmp_path / f"{name}-bundle", schedule=schedule)).manifest
        for name in ("today", "released")
    )
    assert [(file.path, file.sha256) for file in then.files] == [
        (file.path, file.sha256) for file in today.files
    ]
