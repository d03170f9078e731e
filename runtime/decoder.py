"""The reduced decoder: chains prefix, select, segments, suffix and head over one backend, and owns the KV caches.

Knows embeddings and rows, nothing of pictures, prompts or sampling.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, final

import numpy as np

from trio_edge.runtime.errors import ShapeError
from trio_edge.runtime.greedy_nms import greedy_nms
from trio_edge.runtime.kv_cache import KVCache

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from trio_edge.runtime.backend import Session
    from trio_edge.runtime.manifest import GraphSpec, Manifest
    from trio_edge.runtime.positions import PromptPositions


Choose: TypeAlias = "Callable[[int, NDArray[np.int32], int], NDArray[np.int32]]"
"""Given the stage, the tokens that enter it (original indices) and K, returns the kept ones as ascending indices
into the entering tokens."""


@dataclass(slots=True)
class PrefillResult:
    """What a prefill gives besides filled KV caches."""

    logits: NDArray[np.float32]
    """[V], of the prompt's last row."""
    kept: list[NDArray[np.int32]]
    """Per stage the kept tokens as indices into the picture's original visual tokens: ascending, but for rows that merge
    several, which come last."""
    scores: list[NDArray[np.float32]] = field(default_factory=list)
    """Per stage the saliency of the tokens that entered it."""
    num_repaired: int = 0
    """Stages whose parallel NMS had not settled and were redone exactly on the host."""


class _Span(NamedTuple):
    """Where a sequence's visual tokens lie, how many rows are reserved for them, and where it ends."""

    start: int
    num_visual: int
    rows: int
    length: int


