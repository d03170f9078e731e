"""A keep-all bundle, through the runtime, is the original Hugging Face model."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.hugging_face import Original
from tests.pictures import random_picture
from tests.tolerances import LOGITS_FLOAT32
from trio_edge.export.checkpoint import TINY_FOLDER
from trio_edge.runtime.image_processing import prepare
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

SIZES = [(48, 48), (31, 77), (100, 40), (24, 24), (1, 1), (300, 33), (64, 63)]
PROMPTS = ["w1 w2 w3", "w80 w4 w4 w17 w30 w5 w6", "w9"]
TINY_PROMPTS = ["what color is the circle ?", "how many red shapes are there ?", "is there a 7 ?"]
NUM_STEPS = 32
MODELS = {
    "llava_llama": {"family": "llava", "num_kv_heads": 4},
    "llava_next_llama": {"family": "llava_next", "num_kv_heads": 4, "seed": 1},
    "tiny": {},
    "llava_next_mistral": {"family": "llava_next", "text": "mistral", "num_kv_heads": 2, "seed": 2},
}


@pytest.fixture(scope="module", params=list(MODELS), ids=list(MODELS))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Original, Pipeline]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    if request.param == "tiny":
        checkpoint = TINY_FOLDER
    else:
        checkpoint = save_checkpoint(folder / "checkpoint", num_layers=3, **MODELS[request.param])
    return Original.load(checkpoint), Pipeline.from_bundle(export(checkpoint, dtype="float32"))


@pytest.mark.parametrize(
    "case",
    range(len(SIZES) * len(PROMPTS)),
    ids=[
        f"{width}x{height}-prompt{number}" for (width, height), number in itertools.product(SIZES, range(3))
    ],
)
def test_keep_all_bundle_gives_the_tokens_of_hugging_face(
    pair: tuple[Original, Pipeline], case: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, pipeline = pair
    is_tiny = pipeline.manifest.dimensions.num_layers == 16
    (width, height), prompt = list(itertools.product(SIZES, TINY_PROMPTS if is_tiny else PROMPTS))[case]
    scale = 2 if is_tiny else 1
    picture = random_picture(scale * width, scale * height, seed=case)
    pixels = prepare(picture, pipeline.pictures.processing).pixel_values
    tokens, logits = original.generate(
        picture, original.render(prompt), num_tokens=NUM_STEPS, pixel_values=pixels
    )
    seen: list[Any] = []
    decode = pipeline._decoder.decode
    monkeypatch.setattr(
        pipeline._decoder, "decode", lambda embedding: seen.append(decode(embedding)) or seen[-1]
    )
    answer = pipeline.generate(picture, prompt, max_new_tokens=NUM_STEPS)
    _ = answer.text
    assert answer.token_ids == tokens
    np.testing.assert_allclose(np.stack([answer.first_logits, *seen]), logits, **LOGITS_FLOAT32)
