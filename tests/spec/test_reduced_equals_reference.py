"""A reduced bundle equals a plain torch implementation of the reduction: autograd saliency, greedy NMS, cut layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.hugging_face import Original
from tests.pictures import random_picture
from tests.spec.reduced_reference import reduced_logits
from tests.tolerances import LOGITS_FLOAT32
from trio_edge.runtime.image_processing import prepare
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.runtime.schedule import Schedule, Stage

if TYPE_CHECKING:
    from pathlib import Path

STAGES = ((1, 16), (2, 7))
CASES = {
    "compact_reference_rows": Schedule(stages=tuple(Stage(layer=a, keep=k) for a, k in STAGES)),
    "preserved_answer_rows": Schedule(
        stages=tuple(Stage(layer=a, keep=k) for a, k in STAGES), positions="preserved", probe_rows="answer"
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_reduced_bundle_equals_plain_torch(name: str, tmp_path: Path) -> None:
    text = "mistral" if "answer" in name else "llama"
    checkpoint = save_checkpoint(tmp_path / "ck", num_layers=4, num_kv_heads=2, text=text, seed=11)
    original = Original.load(checkpoint)
    with Pipeline.from_bundle(export(checkpoint, schedule=CASES[name])) as pipeline:
        for size in ((48, 48), (70, 30), (24, 90)):
            picture = random_picture(*size, seed=size[0])
            answer = pipeline.generate(picture, "w1 w2 w3 w4 w5 w6", max_new_tokens=1)
            _ = answer.text
            pixels = prepare(picture, pipeline.pictures.processing).pixel_values
            inputs = original.processor(
                images=picture, text=original.render("w1 w2 w3 w4 w5 w6"), return_tensors="pt"
            )
            with torch.no_grad():
                features = original.model.get_image_features(
                    torch.from_numpy(pixels)[None], image_sizes=inputs["image_sizes"]
                ).pooler_output[0]
                embeds = original.model.get_input_embeddings()(inputs["input_ids"])
            spots = inputs["input_ids"][0] == original.model.config.image_token_id
            embeds[0, spots] = features
            logits, kept = reduced_logits(
                original.model, embeds, CASES[name], start=int(spots.nonzero()[0]), count=int(spots.sum())
            )
            assert [indices.tolist() for indices in answer.kept] == kept
            np.testing.assert_allclose(answer.first_logits, logits.numpy(), **LOGITS_FLOAT32)
