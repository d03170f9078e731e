"""Greedy answers of the torch model under a schedule, and keep-all's as the reference of a calibration.

Every layer keeps its own keys and values, as long as the sequence is in it; a new row's position follows the exported
runtime's rule: the layer's own length ("compact") or the prompt's ("preserved").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trio_edge.calibration.model.selecting import Probes, order_of, saliency
from trio_edge.calibration.model.sequence import begin, logits_of, no_past, run_layers, with_kept

if TYPE_CHECKING:
    from torch import Tensor

    from trio_edge.calibration.model.prompts import SamplePrompt
    from trio_edge.calibration.model.sequence import Sequence
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.runtime.bundle.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """One answer."""

    tokens: list[int]
    """At most as many as asked for; a stop token is the last one."""
    logits_TV: Tensor
    """float32, that each token was chosen from."""
    inputs: list[Sequence]
    """Hidden states before each layer: the prompt, and all answer tokens but the last."""
    kept: list[Tensor]
    """Per stage the picture's visual tokens that are left, ascending."""
    rounds: list[int]
    """Per stage the rounds that its NMS took."""


def greedy_answer(
    model: TorchModel, prompt: SamplePrompt, schedule: Schedule, *, probes: Probes, max_tokens: int
) -> Greedy:
    """Return the answer's first ``max_tokens`` tokens."""
    stages = {stage.layer: stage.keep for stage in schedule.stages}
    sequence = begin(model, prompt)
    inputs: list[Sequence] = []
    past: list[tuple[Tensor, Tensor]] = []
    kept, rounds = [], []
    for layer in range(model.num_layers):
        if layer in stages:
            scores_N = saliency(model, probes.of(layer, schedule), sequence)
            order = order_of(sequence, scores_N, threshold=schedule.nms_threshold)
            sequence = with_kept(sequence, order.kept(stages[layer]), positions=schedule.positions)
            kept.append(sequence.original_N)
            rounds.append(order.rounds)
        inputs.append(sequence)
        present: list[Tensor] = []
        rows = run_layers(
            model,
            sequence.hidden_SD,
            sequence.positions_AS,
            range(layer, layer + 1),
            past=[no_past(model, sequence.hidden_SD)],
            present=present,
        )
        past.append((present[0], present[1]))
        sequence = sequence.with_hidden(rows)
    logits = [logits_of(model, sequence.hidden_SD[-1:])]
    tokens = [int(logits[0].argmax())]
    while len(tokens) < max_tokens and tokens[-1] not in model.text.stop_token_ids:
        position = prompt.next_position + len(tokens) - 1
        row = model.embedding_VD[tokens[-1]][None]
        for layer in range(model.num_layers):
            entering = inputs[layer]
            if schedule.positions == "compact" and schedule.stages:
                position = len(entering.hidden_SD)
            inputs[layer] = entering.with_answer_row(row, position=position)
            present = []
            row = run_layers(
                model,
                row,
                inputs[layer].positions_AS[:, -1:],
                range(layer, layer + 1),
                past=[past[layer]],
                present=present,
            )
            key, value = past[layer]
            past[layer] = torch.cat([key, present[0]], dim=2), torch.cat([value, present[1]], dim=2)
        logits.append(logits_of(model, row))
        tokens.append(int(logits[-1].argmax()))
    return Greedy(tokens=tokens, logits_TV=torch.cat(logits), inputs=inputs, kept=kept, rounds=rounds)
