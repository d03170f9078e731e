"""The interface of a way to run a model, and the buffers that all ways in torch share.

A way is a list of parts, run in order, and a decode step. Parts only read and write buffers whose addresses never change, so each
part can run as it is or be captured as a CUDA graph, in any mixture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from gpu_parts.subjects import Subject
from torch import Tensor

from trio_edge.runtime.bundle.schedule import Schedule


@dataclass(frozen=True)
class Part:
    """One graph's work."""

    name: str
    """The bundle's name: vision, prefix, select_1, segment_1, …, suffix, head."""
    run: Callable[[], Any]
    capturable: bool = True
    """False if it waits for the device."""


class Way(Protocol):
    """One way to run the model with one schedule."""

    name: str
    subject: Subject
    buffers: Buffers
    parts: list[Part]
    """Parts of a prefill, in order."""

    def decode(self) -> None:
        """Run one token through all layers, and store the next one's embedding for the next call."""


class Buffers:
    """Rows, positions, KV rows and lengths of every layer range, and the newest token."""

    def __init__(self, subject: Subject, schedule: Schedule, *, max_new_tokens: int) -> None:
        """Allocate everything on the subject's device; the prompt's text is in its place."""
        sizes, device, dtype = subject.sizes, subject.device, subject.dtype
        shape, num_text = sizes.decoder, len(subject.text_embeds)
        starts = [0, *(stage.layer for stage in schedule.stages)]
        self.layers = [range(first, last) for first, last in zip(starts, [*starts[1:], shape.num_layers])]
        self.num_visual = [sizes.num_visual, *(stage.keep for stage in schedule.stages)]
        self.lengths = [count + num_text for count in self.num_visual]
        axes = len(subject.position_ids)

        def rows(count: int) -> Tensor:
            return torch.zeros(1, count, shape.hidden_size, dtype=dtype, device=device)

        def integers(*sizes: int) -> Tensor:
            return torch.zeros(*sizes, dtype=torch.int32, device=device)

        self.entering = [rows(length) for length in self.lengths]
        """[1, S, D] of each range."""
        self.leaving = [rows(length) for length in self.lengths]
        first, after = subject.num_before, subject.num_before + sizes.num_visual
        self.entering[0][0, :first] = subject.text_embeds[:first]
        self.entering[0][0, after:] = subject.text_embeds[first:]
        self.visual_rows = self.entering[0][0, first:after]
        """[N, D], where the picture's tokens go."""
        self.position_ids = [integers(axes, length) for length in self.lengths]
        self.position_ids[0].copy_(subject.position_ids)
        kv_sizes = (shape.num_kv_heads, shape.head_size)
        self.caches = [
            [
                tuple(
                    torch.zeros(1, kv_sizes[0], length + max_new_tokens, kv_sizes[1], dtype=dtype, device=device)
                    for _ in range(2)
                )
                for _ in layers
            ]
            for length, layers in zip(self.lengths, self.layers)
        ]  # fmt: skip
        """Per range and layer: keys and values, [1, G, C, E]."""
        self.logits = torch.zeros(1, shape.vocab_size, dtype=torch.float32, device=device)
        self.token = rows(1)
        """[1, 1, D], embedding of the newest token."""
        self.kept = [integers(count) for count in self.num_visual[1:]]
        """Per stage the kept tokens, as indices into those that entered it."""
        compact = schedule.positions == "compact"
        self._first_positions = [length if compact else subject.next_position for length in self.lengths]
        self.past_lengths = [integers(1) for _ in self.lengths]
        self.token_positions = [integers(axes, 1) for _ in self.lengths]
        self._table = subject.token_embeddings
        self.rewind()

    def rewind(self) -> None:
        """Set lengths and positions to those after the prefill."""
        for index, length in enumerate(self.lengths):
            self.past_lengths[index].fill_(length)
            self.token_positions[index].fill_(self._first_positions[index])

    def advance(self) -> None:
        """Count one more row and position in every range, on the device."""
        for length, position in zip(self.past_lengths, self.token_positions):
            length.add_(1)
            position.add_(1)

    def answer(self, logits: Tensor, token: Tensor) -> None:
        """Keep the logits [1, V], and look up the embedding of the next token [1], on the device."""
        self.logits.copy_(logits)
        self.token.copy_(self._table.index_select(0, token)[None])

    @property
    def kv_bytes(self) -> int:
        """Bytes of the rows that a prefill leaves in all caches."""
        return sum(
            cache.element_size() * cache.shape[1] * length * cache.shape[3]
            for ranges, length in zip(self.caches, self.lengths)
            for pair in ranges
            for cache in pair
        )


def set_attention(subject: Subject, *, decoder: str, vision: str) -> None:
    """Choose the attention functions of transformers' layers, which read their configuration at each run."""
    subject.model.text_config._attn_implementation = decoder
    config: Any = subject.root
    config.config.vision_config._attn_implementation = vision