@final
class Decoder:
    """Runs prefill and decode of one sequence. Not thread-safe: it owns one set of KV caches."""

    def __init__(self, manifest: Manifest, load: Callable[[GraphSpec], Session]) -> None:
        """Load all decoder graphs.

        Args:
            manifest: The bundle's.
            load: Returns a session for a graph.
        """
        self._manifest = manifest
        self._ranges = manifest.ranges
        self._selects = manifest.selects
        self._head = manifest.graph("head")
        self._sessions = {spec.name: load(spec) for spec in (*self._ranges, *self._selects, self._head)}
        self.caches = [
            KVCache(spec, manifest.dimensions, capacity=capacity, dtype=manifest.dtype)
            for spec, capacity in zip(self._ranges, manifest.kv_capacities)
        ]
        self._next_position = 0
        self.graph_ms: dict[str, float] = {}
        """Milliseconds spent in each graph since the last prefill began."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV rows that are in use."""
        return sum(cache.used_bytes for cache in self.caches)

    @property
    def max_new_tokens(self) -> int:
        """Tokens that can still be decoded after the last prefill."""
        return min(cache.capacity - cache.length for cache in self.caches)

    def prefill(
        self,
        inputs_embeds: NDArray[Any],
        *,
        positions: PromptPositions,
        visual_rows: int,
        visual_start: int,
        num_visual: int,
        length: int,
        choose: Choose | None = None,
    ) -> PrefillResult:
        """Run the prompt through all stages and fill the KV caches.

        Args:
            inputs_embeds: [1, S, D], right-padded: N visual rows reserved plus a text bucket.
            positions: Of its S rows.
            visual_rows: N, one of the manifest's visual sizes.
            visual_start: First row of the visual span.
            num_visual: Real visual tokens, at most N; the text after them follows at once.
            length: Real rows.
            choose: Selects on the host in place of the select graphs; for comparisons with other selections.

        Raises:
            ShapeError: If an array does not fit the graphs.
        """
        self.graph_ms = {}
        for cache in self.caches:
            cache.clear()
        self._next_position = positions.next
        hidden, ids = inputs_embeds, positions.ids
        result = PrefillResult(logits=np.empty(0, np.float32), kept=[])
        original = np.arange(num_visual, dtype=np.int32)
        more = {  # what the selectors of some methods look at
            "prompt_embeds": inputs_embeds,
            "prompt_num_visual": np.array([num_visual], np.int32),
            "prompt_length": np.array([length], np.int32),
        }
        for index, spec in enumerate(self._ranges):
            if index:
                span = _Span(visual_start, num_visual, visual_rows, length)
                if choose is None:
                    hidden, ids, kept = self._select(index - 1, hidden, ids, span, result, more=more)
                else:
                    kept = choose(index - 1, original, min(self._keep(index - 1), num_visual))
                    hidden, ids = self._gather(index - 1, hidden, ids, kept, span)
                original = original[kept]
                result.kept.append(original)
                length -= num_visual - len(kept)
                num_visual, visual_rows = len(kept), self._keep(index - 1)
            outputs = self._run_range(spec, self.caches[index], hidden, ids, num_rows=length)
            hidden, more = outputs["hidden_states_out"], more | outputs
        result.logits = self._logits(hidden, last_row=length - 1)
        return result

    def decode(self, embedding: NDArray[Any]) -> NDArray[np.float32]:
        """Run one new token through all layers and return the logits [V] of the next one.

        Args:
            embedding: [1, 1, D], the token's embedding.

        Raises:
            ShapeError: If the KV caches are full.
        """
        if self.max_new_tokens < 1:
            raise ShapeError(
                f"decode: expected at most {self._manifest.max_new_tokens} new tokens, the KV caches are full;"
                " export with a larger --max-new-tokens"
            )
        hidden = embedding
        compact, axes = self._manifest.schedule.positions == "compact", self._manifest.position_axes
        for spec, cache in zip(self._ranges, self.caches):
            position = cache.length if compact else self._next_position
            ids = np.full((axes, 1), position, np.int32)
            hidden = self._run_range(spec, cache, hidden, ids, num_rows=1)["hidden_states_out"]
        self._next_position += 1
        return self._logits(hidden, last_row=0)

    def close(self) -> None:
        """Close all sessions."""
        for session in self._sessions.values():
            session.close()

    def _run(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        start = time.perf_counter()
        outputs = self._sessions[name].run(inputs)
        self.graph_ms[name] = self.graph_ms.get(name, 0.0) + 1e3 * (time.perf_counter() - start)
        return outputs

    def _run_range(
        self,
        spec: GraphSpec,
        cache: KVCache,
        hidden: NDArray[Any],
        positions: NDArray[np.int32],
        *,
        num_rows: int,
    ) -> dict[str, NDArray[Any]]:
        inputs = {
            spec.inputs[0].name: hidden,
            "position_ids": positions,
            "past_length": np.array([cache.length], np.int32),
            **cache.inputs(),
        }
        outputs = self._run(spec.name, inputs)
        cache.append(outputs, num_rows=num_rows)
        return outputs

    def _keep(self, stage: int) -> int:
        return self._manifest.schedule.stages[stage].keep

    def _select(
        self,
        stage: int,
        hidden: NDArray[Any],
        positions: NDArray[np.int32],
        span: _Span,
        result: PrefillResult,
        *,
        more: Mapping[str, NDArray[Any]],
    ) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[np.int32]]:
        """Return the reduced rows, their positions, and the kept indices into the span that entered."""
        spec = self._selects[stage]
        inputs = {
            "hidden_states": hidden,
            "position_ids": positions,
            "visual_rows": np.arange(span.start, span.start + span.rows, dtype=np.int32),
            "num_visual": np.array([span.num_visual], np.int32),
            "length": np.array([span.length], np.int32),
        }
        inputs |= {name: more[name] for name in spec.input_names if name in more and name not in inputs}
        outputs = self._run(spec.name, inputs)
        num_kept = min(self._keep(stage), span.num_visual)
        scores = outputs["scores"][: span.num_visual]
        result.scores.append(scores)
        if outputs["unsettled"][0] == 0:
            return (
                outputs["kept_hidden_states"],
                outputs["kept_position_ids"],
                outputs["kept_indices"][:num_kept],
            )
        result.num_repaired += 1
        kept = greedy_nms(
            hidden[0, span.start : span.start + span.num_visual],
            scores,
            num_keep=num_kept,
            threshold=self._manifest.schedule.nms_threshold,
        )
        return (*self._gather(stage, hidden, positions, kept, span), kept)

    def _gather(
        self,
        stage: int,
        hidden: NDArray[Any],
        positions: NDArray[np.int32],
        kept: NDArray[np.int32],
        span: _Span,
    ) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """Do on the host what the select graph's gather does: rows [1, R, D] and position ids [A, R]."""
        num_rows = hidden.shape[1] - span.rows + self._keep(stage)
        rows = np.concatenate(
            [np.arange(span.start), span.start + kept, np.arange(span.start + span.num_visual, span.length)]
        )
        kept_hidden = np.zeros((1, num_rows, hidden.shape[2]), dtype=hidden.dtype)
        kept_hidden[0, : len(rows)] = hidden[0, rows]
        kept_positions = np.broadcast_to(
            np.arange(num_rows, dtype=np.int32), (len(positions), num_rows)
        ).copy()
        if self._manifest.schedule.positions == "preserved":
            kept_positions[:, : len(rows)] = positions[:, rows]
        return kept_hidden, kept_positions

    def _logits(self, hidden: NDArray[Any], *, last_row: int) -> NDArray[np.float32]:
        outputs = self._run("head", {"hidden_states": hidden, "last_row": np.array([last_row], np.int32)})
        logits: NDArray[np.float32] = outputs["logits"][0]
        return logits
