"""A reduced bundle equals a plain torch implementation of the reduction: autograd saliency, greedy NMS, cut layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
import torch

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.hugging_face import Original
from tests.pictures import random_picture
from tests.spec.reduced_reference import PRESERVED_ANSWER_ROWS, reduced_logits
from tests.tolerances import LOGITS_FLOAT32
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path


def test_compact_positions_and_reference_rows_equal_plain_torch(
    checkpoint: Path, reduced_bundle: Path
) -> None:
    assert_equals_plain_torch(checkpoint, reduced_bundle)


def test_preserved_positions_and_answer_rows_equal_plain_torch(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "ck", num_layers=3, num_kv_heads=2, text="mistral", seed=11)
    assert_equals_plain_torch(checkpoint, export(checkpoint, schedule=PRESERVED_ANSWER_ROWS))


@pytest.mark.parametrize("prompt", ["w1", "w1 w2 w3 w4 w5 w6"])
def test_probe_rows_that_would_lie_in_the_image_are_the_first_one_after_it(
    prompt: str, checkpoint: Path
) -> None:
    schedule = msgspec.structs.replace(PRESERVED_ANSWER_ROWS, num_probe_rows=12)
    assert_equals_plain_torch(checkpoint, export(checkpoint, schedule=schedule), prompt=prompt)


def assert_equals_plain_torch(checkpoint: Path, bundle: Path, *, prompt: str = "w1 w2 w3 w4 w5 w6") -> None:
    original = Original.load(checkpoint)
    with Pipeline.from_bundle(bundle) as pipeline:
        schedule = pipeline.manifest.schedule
        for size in ((48, 48), (70, 30), (24, 90)):
            picture = random_picture(*size, seed=size[0])
            answer = pipeline.generate(picture, prompt, max_new_tokens=1)
            _ = answer.text
            pixels = pipeline.images.prepare(picture)["pixel_values"]
            inputs = original.processor(images=picture, text=original.render(prompt), return_tensors="pt")
            with torch.no_grad():
                features = original.model.get_image_features(
                    torch.from_numpy(pixels)[None], image_sizes=inputs["image_sizes"]
                ).pooler_output[0]
                embeds = original.model.get_input_embeddings()(inputs["input_ids"])
            spots = inputs["input_ids"][0] == original.model.config.image_token_id
            embeds[0, spots] = features
            logits, kept = reduced_logits(
                original.model, embeds, schedule, visual=spots.nonzero()[:, 0].tolist()
            )
            assert [indices.tolist() for indices in answer.kept] == kept
            np.testing.assert_allclose(answer.first_logits, logits.numpy(), **LOGITS_FLOAT32)
