"""The reduction in plain torch, as the paper states it: autograd over layer and head, greedy suppression, cut layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.model.host_selection import greedy_nms

if TYPE_CHECKING:
    from collections.abc import Sequence

PRESERVED_ANSWER_ROWS = Schedule(
    stages=(Stage(layer=1, keep=16), Stage(layer=2, keep=7)), positions="preserved", probe_rows="answer"
)


def causal_layer(model: Any, index: int, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Run one Hugging Face decoder layer with an additive causal mask."""
    text = model.get_decoder()
    rows = hidden.shape[1]
    mask = None  # layers with states take none
    if hasattr(text.layers[index], "self_attn"):
        mask = torch.full((1, 1, rows, rows), float("-inf"), dtype=hidden.dtype).triu(1)
    tables = text.rotary_emb(hidden, positions)
    options = {"position_embeddings": tables, "position_ids": positions}
    return text.layers[index](hidden, attention_mask=mask, **options)


def autograd_saliency(
    model: Any, layer: int, hidden: torch.Tensor, positions: torch.Tensor, *, schedule: Schedule, after: int
) -> Any:
    """Return the gradient norm of every row: the whole layer and head over all rows, by autograd.

    Probe rows before row ``after``, where the text after the image starts, are replaced by it.
    """
    leaf = hidden.detach().requires_grad_(True)
    out = causal_layer(model, layer, leaf, positions)
    logits = model.lm_head(_final_norm(model)(out))[0]
    last = logits.shape[0] - schedule.last_probe_offset
    rows = logits[torch.arange(last - schedule.num_probe_rows + 1, last + 1).clamp(min=after)]
    torch.nn.functional.cross_entropy(rows, rows.argmax(-1)).backward()
    assert leaf.grad is not None
    return leaf.grad[0].norm(dim=-1)


def _final_norm(model: Any) -> Any:
    decoder = model.get_decoder()
    return getattr(decoder, "norm", None) or decoder.embedding_norm  # LFM2's


class ReducedRows(NamedTuple):
    """The rows after the last layer and the final norm."""

    values: torch.Tensor
    """[S, D]"""
    positions: torch.Tensor
    """[A, S]"""
    visual: list[int]
    """Row of each kept visual token."""
    kept: list[list[int]]
    """Kept original indices of every stage."""


def reduced_logits(model: Any, *how: Any, **others: Any) -> tuple[torch.Tensor, list[list[int]]]:
    """Return the last row's logits and the kept original indices of every stage; the rest is as for ``reduced_rows``."""
    rows = reduced_rows(model, *how, **others)
    with torch.no_grad():
        return model.lm_head(rows.values[-1:])[0], rows.kept


def reduced_rows(
    model: Any,
    embeds: torch.Tensor,
    schedule: Schedule,
    *,
    visual: Sequence[int],
    positions: torch.Tensor | None = None,
    planes: Sequence[torch.Tensor] = (),
) -> ReducedRows:
    """Return the rows that leave the decoder.

    Args:
        model: Hugging Face's, with its language model and head.
        embeds: [1, S, D].
        schedule: The stages.
        visual: The visual rows, ascending.
        positions: [1, S], or M-RoPE's [3, 1, S]; 0..S-1 by default.
        planes: One row for each of them, DeepStack's.
    """
    hidden = embeds
    if positions is None:
        positions = torch.arange(embeds.shape[1])[None]
    here = np.array(visual)
    original, kept_all = np.arange(len(here)), []
    stages = {stage.layer: stage.keep for stage in schedule.stages}
    for layer in range(len(model.get_decoder().layers)):
        if layer in stages:
            after = hidden.shape[1] - (embeds.shape[1] - 1 - visual[-1])
            saliency = autograd_saliency(model, layer, hidden, positions, schedule=schedule, after=after)
            scores, features = saliency[here].numpy(), hidden[0, here].detach().numpy()
            kept = greedy_nms(features, scores, num_keep=min(stages[layer], len(original)), threshold=0.8)
            rows = sorted({*range(hidden.shape[1])} - {*here} | {*here[kept]})
            here = np.searchsorted(rows, here[kept])
            hidden, original = hidden[:, rows], original[kept]
            positions = (
                positions[..., rows] if schedule.positions == "preserved" else torch.arange(len(rows))[None]
            )
            kept_all.append(original.tolist())
        with torch.no_grad():
            hidden = causal_layer(model, layer, hidden, positions)
            if layer < len(planes):
                hidden[0, here] += planes[layer][original]
    with torch.no_grad():
        values = _final_norm(model)(hidden)[0]
    return ReducedRows(values, positions.reshape(-1, len(values)), here.tolist(), kept_all)


def entering_the_decoder(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return what Hugging Face's model gives its decoder in a prefill."""
    seen: dict[str, Any] = {}

    def record(_module: Any, _arguments: Any, options: dict[str, Any]) -> None:
        seen.update(options)

    handle = model.get_decoder().register_forward_pre_hook(record, with_kwargs=True)
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen
