"""The reduced decoder: chains prefix, select, segments, suffix and head over one backend, and owns the KV caches.

Knows embeddings and rows, nothing of pictures, prompts or sampling.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import numpy as np

from trio_edge.runtime.errors import ShapeError
from trio_edge.runtime.greedy_nms import greedy_nms
from trio_edge.runtime.kv_cache import KVCache

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from trio_edge.runtime.backend import Session
    from trio_edge.runtime.manifest import GraphSpec, Manifest


@dataclass(slots=True)
class PrefillResult:
    """What a prefill gives besides filled KV caches."""

    logits: NDArray[np.float32]
    """[V], of the prompt's last row."""
    kept: list[NDArray[np.int32]]
    """Per stage the kept tokens, ascending, as indices into the picture's original visual tokens."""
    scores: list[NDArray[np.float32]] = field(default_factory=list)
    """Per stage the saliency of the tokens that entered it."""
    num_repaired: int = 0
    """Stages whose parallel NMS had not settled and were redone exactly on the host."""


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
        self._caches = [
            KVCache(spec, manifest.dimensions, capacity=capacity, dtype=manifest.dtype)
            for spec, capacity in zip(self._ranges, manifest.kv_capacities)
        ]
        self._length = 0
        self.graph_ms: dict[str, float] = {}
        """Milliseconds spent in each graph since the last prefill began."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV rows that are in use."""
        return sum(cache.used_bytes for cache in self._caches)

    @property
    def allocated_kv_bytes(self) -> int:
        """Bytes of the KV buffers."""
        return sum(cache.num_bytes for cache in self._caches)

    @property
    def max_new_tokens(self) -> int:
        """Tokens that can still be decoded after the last prefill."""
        return min(cache.capacity - cache.length for cache in self._caches)

    def prefill(
        self, inputs_embeds: NDArray[Any], *, visual_start: int, num_visual: int, length: int
    ) -> PrefillResult:
        """Run the prompt through all stages and fill the KV caches.

        Args:
            inputs_embeds: [1, S, D], right-padded: N visual rows reserved plus a text bucket.
            visual_start: First row of the visual span.
            num_visual: Real visual tokens, at most N; the text after them follows at once.
            length: Real rows.

        Raises:
            ShapeError: If an array does not fit the graphs.
        """
        self.graph_ms = {}
        for cache in self._caches:
            cache.clear()
        self._length = length
        hidden = inputs_embeds
        positions = np.arange(hidden.shape[1], dtype=np.int32)[None]
        result = PrefillResult(logits=np.empty(0, np.float32), kept=[])
        original = np.arange(num_visual, dtype=np.int32)
        for index, spec in enumerate(self._ranges):
            if index:
                hidden, positions, kept = self._select(
                    index - 1, hidden, positions, visual_start, num_visual, length, result
                )
                original = original[kept]
                result.kept.append(original)
                length -= num_visual - len(kept)
                num_visual = len(kept)
            hidden = self._run_range(spec, self._caches[index], hidden, positions, num_rows=length)
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
        compact = self._manifest.schedule.positions == "compact"
        for spec, cache in zip(self._ranges, self._caches):
            position = cache.length if compact else self._length
            hidden = self._run_range(spec, cache, hidden, np.array([[position]], np.int32), num_rows=1)
        self._length += 1
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
        self, spec: GraphSpec, cache: KVCache, hidden: NDArray[Any], positions: NDArray[np.int32], *, num_rows: int
    ) -> NDArray[Any]:
        inputs = {
            spec.inputs[0].name: hidden,
            "position_ids": positions,
            "past_length": np.array([cache.length], np.int32),
            **cache.inputs(),
        }
        outputs = self._run(spec.name, inputs)
        cache.append(outputs, num_rows=num_rows)
        return outputs["hidden_states_out"]

    def _select(
        self, stage: int, hidden: NDArray[Any], positions: NDArray[np.int32], visual_start: int, num_visual: int,
        length: int, result: PrefillResult,
    ) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[np.int32]]:
        """Return the reduced rows, their positions, and the kept indices into the span that entered."""
        spec = self._selects[stage]
        outputs = self._run(spec.name, {
            "hidden_states": hidden,
            "position_ids": positions,
            "visual_start": np.array([visual_start], np.int32),
            "num_visual": np.array([num_visual], np.int32),
            "length": np.array([length], np.int32),
        })
        num_kept = min(self._manifest.schedule.stages[stage].keep, num_visual)
        scores = outputs["scores"][:num_visual]
        result.scores.append(scores)
        if outputs["unsettled"][0] == 0:
            return outputs["kept_hidden_states"], outputs["kept_position_ids"], outputs["kept_indices"][:num_kept]
        result.num_repaired += 1
        features = hidden[0, visual_start : visual_start + num_visual]
        kept = greedy_nms(
            features, scores, num_keep=num_kept, threshold=self._manifest.schedule.nms_threshold
        )
        return (*self._gather(outputs, hidden, positions, kept, visual_start, num_visual, length), kept)

    def _gather(
        self, outputs: Mapping[str, NDArray[Any]], hidden: NDArray[Any], positions: NDArray[np.int32],
        kept: NDArray[np.int32], visual_start: int, num_visual: int, length: int,
    ) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """Do on the host what the select graph's gather does, with other kept tokens."""
        rows = np.concatenate([
            np.arange(visual_start), visual_start + kept, np.arange(visual_start + num_visual, length)
        ])
        kept_hidden, kept_positions = outputs["kept_hidden_states"].copy(), outputs["kept_position_ids"].copy()
        kept_hidden[0, : len(rows)] = hidden[0, rows]
        if self._manifest.schedule.positions == "preserved":
            kept_positions[0, : len(rows)] = positions[0, rows]
        return kept_hidden, kept_positions

    def _logits(self, hidden: NDArray[Any], *, last_row: int) -> NDArray[np.float32]:
        outputs = self._run("head", {"hidden_states": hidden, "last_row": np.array([last_row], np.int32)})
        logits: NDArray[np.float32] = outputs["logits"][0]
        return logits
