"""Hugging Face's decoder layers with torch's fused attention: the whole model, or TRIO as in the paper's code.

Without stages this is the model that all ways are compared with; its KV rows are in fixed buffers, so decode can be one CUDA
graph. With stages it is TRIO as in the paper's code: probes by autograd over all rows and the whole head, and NMS on the host.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from gpu_parts.graphs_in_torch import rotary_tables
from gpu_parts.subjects import Subject
from gpu_parts.way import Buffers, Part, set_attention
from parts.reference_stage import autograd_scores, host_nms
from torch import Tensor

from trio_edge.profiling.predict.answer import range_name
from trio_edge.runtime.bundle.schedule import Schedule

WHOLE_MODEL, PAPERS_CODE = "whole model in torch", "the paper's code in torch"


class _Rows:
    """A cache for one layer with the call that transformers' attention makes."""

    def __init__(self, pair: tuple[Tensor, ...], past_length: Tensor | None) -> None:
        """Write after ``past_length`` rows, or from the first row if it is None."""
        self._pair, self._past_length = pair, past_length

    def update(self, key: Tensor, value: Tensor, *_: Any, **_settings: Any) -> tuple[Tensor, ...]:
        """Store the new rows; return the rows for the new queries: these in a prefill, the whole buffer in decode."""
        for cache, rows in zip(self._pair, (key, value)):
            if self._past_length is None:
                cache[:, :, : rows.shape[2]] = rows
            else:
                cache.index_copy_(2, self._past_length.long(), rows)
        return (key, value) if self._past_length is None else self._pair


class LayersInTorch:
    """A ``Way``."""

    def __init__(
        self, subject: Subject, schedule: Schedule, *, max_new_tokens: int, compiled: bool = False
    ) -> None:
        """Use the subject's modules directly."""
        self.name = self.name_for(schedule, compiled=compiled)
        self.subject, self._schedule = subject, schedule
        self.buffers = buffers = Buffers(subject, schedule, max_new_tokens=max_new_tokens)
        self._rotary = rotary_tables(subject)
        self._layers: list[Any] = [
            torch.compile(layer, dynamic=False) if compiled else layer for layer in subject.model.layers
        ]
        self.parts = [Part("vision", self._vision)]
        for index in range(len(buffers.layers)):
            if index:
                self.parts.append(Part(f"select_{index}", self._selection(index - 1), capturable=False))
            self.parts.append(Part(range_name(index, len(buffers.layers)), self._prefill(index)))
        self.parts.append(Part("head", lambda: self._answer(buffers.leaving[-1])))

    @staticmethod
    def name_for(schedule: Schedule, *, compiled: bool) -> str:
        """Return the name in tables."""
        return (PAPERS_CODE if schedule.stages else WHOLE_MODEL) + ", compiled" * compiled

    def decode(self) -> None:
        """Run one token through all layers, and store the next one's embedding."""
        self._choose_attention()
        buffers, hidden = self.buffers, self.buffers.token
        for index, layers in enumerate(buffers.layers):
            past_length, caches = buffers.past_lengths[index], buffers.caches[index]
            tables = self._tables(buffers.token_positions[index])
            columns = torch.arange(caches[0][0].shape[2], device=self.subject.device)
            seen = (columns <= past_length)[None, None, None]
            for layer, pair in zip(layers, caches):
                hidden = self._layer(layer, hidden, tables, _Rows(pair, past_length), mask=seen)
        self._answer(hidden)
        buffers.advance()

    def _choose_attention(self) -> None:
        set_attention(self.subject, decoder="sdpa", vision="sdpa")

    def _vision(self) -> None:
        self._choose_attention()
        vision: Any = self.subject.model.vision.module
        self.buffers.visual_rows.copy_(vision(*self.subject.vision_inputs.values()))

    def _tables(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary(position_ids)
        return cos.to(self.subject.dtype), sin.to(self.subject.dtype)

    def _layer(
        self,
        index: int,
        hidden: Tensor,
        tables: tuple[Tensor, Tensor],
        rows: _Rows | None,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        layer = self._layers[index]
        # transformers 5.24 has renamed the argument
        name = "cache" if "cache" in inspect.signature(layer.forward).parameters else "past_key_values"
        result: Tensor = layer(hidden, attention_mask=mask, position_embeddings=tables, **{name: rows})
        return result

    def _prefill(self, index: int) -> Callable[[], None]:
        buffers = self.buffers

        def run() -> None:
            self._choose_attention()
            hidden, tables = buffers.entering[index], self._tables(buffers.position_ids[index])
            for layer, pair in zip(buffers.layers[index], buffers.caches[index]):
                hidden = self._layer(layer, hidden, tables, _Rows(pair, None))
            buffers.leaving[index].copy_(hidden)

        return run

    def _selection(self, stage: int) -> Callable[[], None]:
        buffers, layer = self.buffers, self._schedule.stages[stage].layer
        first, after = self.subject.num_before, self.subject.num_before + buffers.num_visual[stage]
        preserved = self._schedule.positions == "preserved"

        def run() -> None:
            self._choose_attention()
            hidden, ids = buffers.leaving[stage], buffers.position_ids[stage]
            tables = self._tables(ids)
            scores = autograd_scores(
                lambda rows: self._logits(self._layer(layer, rows[None], tables, None))[0], hidden[0]
            )
            kept = host_nms(
                hidden[0, first:after],
                scores[first:after],
                num_keep=buffers.num_visual[stage + 1],
                threshold=self._schedule.nms_threshold,
            )
            rows = [*range(first), *(first + token for token in kept), *range(after, buffers.lengths[stage])]
            index = torch.tensor(rows, device=self.subject.device)
            buffers.entering[stage + 1].copy_(hidden[:, index])
            new_ids = ids[:, index] if preserved else torch.arange(len(rows), device=self.subject.device)
            buffers.position_ids[stage + 1].copy_(new_ids)
            buffers.kept[stage].copy_(torch.tensor(kept))

        return run

    def _logits(self, hidden: Tensor) -> Tensor:
        model = self.subject.model
        result: Tensor = model.lm_head(model.final_norm(hidden))
        return result

    def _answer(self, hidden: Tensor) -> None:
        logits = self._logits(hidden[0, -1:]).float()
        self.buffers.answer(logits, logits.argmax(-1))
