"""A keep-all bundle, through the runtime, is the original Hugging Face model."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.decode_logits import record_logits
from tests.hugging_face import Original
from tests.pictures import random_picture
from tests.shared_folder import made_once
from tests.tolerances import LOGITS_FLOAT32
from trio_edge.export.checkpoints.checkpoint import TINY_FOLDER
from trio_edge.runtime.pipeline import Pipeline

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
CASES = list(enumerate(itertools.product(SIZES, range(len(PROMPTS)))))
WITH_EVERY_PROMPT = ("llava_llama", "llava_next_llama")
"""One of each family; the others take each size once, with the prompts in turn."""


@functools.cache
def original_and_pipeline(model: str) -> tuple[Original, Pipeline]:
    """Return the model as Hugging Face loads it and its keep-all bundle, opened."""
    checkpoint = TINY_FOLDER
    if model != "tiny":
        checkpoint = made_once(
            f"checkpoint-{model}", lambda folder: save_checkpoint(folder, num_layers=3, **MODELS[model])
        )
    return Original.load(checkpoint), Pipeline.from_bundle(export(checkpoint, dtype="float32"))


@pytest.mark.parametrize(
    ("model", "size", "prompt_number", "seed"),
    [
        pytest.param(model, size, number, seed, id=f"{model}-{size[0]}x{size[1]}-prompt{number}")
        for model in MODELS
        for seed, (size, number) in CASES
        if model in WITH_EVERY_PROMPT or number == SIZES.index(size) % len(PROMPTS)
    ],
)
def test_keep_all_bundle_gives_the_tokens_of_hugging_face(
    model: str,
    size: tuple[int, int],
    prompt_number: int,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, pipeline = original_and_pipeline(model)
    is_tiny = model == "tiny"
    prompt = (TINY_PROMPTS if is_tiny else PROMPTS)[prompt_number]
    scale = 2 if is_tiny else 1
    picture = random_picture(scale * size[0], scale * size[1], seed=seed)
    pixels = pipeline.images.prepare(picture)["pixel_values"]
    tokens, logits = original.generate(
        picture, original.render(prompt), num_tokens=NUM_STEPS, pixel_values=pixels
    )
    seen = record_logits(pipeline, monkeypatch)
    answer = pipeline.generate(picture, prompt, max_new_tokens=NUM_STEPS)
    _ = answer.text
    assert answer.token_ids == tokens
    np.testing.assert_allclose(np.stack([answer.first_logits, *seen]), logits, **LOGITS_FLOAT32)
