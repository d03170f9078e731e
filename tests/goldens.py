"""The reference implementation's outputs (../shared/goldens), and a checkpoint around each golden's decoder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.bundles import export
from tests.checkpoints import write_processor
from trio_edge.runtime.bundle.schedule import Schedule, Stage

if TYPE_CHECKING:
    from numpy.typing import NDArray

GOLDEN_FOLDER = Path(__file__).parents[1].parent / "shared" / "goldens"
GOLDEN_NAMES = ("single_stage_gqa", "three_stage_mha", "top_up")
needs_goldens = pytest.mark.skipif(
    not GOLDEN_FOLDER.is_dir(),
    reason="needs ../shared/goldens next to the checkout; runs in the project's CI",
)
_PATCHES_PER_SIDE = {96: 10, 180: 14, 64: 8}  # LLaVA-1.5 pictures with at least as many tokens as the golden


@dataclass
class Golden:
    """One golden: configuration, arrays, weights."""

    settings: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    weights: dict[str, torch.Tensor]

    @property
    def num_stages(self) -> int:
        """Stages of its schedule."""
        return len(self.settings["stage_layers"])


def load_golden(name: str) -> Golden:
    """Read the golden called ``name``."""
    path = GOLDEN_FOLDER / name
    with np.load(path.with_suffix(".npz")) as arrays:
        return Golden(
            settings=json.loads(path.with_suffix(".json").read_text()),
            arrays=dict(arrays),
            weights=load_file(path.with_suffix(".safetensors")),
        )


def save_golden_checkpoint(golden: Golden, folder: Path) -> Path:
    """Write a LLaVA-1.5 checkpoint whose decoder is the golden's and whose picture has room for its visual tokens."""
    import transformers as hf

    torch.manual_seed(0)
    side = 4 * _PATCHES_PER_SIDE[golden.settings["visual_tokens"]]
    vision = hf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=4,
        projection_dim=16,
    )
    text = hf.LlamaConfig(**golden.settings["config"], bos_token_id=1, eos_token_id=2)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=4)
    model = hf.LlavaForConditionalGeneration(config)
    renamed = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: tensor
        for name, tensor in golden.weights.items()
    }
    unexpected = model.load_state_dict(renamed, strict=False).unexpected_keys
    assert not unexpected
    model.save_pretrained(folder)
    write_processor(folder, family="llava", tile_size=side, patch_size=4, vocab_size=256)
    return folder


def golden_bundle(golden: Golden, folder: Path) -> Path:
    """Return the bundle of the golden's checkpoint under its own schedule, exported once for all who ask."""
    settings = golden.settings
    schedule = Schedule(
        stages=tuple(
            Stage(layer=at, keep=keep) for at, keep in zip(settings["stage_layers"], settings["stage_keep"])
        ),
        num_probe_rows=settings["probe_positions"],
        nms_threshold=settings["nms_threshold"],
    )
    return export(save_golden_checkpoint(golden, folder), schedule=schedule)
