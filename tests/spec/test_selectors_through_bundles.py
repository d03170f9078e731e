"""Every method as a bundle keeps what its torch module keeps on Hugging Face's own hidden states, and gives its logits.

The modules themselves are compared with plain references in tests/trio/selectors; here it is the wiring that is shown:
the layer before, the prompt, the vision tower's features, the text, positions, merged rows.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.bundles import export
from tests.hugging_face import Original
from tests.pictures import random_picture
from tests.spec.reduced_reference import causal_layer
from tests.tolerances import LOGITS_FLOAT32
from trio_edge.calibration.evaluate.answer_cost import prefill_flops, processed_tokens
from trio_edge.export.plan import token_selector
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.trio.methods import token_method
from trio_edge.trio.selectors.interface import (
    PromptInputs,
    Selection,
    StageInputs,
    TokenInputs,
    stage_selector,
)

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = "w1 w2 w3 w4 w5 w6"
STAGE_METHODS = {
    "fastv": Schedule(stages=(Stage(layer=2, keep=9),), method="fastv", positions="preserved"),
    "pyramiddrop": Schedule(stages=(Stage(layer=2, keep=9),), method="pyramiddrop"),
    "dart": Schedule(stages=(Stage(layer=2, keep=14),), method="dart", positions="preserved"),
    "sparsevlm": Schedule(stages=(Stage(layer=1, keep=20), Stage(layer=2, keep=9)), method="sparsevlm"),
}
"""Two stages where the second one looks back at the whole prompt."""
TOKEN_METHODS = ["visionzip", "divprune", "cdpruner", "evs"]
"""One with features and merged rows, one with steps that depend on each other, one with text."""


@pytest.fixture(scope="module")
def original(checkpoint: Path) -> Original:
    return Original.load(checkpoint)


class Sequence:
    """A prompt's rows on their way through Hugging Face's decoder layers."""

    def __init__(self, original: Original, pipeline: Pipeline, picture: Any, prompt: str = PROMPT) -> None:
        self.model = original.model
        processing: Any = pipeline.images  # type: ignore[attr-defined]
        self.pixels = torch.from_numpy(processing.prepare(picture)["pixel_values"])
        self.index = torch.from_numpy(processing.token_index(*picture.size)).long()
        inputs = original.processor(images=picture, text=original.render(prompt), return_tensors="pt")
        with torch.no_grad():
            self.tokens = self.model.get_image_features(
                self.pixels[None], image_sizes=inputs["image_sizes"]
            ).pooler_output[0]
            self.embeds = self.model.get_input_embeddings()(inputs["input_ids"])
        spots = inputs["input_ids"][0] == self.model.config.image_token_id
        self.embeds[0, spots] = self.tokens
        self.visual = spots.nonzero()[:, 0].tolist()
        self.after = self.embeds[0, self.visual[-1] + 1 :]


def scalar(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int32)


def kept_rows(selection: Selection, visual: torch.Tensor) -> torch.Tensor:
    """Return the visual rows that go on: gathered, or summed where the selection merges."""
    return visual[selection.kept_K] if selection.weights_KN is None else selection.weights_KN @ visual


def rows_after(kept: list[int], visual: list[int], num_rows: int) -> tuple[list[int], list[int]]:
    """Return which row each remaining row was, and where the kept tokens stand among them.

    Text stays, and so does its order with the tokens. A merged row, which comes last in ``kept``, may stand for a token far in
    front: then it stands after the text that is between them.
    """
    is_visual = set(visual)
    rows, places, next_row = [], [], 0

    def take_text(end: int) -> int:
        rows.extend(row for row in range(next_row, end) if row not in is_visual)
        return max(next_row, end)

    for index in kept:
        next_row = take_text(visual[index])
        places.append(len(rows))
        rows.append(visual[index])
    take_text(num_rows)
    return rows, places


@torch.no_grad()
def through_the_decoder(
    sequence: Any, embeds: torch.Tensor, visual: list[int], schedule: Schedule
) -> tuple[np.ndarray[Any, Any], list[list[int]]]:
    """Return the last row's logits and the kept original tokens of every stage.

    Args:
        sequence: With ``model``; with M-RoPE also ``positions`` [3, 1, S], with DeepStack ``planes`` [N, D].
        embeds: [1, S, D].
        visual: The visual rows, ascending.
        schedule: The stages.
    """
    model, hidden = sequence.model, embeds
    text = model.get_decoder()
    family: Any = SimpleNamespace(layers=text.layers, final_norm=text.norm, lm_head=model.lm_head)
    is_visual = torch.zeros(embeds.shape[1], dtype=torch.int32)
    is_visual[visual] = 1
    prompt = PromptInputs(embeds[0], is_visual, scalar(embeds.shape[1]))
    positions, previous = getattr(sequence, "positions", torch.arange(hidden.shape[1])[None]), hidden
    planes = list(getattr(sequence, "planes", ()))
    original, kept_all = np.arange(len(visual)), []
    stages = [stage.layer for stage in schedule.stages]
    for layer in range(len(text.layers)):
        if layer in stages:
            selector = stage_selector(family, schedule, stage=stages.index(layer), max_visual=len(visual))
            cos, sin = text.rotary_emb(hidden, positions)
            inputs = StageInputs(
                hidden[0], cos[0], sin[0], torch.tensor(visual, dtype=torch.int32), scalar(len(visual)),
                scalar(hidden.shape[1]), previous[0], prompt,
            )  # fmt: skip
            selection = selector(inputs)
            going_on = kept_rows(selection, hidden[0, visual])
            rows, visual = rows_after(selection.kept_K.tolist(), visual, hidden.shape[1])
            hidden, positions = hidden[:, rows], positions[..., rows]
            hidden[0, visual] = going_on
            planes = [kept_rows(selection, plane) for plane in planes]
            if schedule.positions == "compact":
                positions = torch.arange(hidden.shape[1])[None]
            original = original[selection.kept_K.numpy()]
            kept_all.append(original.tolist())
        previous = hidden
        hidden = causal_layer(model, layer, hidden, positions)
        if layer < len(planes):
            hidden[0, visual] += planes[layer]
    return model.lm_head(text.norm(hidden))[0, -1].numpy(), kept_all


@pytest.mark.parametrize("method", STAGE_METHODS)
def test_a_method_inside_the_decoder_equals_its_module(
    method: str, checkpoint: Path, original: Original
) -> None:
    schedule = STAGE_METHODS[method]
    with Pipeline.from_bundle(export(checkpoint, schedule=schedule)) as pipeline:
        for size in ((48, 48), (70, 30)):
            picture = random_picture(*size, seed=size[0])
            answer = pipeline.generate(picture, PROMPT, max_new_tokens=1)
            _ = answer.text
            sequence = Sequence(original, pipeline, picture)
            logits, kept = through_the_decoder(sequence, sequence.embeds, sequence.visual, schedule)
            assert [indices.tolist() for indices in answer.kept] == kept
            np.testing.assert_allclose(answer.first_logits, logits, **LOGITS_FLOAT32)


def tower_features(sequence: Sequence) -> dict[str, torch.Tensor]:
    """Return features, mean keys and class attention of each visual token, by Hugging Face's own outputs."""
    tower: Any = sequence.model.model.vision_tower
    tower.config._attn_implementation = "eager"
    with torch.no_grad():
        output = tower(sequence.pixels, output_hidden_states=True, output_attentions=True)
        core = getattr(tower, "vision_model", tower)
        layer, entering = core.encoder.layers[-2], output.hidden_states[-3]
        keys = layer.self_attn.k_proj(layer.layer_norm1(entering))[:, 1:].unflatten(-1, (2, 16)).mean(2)

    def gathered(rows: torch.Tensor) -> torch.Tensor:
        flat = rows.flatten(0, 1)
        return torch.cat([flat, torch.zeros_like(flat[:1])])[sequence.index]

    return {
        "features_NF": gathered(output.hidden_states[-2][:, 1:]),
        "keys_NE": gathered(keys),
        "attention_N": gathered(output.attentions[-2].mean(1)[:, 0, 1:]),
    }


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_a_method_before_the_decoder_equals_its_module(
    method: Any, checkpoint: Path, original: Original
) -> None:
    bundle = export(checkpoint, token_method=method, token_keep=15)
    with Pipeline.from_bundle(bundle) as pipeline:
        for size in ((48, 48), (70, 30)):
            picture = random_picture(*size, seed=size[0])
            answer = pipeline.generate(picture, PROMPT, max_new_tokens=1)
            _ = answer.text
            sequence = Sequence(original, pipeline, picture)
            selector = token_selector(method, num_keep=15)
            is_newline = sequence.index == len(sequence.pixels) * 9
            more = tower_features(sequence) if token_method(method).reads_features else {}
            if token_method(method).reads_text:
                more |= {"text_TD": sequence.after, "num_text": scalar(len(sequence.after))}
            if token_method(method).reads_previous:  # an image has no frames before it
                more |= {"previous_ND": sequence.tokens, "has_previous": scalar(0)}
            count = len(sequence.visual)
            selection = selector(TokenInputs(sequence.tokens, scalar(count), is_newline, **more))
            rows, visual = rows_after(selection.kept_K.tolist(), sequence.visual, sequence.embeds.shape[1])
            embeds = sequence.embeds[:, rows]
            embeds[0, visual] = kept_rows(selection, sequence.tokens)
            logits, _ = through_the_decoder(sequence, embeds, visual, Schedule())
            np.testing.assert_allclose(answer.first_logits, logits, **LOGITS_FLOAT32)
            assert answer.statistics.visual_tokens == count
            assert answer.statistics.average_keep == pytest.approx(15 / count)


def test_a_selection_before_the_decoder_combines_with_stages_inside(checkpoint: Path) -> None:
    schedule = Schedule(stages=(Stage(layer=2, keep=6),))
    with Pipeline.from_bundle(
        export(checkpoint, schedule=schedule, token_method="visionzip", token_keep=15)
    ) as pipeline:
        answer = pipeline.generate(random_picture(48, 48), PROMPT, max_new_tokens=2)
        assert answer.text is not None
        assert answer.statistics.kept_tokens == (6,)
        assert answer.statistics.average_keep == pytest.approx((15 + 15 + 6) / (3 * 51))
        assert list(answer.statistics.graph_ms)[:2] == ["vision", "reduce"]
        manifest = pipeline.manifest
        assert processed_tokens(manifest, image_tokens=[51], kept=(6,)) == (15 + 15 + 6) / 3
        flops = prefill_flops(manifest, image_tokens=[51], kept=(6,), num_text=manifest.cost.num_text)
        assert flops == pytest.approx(sum(manifest.cost.reduced_flops.values()), rel=1e-6)
        assert manifest.cost.reduced_flops["reduce"] > 0 < manifest.cost.reduced_flops["select"]
