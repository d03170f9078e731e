"""The graphs of a bundle, run as the torch modules that they are exported from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_parts.subjects import Subject
from gpu_parts.way import Buffers, Part, set_attention
from torch import Tensor, nn

from trio_edge.export.graphs.attention import ATTENTION_NAME, DecoderRange, RotaryTables
from trio_edge.export.graphs.head import Head
from trio_edge.export.graphs.select import Select
from trio_edge.profiling.predict.answer import range_name
from trio_edge.runtime.bundle.graph_io import MAX_CANDIDATES
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.selectors.interface import stage_selector


class GraphsInTorch:
    """A ``Way``."""

    def __init__(
        self, subject: Subject, schedule: Schedule, *, max_new_tokens: int, compiled: bool = False
    ) -> None:
        """Make graphs of the subject's modules; all ways share the weights."""
        self.name, self.subject = self.name_for(schedule, compiled=compiled), subject
        self.buffers = buffers = Buffers(subject, schedule, max_new_tokens=max_new_tokens)
        model, rotary = subject.model, rotary_tables(subject)
        self._ranges = [
            DecoderRange([_Layer(model.layers[layer], compiled=compiled) for layer in layers], rotary)
            for layers in buffers.layers
        ]
        self._selects = [
            Select(
                stage_selector(model, schedule, stage=stage, max_visual=buffers.num_visual[stage]),
                rotary,
                preserve_positions=schedule.positions == "preserved",
            )
            for stage in range(len(schedule.stages))
        ]
        if compiled:
            for select in self._selects:
                select.compile(dynamic=False)
        num_candidates = min(MAX_CANDIDATES, len(model.lm_head.weight))
        self._head = Head(model.final_norm, model.lm_head, num_candidates=num_candidates)
        self._zero = torch.zeros(1, dtype=torch.int32, device=subject.device)
        self._last_row = self._zero + (buffers.lengths[-1] - 1)
        self.parts = [Part("vision", self._vision)]
        for index in range(len(self._ranges)):
            if index:
                self.parts.append(Part(f"select_{index}", self._selection(index - 1)))
            self.parts.append(Part(range_name(index, len(buffers.layers)), self._prefill(index)))
        self.parts.append(Part("head", lambda: self._answer(buffers.leaving[-1], self._last_row)))

    @staticmethod
    def name_for(_schedule: Schedule, *, compiled: bool) -> str:
        """Return the name in tables."""
        return "graphs in torch" + ", compiled" * compiled

    def decode(self) -> None:
        """Run one token through all layers, and store the next one's embedding."""
        self._choose_attention()
        buffers, hidden = self.buffers, self.buffers.token
        for index, module in enumerate(self._ranges):
            past_length, caches = buffers.past_lengths[index], buffers.caches[index]
            hidden, *present = module(
                hidden,
                buffers.token_positions[index],
                past_length,
                *(cache for pair in caches for cache in pair),
            )
            for cache, rows in zip([cache for pair in caches for cache in pair], present):
                cache.index_copy_(2, past_length.long(), rows)
        self._answer(hidden, self._zero)
        buffers.advance()

    def _choose_attention(self) -> None:
        set_attention(self.subject, decoder=ATTENTION_NAME, vision="eager")

    def _vision(self) -> None:
        self._choose_attention()
        vision: Any = self.subject.model.vision.module
        self.buffers.visual_rows.copy_(vision(*self.subject.vision_inputs.values()))

    def _prefill(self, index: int) -> Callable[[], None]:
        buffers, module = self.buffers, self._ranges[index]
        caches = buffers.caches[index]
        past = [cache[:, :, :0] for pair in caches for cache in pair]

        def run() -> None:
            self._choose_attention()
            hidden, *present = module(
                buffers.entering[index], buffers.position_ids[index], self._zero, *past
            )  # fmt: skip
            for cache, rows in zip([cache for pair in caches for cache in pair], present):
                cache[:, :, : rows.shape[2]] = rows
            buffers.leaving[index].copy_(hidden)

        return run

    def _selection(self, stage: int) -> Callable[[], None]:
        buffers, module, subject = self.buffers, self._selects[stage], self.subject
        count = buffers.num_visual[stage]
        visual_rows = torch.arange(count, dtype=torch.int32, device=subject.device) + subject.num_before
        num_visual, length = self._zero + count, self._zero + buffers.lengths[stage]

        def run() -> None:
            hidden, positions, _, kept, _, _ = module(
                buffers.leaving[stage], buffers.position_ids[stage], visual_rows, num_visual, length
            )
            buffers.entering[stage + 1].copy_(hidden)
            buffers.position_ids[stage + 1].copy_(positions)
            buffers.kept[stage].copy_(kept)

        return run

    def _answer(self, hidden: Tensor, row: Tensor) -> None:
        logits, _, best = self._head(hidden, row)
        self.buffers.answer(logits, best[0, :1])


class _Layer(nn.Module):
    """A decoder layer that always gets an empty list for its new rows, because torch compiles again for each list length."""

    def __init__(self, layer: nn.Module, *, compiled: bool) -> None:
        super().__init__()
        self.layer = torch.compile(layer, dynamic=False) if compiled else layer

    def forward(self, hidden: Tensor, *, present: list[Tensor], **inputs: Any) -> Tensor:
        rows: list[Tensor] = []
        result: Tensor = self.layer(hidden, present=rows, **inputs)
        present += rows
        return result


def rotary_tables(subject: Subject) -> RotaryTables:
    """Return the graphs' rotary tables of the subject's decoder."""
    inv_freq: Tensor = torch.from_numpy(subject.model.inv_freq).to(subject.device)
    return RotaryTables(inv_freq, attention_scaling=subject.model.attention_scaling)
