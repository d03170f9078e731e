"""A reduced bundle equals a plain torch implementation of the reduction: autograd saliency, greedy NMS, cut layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.hugging_face import Original
from tests.pictures import random_picture
from tests.tolerances import LOGITS_FLOAT32
from trio_edge.runtime.greedy_nms import greedy_nms
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


def causal_layer(model: Any, index: int, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Run one Hugging Face decoder layer with an additive causal mask."""
    text = model.model.language_model
    rows = hidden.shape[1]
    mask = torch.full((1, 1, rows, rows), float("-inf"), dtype=hidden.dtype).triu(1)
    tables = text.rotary_emb(hidden, positions)
    return text.layers[index](hidden, attention_mask=mask, position_embeddings=tables)


def autograd_saliency(
    model: Any, layer: int, hidden: torch.Tensor, positions: torch.Tensor, *, offset: int
) -> Any:
    """Return the gradient norm of every row: the whole layer and head over all rows, by autograd."""
    leaf = hidden.detach().requires_grad_(True)
    out = causal_layer(model, layer, leaf, positions)
    logits = model.lm_head(model.model.language_model.norm(out))[0]
    last = logits.shape[0] - offset
    rows = logits[last - 3 : last + 1]
    torch.nn.functional.cross_entropy(rows, rows.argmax(-1)).backward()
    assert leaf.grad is not None
    return leaf.grad[0].norm(dim=-1)


def reduced_logits(
    model: Any, embeds: torch.Tensor, schedule: Schedule, *, start: int, count: int
) -> tuple[torch.Tensor, list[list[int]]]:
    """Return the last row's logits and the kept original indices of every stage."""
    hidden, positions = embeds, torch.arange(embeds.shape[1])[None]
    original, kept_all = np.arange(count), []
    stages = {stage.layer: stage.keep for stage in schedule.stages}
    for layer in range(len(model.model.language_model.layers)):
        if layer in stages:
            saliency = autograd_saliency(model, layer, hidden, positions, offset=schedule.last_probe_offset)
            scores = saliency[start : start + len(original)].numpy()
            features = hidden[0, start : start + len(original)].detach().numpy()
            kept = greedy_nms(features, scores, num_keep=min(stages[layer], len(original)), threshold=0.8)
            rows = [*range(start), *(start + kept), *range(start + len(original), hidden.shape[1])]
            hidden, original = hidden[:, rows], original[kept]
            positions = (
                positions[:, rows] if schedule.positions == "preserved" else torch.arange(len(rows))[None]
            )
            kept_all.append(original.tolist())
        with torch.no_grad():
            hidden = causal_layer(model, layer, hidden, positions)
    with torch.no_grad():
        return model.lm_head(model.model.language_model.norm(hidden))[0, -1], kept_all


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
