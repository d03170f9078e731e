"""The reduced decoder: chains prefix, select, segments, suffix and head on one stream of a device.

The host does not wait for the device before the first token: lengths and positions follow from the known K's and are sent
ahead, hidden states and KV rows stay on the device, and all results come back in one copy. A decode step sends one block,
runs all ranges and the head as one captured sequence, and waits once, for the most likely tokens.

The decoder knows embeddings and rows, but no images, prompts or sampling. docs/runtime.md describes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np

from trio_edge.runtime.buffers.blocks import copy_tensor
from trio_edge.runtime.buffers.decoder import DecoderBuffers, TopTokens, top_tokens
from trio_edge.runtime.buffers.question_rows import QuestionRows
from trio_edge.runtime.bundle import graph_io
from trio_edge.runtime.bundle.errors import BackendError, ShapeError
from trio_edge.runtime.devices.interface import DeviceTensor, find_profile
from trio_edge.runtime.devices.timeline import Timeline
from trio_edge.runtime.model.decoder_prompt import Span
from trio_edge.runtime.model.head_candidates import HeadCandidates
from trio_edge.runtime.model.host_selection import HostSelection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from trio_edge.runtime.buffers.kv_cache import NewRows
    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.bundle.token_table import TokenTable
    from trio_edge.runtime.devices.interface import Launch, LoadedGraphs
    from trio_edge.runtime.model.decoder_prompt import DecoderPrompt
    from trio_edge.runtime.model.host_selection import SelectorOverride


@dataclass(slots=True)
class PrefillResult:
    """Result of a prefill, apart from the filled KV caches."""

    logits: NDArray[np.float32]
    """[V], logits of the prompt's last row."""
    top: TopTokens
    """The most likely of these tokens."""
    kept: list[NDArray[np.int32]]
    """Kept tokens of each stage: indices into the original visual tokens, ascending, except that rows which merge several
    tokens come last."""
    scores: list[NDArray[np.float32]] = field(default_factory=list)
    """Saliency of the tokens that entered each stage."""
    num_repaired: int = 0
    """Stages that were redone exactly on the host, because their parallel NMS had not settled."""


class _Chain(NamedTuple):
    """The launches of one bucket."""

    ranges: list[Launch]
    new_rows: list[NewRows]
    selects: list[tuple[Launch, ...]]
    """All launches of each selection: the pieces of its probe, if it has one, and the select graph."""
    head: Launch


@final
class Decoder:
    """Runs prefill and decode of one sequence. Not thread-safe: it owns one set of KV caches."""

    def __init__(
        self,
        manifest: Manifest,
        graphs: LoadedGraphs,
        *,
        keep_images: int = 0,
        head_rows: TokenTable | None = None,
    ) -> None:
        """Allocate all buffers and bind the decode step. The decoder does not close ``graphs``.

        Args:
            manifest: The bundle's.
            graphs: Its engines.
            keep_images: Number of prompts whose rows up to the last visual token are kept, in a bundle with follow-ups.
            head_rows: The manifest's ``head_rows``, if it has them.

        Raises:
            BackendError: If the device has too little memory.
        """
        self._manifest, self._device, self._engines = manifest, graphs.device, graphs.engines
        self._notes = graphs.notes
        self._buffers = DecoderBuffers(manifest, graphs.device)
        self.caches = self._buffers.caches
        self._question: QuestionRows | None = None
        if graph_io.has_follow_ups(manifest):
            prefix = graphs.engines[self._buffers.ranges[0].name]
            self._question = QuestionRows(manifest, self._buffers, prefix, graphs.device, count=keep_images)
        self._candidates: HeadCandidates | None = None
        if self._buffers.candidates is not None:
            assert head_rows is not None, "the manifest has them"
            head = graphs.engines["head"]
            self._candidates = HeadCandidates(graphs.device, head, self._buffers.candidates, head_rows)
        self._host = HostSelection(manifest, graphs.device, self._buffers)
        self._timeline = Timeline(graphs.device)
        self._chains: dict[tuple[int, int], _Chain] = {}
        self._step = [
            self._engines[spec.name].prepare(*self._buffers.step_tensors(index))
            for index, spec in enumerate(self._buffers.ranges)
        ]
        self._step.append(self._engines["head"].prepare(*self._buffers.step_head_tensors()))
        self._sent, self._step_top = self._buffers.sent_by_step(), top_tokens(self._buffers.step_top)
        self._is_compact = manifest.schedule.positions == "compact"
        self.prefix_was_kept = False
        """Whether the first range ran only the question's rows in the last prefill."""
        self._captured: Callable[[], None] | None = None
        self._num_steps = 0
        self._done = graphs.device.event()
        self._logits: NDArray[np.float32] | None = None
        self._next_position = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV rows in use."""
        return sum(cache.used_bytes for cache in self.caches)

    @property
    def max_new_tokens(self) -> int:
        """Tokens that can still be decoded after the last prefill."""
        return min(cache.capacity - cache.length for cache in self.caches)

    @property
    def graph_ms(self) -> dict[str, float]:
        """The device's milliseconds in each graph of the last prefill."""
        return self._timeline.milliseconds()

    def prefill(self, prompt: DecoderPrompt, *, override: SelectorOverride | None = None) -> PrefillResult:
        """Run the prompt through all stages and fill the KV caches.

        ``override`` selects on the host instead of the select graphs, for comparisons.

        Raises:
            ShapeError: If the prompt does not fit its bucket.
            BackendError: If a graph fails.
        """
        prompt.check(self._manifest)
        spans = self._spans(prompt)
        chain = self._chain(prompt.max_visual, prompt.text_bucket)
        self._timeline.clear()
        self.prefix_was_kept = False
        self._next_position = prompt.positions.next
        self._send(prompt, spans)
        if override is not None:
            kept_of = self._run_overridden(chain, spans, prompt, override)
            self._fetch()
            return self._result(spans, kept_of, has_scores=False)
        self._run_prefix(chain, spans, prompt)
        if chain.selects:
            self._enqueue_select(chain, 0)
            self._run(chain, spans, first=1)
        else:
            self._timeline.enqueue("head", chain.head)
        self._fetch()
        kept_of = self._repair(chain, spans, prompt)
        return self._result(spans, kept_of, has_scores=True)

    def decode(self, embedding: NDArray[Any]) -> TopTokens:
        """Run one new token through all layers and return the most likely next tokens.

        ``embedding`` is the token's, D numbers in any shape.

        Raises:
            ShapeError: If the KV caches are full.
            BackendError: If a graph fails.
        """
        if self.max_new_tokens < 1:
            raise ShapeError(
                f"decode: expected at most {self._manifest.max_new_tokens} new tokens, the KV caches are full;"
                " export with a larger --max-new-tokens"
            )
        device, sent = self._device, self._sent
        sent.embedding[:] = embedding.reshape(-1)
        for cache, positions, past_length in zip(self.caches, sent.positions, sent.past_lengths):
            positions[:] = cache.length if self._is_compact else self._next_position
            past_length[0] = cache.length
        self._buffers.step.upload(device)
        self._enqueue_step()
        self._buffers.step_top.download(device)
        self._done.record()
        # The device copies the new rows while the host samples. Their place changes with every token, so the copy cannot be
        # captured.
        for cache, row in zip(self.caches, self._buffers.new_row):
            cache.append(device, row, num_rows=1)
        self._next_position += 1
        self._logits = None
        self._done.wait()
        return _copied(self._step_top)

    def skip(self, count: int) -> None:
        """Go on as if ``count`` more tokens had been decoded, or fewer if it is negative, to time later tokens.

        Raises:
            ShapeError: If the KV caches have no room for as many.
        """
        if count > self.max_new_tokens:
            raise ShapeError(
                f"decode: expected to skip at most {self.max_new_tokens} rows, the rest of the KV caches, got {count};"
                " export with a larger --max-new-tokens"
            )
        for cache in self.caches:
            cache.length += count
        self._next_position += count

    def logits(self) -> NDArray[np.float32]:
        """Return all logits [V] of the last prefill or decode step; those of a decode step are downloaded now."""
        if self._logits is None:
            self._buffers.step_logits.download(self._device)
            self._device.synchronize()
            self._logits = self._buffers.step_logits.host(graph_io.LOGITS)[0].copy()
        return self._logits

    # Prefill

    def _spans(self, prompt: DecoderPrompt) -> list[Span]:
        """Return the span that enters each layer range. It follows from the K's, without asking the device."""
        spans = [Span(prompt.num_visual, prompt.max_visual, prompt.length)]
        for stage in self._manifest.schedule.stages:
            last = spans[-1]
            kept = min(stage.keep, last.num_visual)
            spans.append(Span(kept, stage.keep, last.length - last.num_visual + kept))
        return spans

    def _chain(self, max_visual: int, text_bucket: int) -> _Chain:
        """Return the launches of a bucket, which are bound at its first use."""
        key = (max_visual, text_bucket)
        if key in self._chains:
            return self._chains[key]
        buffers, ranges, new_rows, selects = self._buffers, [], [], []
        num_rows = [max_visual, *(stage.keep for stage in self._manifest.schedule.stages)]
        sizes = [rows + text_bucket for rows in num_rows]
        for index, spec in enumerate(buffers.ranges):
            profile = find_profile(spec, {"S": sizes[index], "C": 0})
            ranges.append(self._engines[spec.name].prepare(profile, buffers.range_tensors(index, profile)))
            new_rows.append(buffers.new_rows(index, sizes[index]))
        for stage, spec in enumerate(buffers.selects):
            wanted = {"N": num_rows[stage], "S": sizes[stage], "R": sizes[stage + 1], "F": sizes[0]}
            profile = find_profile(spec, {name: wanted[name] for name in spec.profiles[0].sizes})
            select = self._engines[spec.name].prepare(profile, buffers.select_tensors(stage, profile))
            selects.append((*self._probe(stage, rows=sizes[stage], num_visual=num_rows[stage]), select))
        profile = buffers.head_profile(sizes[-1])
        head = self._engines["head"].prepare(profile, buffers.head_tensors(profile))
        self._chains[key] = _Chain(ranges, new_rows, selects, head)
        return self._chains[key]

    def _probe(self, stage: int, *, rows: int, num_visual: int) -> list[Launch]:
        """Return the launches of the probe of ``stage``; none without a probe."""
        buffers = self._buffers
        probe, gradient = buffers.probes[stage], buffers.gradient
        if probe is None or gradient is None:
            return []
        num_probe_rows = self._manifest.schedule.num_probe_rows
        halves = []
        for spec, half in zip(probe, ("P", "G")):
            sizes = {f"{half}S": rows, f"{half}N": num_visual, f"{half}R": num_probe_rows}
            profile = find_profile(spec, sizes)
            tensors = buffers.probe_tensors(stage, spec, profile)
            halves.append(self._engines[spec.name].prepare(profile, tensors))
        between = find_profile(gradient, {"GR": num_probe_rows})
        candidates = [] if self._candidates is None else [self._candidates]
        last = self._engines[gradient.name].prepare(between, buffers.gradient_tensors(between))
        return [halves[0], *candidates, last, halves[1]]

    def _send(self, prompt: DecoderPrompt, spans: list[Span]) -> None:
        """Enqueue copies of all inputs: embeddings, positions and lengths."""
        inputs, device = self._buffers.inputs, self._device
        ids = prompt.positions.ids
        inputs.host(graph_io.POSITIONS, ids.shape)[...] = ids
        values = {graph_io.LAST_ROW: spans[-1].length - 1, graph_io.PROMPT_LENGTH: prompt.length}
        if len(spans) > 1:
            rows = inputs.host(graph_io.VISUAL_ROWS, (prompt.max_visual,))
            rows[:] = prompt.num_text + np.arange(prompt.max_visual)  # rows of padding tokens
            rows[: prompt.num_visual] = prompt.visual_rows
        if graph_io.VISUAL_IMAGES in inputs:
            images = inputs.host(graph_io.VISUAL_IMAGES, (prompt.max_visual,))
            images[:] = 0
            images[: prompt.num_visual] = 0 if prompt.images is None else prompt.images
        if graph_io.PROMPT_IS_VISUAL in inputs:
            marks = inputs.host(graph_io.PROMPT_IS_VISUAL, (ids.shape[1],))
            marks[:] = 0
            marks[prompt.visual_rows] = 1
        for stage, span in enumerate(spans[:-1]):
            values |= {
                f"{graph_io.NUM_VISUAL}.{stage}": span.num_visual,
                f"{graph_io.LENGTH}.{stage}": span.length,
            }
            if self._buffers.probes[stage] is not None:
                rows = self._probe_rows(span.length, num_after=prompt.num_after)
                inputs.host(f"{graph_io.PROBE_ROWS}.{stage}")[:] = rows
        for name, value in values.items():
            inputs.host(name)[0] = value
        inputs.upload(device)
        self._send_text(prompt)
        self._place(prompt.visual, self._buffers.embeds, prompt.visual_runs)
        num_rows = prompt.max_visual + prompt.text_bucket
        # Padding rows still hold an earlier prompt. Masked rows must be finite, and answers must not depend on history.
        device.clear(self._buffers.embeds.rows(prompt.length, num_rows - prompt.length))
        for layer, plane in self._buffers.planes[0].items():
            device.clear(plane.rows(0, num_rows))
            if prompt.planes:
                self._place(prompt.planes[layer], plane, prompt.visual_runs)

    def _send_text(self, prompt: DecoderPrompt) -> None:
        """Enqueue copies of the text's rows, which lie before, between and after the runs of visual tokens."""
        text, row, sent = self._buffers.text, 0, 0
        text[: prompt.num_text] = prompt.text
        for run in (*prompt.visual_runs, range(prompt.length, prompt.length)):
            count = run.start - row
            if count:
                self._device.upload(self._buffers.embeds.rows(row, count), text[sent : sent + count])
            row, sent = run.stop, sent + count

    def _probe_rows(self, length: int, *, num_after: int) -> NDArray[np.int32]:
        """Return the rows that carry the probe's loss. Rows up to the last image's end are replaced by the first row after it.

        The graphs would not count a visual token's direct contribution to the loss at its own row.
        """
        schedule = self._manifest.schedule
        last = length - schedule.last_probe_offset
        rows = np.arange(last - schedule.num_probe_rows + 1, last + 1, dtype=np.int32)
        return np.maximum(rows, length - num_after)

    def _place(
        self, visual: DeviceTensor | NDArray[Any], target: DeviceTensor, runs: Sequence[range]
    ) -> None:
        """Enqueue copies of the rows of ``visual`` in order to the ``runs`` of rows of ``target``."""
        first = 0
        for run in runs:
            place, count = target.rows(run.start, len(run)), len(run)
            if isinstance(visual, DeviceTensor):
                copy_tensor(self._device, place, visual.rows(first, count))
            else:
                self._device.upload(place, np.ascontiguousarray(visual[first : first + count]))
                self._device.synchronize()  # the array is not pinned, and belongs to the caller
            first += count

    def _run(self, chain: _Chain, spans: list[Span], *, first: int) -> None:
        """Enqueue the chain from layer range ``first`` on."""
        for index in range(first, len(chain.ranges)):
            self._run_range(chain, spans, index)
            if index < len(chain.selects):
                self._enqueue_select(chain, index)
        self._timeline.enqueue("head", chain.head)

    def _enqueue_select(self, chain: _Chain, stage: int) -> None:
        self._timeline.enqueue(self._buffers.selects[stage].name, *chain.selects[stage])

    def _run_prefix(self, chain: _Chain, spans: list[Span], prompt: DecoderPrompt) -> None:
        """Enqueue the first range: as a whole, or with follow-ups the first rows, which may be kept, then the question's."""
        first = 0 if prompt.num_visual == 0 else int(prompt.visual_rows[-1]) + 1
        question = self._question
        if question is None or not 0 < first < prompt.length:
            self._run_range(chain, spans, 0)
            return
        self.prefix_was_kept = question.bring_back(prompt.key, num_rows=first)
        if not self.prefix_was_kept:
            self._enqueue_range(chain, 0, num_rows=first)
            question.keep(prompt.key, num_rows=first)
        positions, bucket = prompt.positions.ids[:, first : prompt.length], prompt.text_bucket
        self._timeline.enqueue("question", question.prepare(positions, first=first, bucket=bucket))
        num_rows = prompt.max_visual + bucket
        question.finish(rows=range(first, prompt.length), bucket=bucket, num_rows=num_rows)

    def _run_range(self, chain: _Chain, spans: list[Span], index: int) -> None:
        self._enqueue_range(chain, index, num_rows=spans[index].length)

    def _enqueue_range(self, chain: _Chain, index: int, *, num_rows: int) -> None:
        """Enqueue layer range ``index`` and a copy of its first ``num_rows`` KV rows to the cache."""
        self._timeline.enqueue(self._buffers.ranges[index].name, chain.ranges[index])
        cache = self.caches[index]
        cache.clear()
        cache.append(self._device, chain.new_rows[index], num_rows=num_rows)

    def _fetch(self) -> None:
        self._buffers.results.download(self._device)
        self._done.record()
        self._done.wait()

    def _run_overridden(
        self, chain: _Chain, spans: list[Span], prompt: DecoderPrompt, override: SelectorOverride
    ) -> dict[int, NDArray[np.int32]]:
        """Run the chain with all selections on the host and return the kept indices of each stage."""
        kept_of: dict[int, NDArray[np.int32]] = {}
        original, tokens = np.arange(prompt.num_visual, dtype=np.int32), prompt.visual_tokens
        for stage in range(len(chain.selects)):
            if stage == 0:
                self._run_prefix(chain, spans, prompt)
            else:
                self._run_range(chain, spans, stage)
            kept_of[stage] = override(stage, original, spans[stage + 1].num_visual)
            original = original[kept_of[stage]]
            self._host.replace(stage, kept_of[stage], tokens, spans[stage], prompt)
            tokens = tokens.kept(kept_of[stage])
        self._run(chain, spans, first=len(chain.selects))
        return kept_of

    def _repair(
        self, chain: _Chain, spans: list[Span], prompt: DecoderPrompt
    ) -> dict[int, NDArray[np.int32]]:
        """Redo each stage whose parallel NMS had not settled exactly on the host; return the kept indices of these stages."""
        kept_of: dict[int, NDArray[np.int32]] = {}
        results, tokens = self._buffers.results, prompt.visual_tokens
        for stage in range(len(chain.selects)):
            if results.host(f"{graph_io.UNSETTLED}.{stage}")[0] == 0:
                kept = results.host(f"{graph_io.KEPT_INDICES}.{stage}", (spans[stage + 1].num_visual,))
                tokens = tokens.kept(kept)
                continue
            kept_of[stage] = self._host.exact(stage, tokens, spans[stage])
            self._host.replace(stage, kept_of[stage], tokens, spans[stage], prompt)
            self._run(chain, spans, first=stage + 1)
            self._fetch()  # later stages saw other tokens, so their counters have changed
            tokens = tokens.kept(kept_of[stage])
        return kept_of

    def _result(
        self, spans: list[Span], kept_of: dict[int, NDArray[np.int32]], *, has_scores: bool
    ) -> PrefillResult:
        """Return the downloaded results; ``kept_of`` has the kept indices of stages that were selected on the host."""
        results = self._buffers.results
        self._logits = results.host(graph_io.LOGITS)[0].copy()
        result = PrefillResult(logits=self._logits, top=_copied(top_tokens(results)), kept=[])
        result.num_repaired = len(kept_of) if has_scores else 0
        original = np.arange(spans[0].num_visual, dtype=np.int32)
        for stage in range(len(spans) - 1):
            indices = kept_of.get(stage)
            if indices is None:
                indices = results.host(f"{graph_io.KEPT_INDICES}.{stage}", (spans[stage + 1].num_visual,))
            original = original[indices]
            result.kept.append(original)
            if has_scores:
                result.scores.append(
                    results.host(f"{graph_io.SCORES}.{stage}", (spans[stage].num_visual,)).copy()
                )
        return result

    # Decode

    def _enqueue_step(self) -> None:
        """Enqueue all ranges and the head: one by one the first time, later as one captured sequence."""
        # The first run warms up the engines, because lazy work such as compiling kernels cannot be captured.
        self._num_steps += 1
        if self._num_steps == 1:
            self._launch_step()
        elif self._captured is not None:
            self._captured()
        elif all(launch.capturable for launch in self._step):
            self._captured = self._capture_step()
            self._captured()
        else:
            self._launch_step()

    def _capture_step(self) -> Callable[[], None]:
        try:
            return self._device.capture(self._launch_step)
        except BackendError as error:  # TensorRT does not say beforehand whether it can be captured
            self._notes.append(f"decode runs without a CUDA graph, which costs time: {error}")
            return self._launch_step

    def _launch_step(self) -> None:
        for launch in self._step:
            launch.enqueue()


def _copied(top: TopTokens) -> TopTokens:
    """Return a copy that the next step does not overwrite."""
    return TopTokens(ids=top.ids.copy(), logits=top.logits.copy())
