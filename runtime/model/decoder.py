"""The reduced decoder: runs the bundle's programs on one stream of a device, from embeddings to the likeliest tokens.

The host does not wait for the device before the first token: lengths and positions follow from the known K's and are sent
ahead, hidden states and KV rows stay on the device, and all results come back in one copy. A decode step sends one block,
runs its program as one captured sequence, and waits once, for the most likely tokens. A step may have several rows: a token
and drafts of those after it, which ``skip`` takes back.

The decoder knows embeddings and rows, but no images, prompts or sampling. docs/runtime.md describes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np

from trio_edge.runtime.bundle.errors import BackendError, ShapeError
from trio_edge.runtime.bundle.graph_io import (
    KEPT_INDICES,
    KEPT_POSITIONS,
    KEPT_VISUAL_ROWS,
    LAST_HIDDEN,
    SCORES,
    TOP_IDS,
    TOP_LOGITS,
    UNSETTLED,
)
from trio_edge.runtime.devices.interface import DeviceTensor
from trio_edge.runtime.devices.memory import copy_tensor
from trio_edge.runtime.model.answers.sampling import TopTokens
from trio_edge.runtime.model.host_selection import HostSelection, drop_all
from trio_edge.runtime.model.programs import Timeline
from trio_edge.runtime.model.question_rows import QuestionRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.devices.interface import Device
    from trio_edge.runtime.devices.memory import KVCache, Memory, Stack
    from trio_edge.runtime.model.decoder_prompt import DecoderPrompt, PromptRows
    from trio_edge.runtime.model.host_selection import SelectorOverride
    from trio_edge.runtime.model.programs import BoundLaunch, Programs


@dataclass(slots=True)
class PrefillResult:
    """Result of a prefill, apart from the filled KV caches."""

    rows: PromptRows
    """The rows that entered each layer range."""
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


class HiddenStates(NamedTuple):
    """The rows that left the last decoder layer in a prefill, after the final norm."""

    values: NDArray[Any]
    """[R, D] in the bundle's type: text and kept visual tokens in the prompt's order, without padding."""
    positions: NDArray[np.int32]
    """[A, R], position ids of the rows; A is 1, or 3 with M-RoPE."""
    visual_rows: NDArray[np.int32]
    """[K], row of each kept visual token."""
    kept: NDArray[np.int32]
    """[K], their indices into the visual tokens that entered the decoder."""


@final
class Decoder:
    """Runs prefill and decode of one sequence. Not thread-safe: it owns one set of KV caches."""

    def __init__(self, programs: Programs, *, keep_images: int = 0) -> None:
        """Bind the decode step; with follow-ups, the rows of ``keep_images`` prompts up to the last visual token are kept.

        Raises:
            BackendError: If the device has too little memory.
        """
        manifest = programs.manifest
        self._programs, self._device, self._memory = programs, programs.device, programs.memory
        self._manifest, self._schedule = manifest, manifest.schedule
        self.caches: list[KVCache] = [*programs.caches.values()]
        """One for each layer range, in order."""
        self._selections = programs.launches.get("exact", ())
        """The selection of each stage, with the places of its select graph."""
        has_follow_ups = "question" in programs.launches
        self._question = QuestionRows(programs, count=keep_images) if has_follow_ups else None
        self.can_branch = "branch" in programs.launches
        """Whether the bundle has the program of ``branch``."""
        self._stages = [launch.stage for launch in programs.launches["prefill"] if launch.cache is not None]
        """Selections before each layer range."""
        self._before: list[int] = []
        """Rows before the text after the last visual token in each KV cache, after a prefill."""
        self._first_position = 0
        """Position of the first row after them."""
        shape = (manifest.text_buckets[-1], manifest.dimensions.hidden_size)
        num_bytes = shape[0] * shape[1] * np.dtype(manifest.dtype).itemsize
        text = self._device.allocate_pinned(num_bytes, purpose="text embeddings")
        self._text: NDArray[Any] = text.view(manifest.dtype).reshape(shape)
        """Pinned rows for all text of a prompt in order."""
        self.timeline = Timeline(self._device)
        """The device's time in each graph of the last prefill."""
        self.prefix_was_kept = False
        """Whether the first range ran only the question's rows in the last prefill."""
        self._ranges: list[BoundLaunch] = []
        """The layer ranges of the last prefill."""
        self._states_before: list[Stack] = []
        """Memory for the states before the text after the last visual token; valid if ``_has_states_before``."""
        self._has_states_before = False
        self._steps: dict[int, _Step] = {}
        """By number of tokens, of which several may share a step."""
        self.max_rows = programs.sizes["decode"][-1]["T"]
        """Most rows of a decode step."""
        self._places: list[tuple[list[int], int]] = []
        """Remembered rows of each KV cache, and positions."""
        self._copies: list[list[Stack]] = []
        """Memory for the states of each of them; more places than ever before get new memory."""
        self._done = self._device.event()
        self._logits: NDArray[np.float32] | None = None
        self._next_position = 0
        self._start: object = None
        """The first layer range of the last prefill, with its memory; None once its outputs are gone."""

    @property
    def next_position(self) -> int:
        """Position of the next token, unless positions are compact."""
        return self._next_position

    def resume(self, lengths: Sequence[int], *, next_position: int) -> None:
        """Go on after the first rows of the KV caches, which were written there: ``lengths`` are those of each."""
        for cache, length in zip(self.caches, lengths):
            cache.length = length
        self._next_position, self._start = next_position, None

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV rows in use."""
        return sum(cache.num_bytes for cache in self.caches)

    def prefill(
        self,
        prompt: DecoderPrompt,
        *,
        override: SelectorOverride | None = None,
        after: Decoder | None = None,
    ) -> PrefillResult:
        """Run the prompt through all stages and fill the KV caches.

        ``override`` selects on the host instead of the select graphs, for comparisons. ``after`` is the decoder of another
        level, in the same memory, that has just run the same prompt: the first layer range's rows are taken from there.

        Raises:
            ShapeError: If the prompt does not fit its bucket.
            BackendError: If a graph fails.
        """
        rows = prompt.rows(self._manifest, keep_none=override is drop_all)
        launches = self._programs.at("prefill", {"N": prompt.max_visual, "T": prompt.text_bucket})
        self.timeline.recorded.clear()
        self.prefix_was_kept = False
        num_after = rows.length - rows.num_before
        self._before = [rows.spans[stage].length - num_after for stage in self._stages]
        self._next_position = prompt.positions.next
        self._first_position = self._next_position - num_after
        self._memory.send(self._device, "prompt", rows.values | self._num_rows(rows))
        self._start = launches[0].spec.runs, launches[0].tensors, self.caches[0].capacity
        self._ranges = [launch for launch in launches if launch.cache is not None]
        self._places.clear()  # those of a question that failed
        self._has_states_before = False
        if after is not None and self._start == after._start:
            self.caches[0].length = rows.spans[0].length
            launches = launches[1:]
        else:
            self._send(prompt, rows)
        kept_of: dict[int, NDArray[np.int32]] = {}
        if override is not None:
            kept_of = self._run_overridden(launches, prompt, rows, override)
        else:
            self._run(launches, prompt, rows)
        self._memory.fetch(self._device, "results")
        self._done.record()
        self._done.wait()
        unsettled = [self._memory.host(selection.outputs[UNSETTLED]) for selection in self._selections]
        if override is None and any(count[0] for count in unsettled):
            kept_of = self._repair(launches, prompt, rows, unsettled)
        return self._result(rows, kept_of, has_scores=override is None)

    def hidden_states(self, result: PrefillResult) -> HiddenStates:
        """Return the last hidden states of the prefill that has just run, with this result.

        Raises:
            ShapeError: If the bundle does not return them.
        """
        place, rows = f"hidden.{LAST_HIDDEN}", result.rows
        if not any(place in launch.outputs.values() for launch in self._programs.launches["prefill"]):
            raise ShapeError(
                "hidden states: expected a bundle with them, got one for answers only; export with --outputs hidden"
            )
        length, num_visual = rows.spans[-1].length, rows.spans[-1].num_visual
        values = self._memory.fetch_one(
            self._device, place, (1, length, self._manifest.dimensions.hidden_size)
        )
        positions, visual_rows = rows.values["prompt.position_ids"], rows.values["prompt.visual_rows"]
        if self._selections:
            outputs, text = self._selections[-1].outputs, rows.padded - rows.spans[0].rows
            shape = self._manifest.position_axes, rows.spans[-1].rows + text
            positions, visual_rows = np.empty(shape, np.int32), np.empty(rows.spans[-1].rows, np.int32)
            for array, name in ((positions, KEPT_POSITIONS), (visual_rows, KEPT_VISUAL_ROWS)):
                self._device.download(array, self._memory.tensor(outputs[name], array.shape))
        self._device.synchronize()
        kept = result.kept[-1] if result.kept else np.arange(num_visual, dtype=np.int32)
        return HiddenStates(
            values[0].copy(), positions[:, :length].copy(), visual_rows[:num_visual].copy(), kept
        )

    def branch(self, text: NDArray[Any]) -> NDArray[np.float32]:
        """Put other text in the place of the prompt's after its last visual token; return the last row's logits [V].

        ``text`` has embeddings [Q, D]. The selection of the last prefill stays, and decoding goes on after the new text.

        Raises:
            ShapeError: If there was no prefill before, or the text has no row or more than the largest bucket.
            BackendError: If a graph fails.
        """
        buckets, count = self._manifest.text_buckets, len(text)
        if not self._before or not 1 <= count <= buckets[-1]:
            raise ShapeError(f"branch: expected 1..{buckets[-1]} rows after a prefill, got {count}")
        device, memory, axes = self._device, self._memory, self._manifest.position_axes
        bucket = self._programs.rows_for("branch", count)
        launches = self._programs.at("branch", {"T": bucket})
        embeds = np.zeros((1, bucket, text.shape[1]), self._manifest.dtype)
        embeds[0, :count] = text
        values: dict[str, NDArray[Any]] = {
            "branch.embeds": embeds,
            "branch.last_row": np.array([count - 1], np.int32),
            "branch.num_rows": np.array([count], np.int32),
        }
        self._bring_back_states()
        is_compact = self._schedule.positions == "compact"
        for index, (cache, before, stage) in enumerate(zip(self.caches, self._before, self._stages)):
            first = before if is_compact and stage else self._first_position
            values[f"branch.position_ids.{index}"] = np.tile(
                np.arange(first, first + bucket, dtype=np.int32), (axes, 1)
            )
            values[f"branch.past_length.{index}"] = np.array([before], np.int32)
            cache.length = before
        memory.send(device, "branch", values)
        self.timeline.recorded.clear()
        for launch in launches:
            self.timeline.enqueue(launch.spec.runs, launch.launch)
            launch.keep(device, num_rows=count)
        self._next_position = self._first_position + count
        memory.fetch(device, "results")
        device.synchronize()
        self._logits = memory.host("results.logits")[0].copy()
        return self._logits

    def _bring_back_states(self) -> None:
        """Enqueue what brings back the states before the text after the last visual token.

        A prefill does not stop there. So its layer ranges run once more, up to this row, for the first text after it.
        """
        states, device = self._programs.states, self._device
        if not states:
            return
        if self._has_states_before:
            for before, state in zip(self._states_before, states):
                before.copy_whole(device, state)
            return
        counts = {f"prompt.num_rows.{i}": np.array([rows], np.int32) for i, rows in enumerate(self._before)}
        self._memory.send(device, "prompt", counts)
        for launch, rows in zip(self._ranges, self._before):
            self._run_range(launch, num_rows=rows)
        if not self._states_before:
            self._states_before = [one.of_rows(device, one.shape[-2], purpose="states") for one in states]
        for state, before in zip(states, self._states_before):
            state.copy_whole(device, before)
        self._has_states_before, self._start = True, None

    @property
    def room(self) -> int:
        """Rows that still fit the KV caches."""
        return min(cache.capacity - cache.length for cache in self.caches)

    def decode(self, embeds: NDArray[Any]) -> list[TopTokens]:
        """Run new tokens through all layers, each after the ones before; return the most likely next tokens of each.

        ``embeds`` are those of 1 to ``max_rows`` tokens [R, D].

        Raises:
            ShapeError: If the KV caches have no room for them.
            BackendError: If a graph fails.
        """
        count = len(embeds)
        if any(cache.length + count > cache.capacity for cache in self.caches):
            raise no_room(self._manifest)
        step = self._steps.get(count)
        if step is None:
            step = self._steps[count] = self._new_step(count)
        device, is_compact = self._device, self._schedule.positions == "compact"
        self._start = None  # the step writes over the prompt's first rows
        step.embeds[:count] = embeds
        if count < len(step.rows):
            step.embeds[count:] = 0  # masked rows must be finite
        for cache, positions, past_length in zip(self.caches, step.positions, step.past_lengths):
            np.add(step.rows, cache.length if is_compact else self._next_position, out=positions)
            past_length[0] = cache.length
        self._memory.send(device, "step")
        step.run.enqueue(device, self._programs.notes)
        self._memory.fetch(device, "top")
        self._done.record()
        # The device copies the new rows while the host samples. Their place changes with every token, so the copy cannot be
        # captured.
        for launch in step.launches:
            launch.keep(device, num_rows=count)
        self._next_position += count
        self._logits = None
        self._done.wait()
        ids, logits = step.top
        return [TopTokens(ids[row].copy(), logits[row].copy()) for row in range(count)]

    def remember(self) -> None:
        """Remember this place for ``back``, with a copy of all states."""
        depth = len(self._places)
        if depth == len(self._copies):
            new = (
                one.of_rows(self._device, one.shape[-2], purpose="states") for one in self._programs.states
            )
            self._copies.append([*new])
        for state, copy in zip(self._programs.states, self._copies[depth]):
            state.copy_whole(self._device, copy)
        self._places.append(([cache.length for cache in self.caches], self._next_position))

    def back(self) -> None:
        """Go back to the last remembered place, and forget it."""
        lengths, self._next_position = self._places.pop()
        for cache, length in zip(self.caches, lengths):
            cache.length = length
        for state, copy in zip(self._programs.states, self._copies[len(self._places)]):
            copy.copy_whole(self._device, state)

    def skip(self, count: int) -> None:
        """Go on as if ``count`` more tokens had been decoded, to time later ones, or fewer, as after wrong drafts.

        States stay as they are: a bundle with some has no drafts.

        Raises:
            ShapeError: If the KV caches have no room for as many.
        """
        if count > self.room:
            raise ShapeError(
                f"decode: expected to skip at most {self.room} rows, the rest of the KV caches, got {count};"
                " export with a larger --max-new-tokens"
            )
        for cache in self.caches:
            cache.length += count
        self._next_position += count

    def logits(self, row: int = 0) -> NDArray[np.float32]:
        """Return all logits [V] of the last prefill, or of a row of the last decode step, which are downloaded now."""
        if self._logits is not None:
            return self._logits
        return download_logits(self._device, self._memory, row=row)

    def _new_step(self, count: int) -> _Step:
        rows = self._programs.rows_for("decode", count)
        same = (step for step in self._steps.values() if len(step.rows) == rows)
        return next(same, None) or _Step(self._programs, rows)

    # Prefill

    def _send(self, prompt: DecoderPrompt, rows: PromptRows) -> None:
        """Enqueue copies of the rows of text and visual tokens."""
        device, memory = self._device, self._memory
        embeds, text = memory.tensor("rows.embeds"), self._text
        text[: len(prompt.text)] = prompt.text
        row, sent = 0, 0
        # Text lies before, between and after the runs.
        for run in (*rows.runs, range(rows.length, rows.length)):
            if count := run.start - row:
                device.upload(embeds.rows(row, count), text[sent : sent + count])
            row, sent = run.stop, sent + count
        self._place(prompt.visual, embeds, rows.runs)
        # Padding rows still hold an earlier prompt. Masked rows must be finite, and answers must not depend on history.
        device.clear(embeds.rows(rows.length, rows.padded - rows.length))
        for layer in range(self._manifest.num_deepstack):
            plane = memory.tensor(f"rows.deepstack.{layer}")
            device.clear(plane.rows(0, rows.padded))
            if prompt.planes:
                self._place(prompt.planes[layer], plane, rows.runs)

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

    def _run(self, launches: Iterable[BoundLaunch], prompt: DecoderPrompt, rows: PromptRows) -> None:
        """Enqueue launches in order; those with a KV cache fill it."""
        for label, group in groupby(launches, key=lambda launch: launch.spec.label):
            together = list(group)
            if together[0].cache is None:
                self.timeline.enqueue(label, *(launch.launch for launch in together))
                continue
            for launch in together:
                if launch.cache is self.caches[0] and (question := self._question_of(rows)) is not None:
                    self._run_in_two_parts(launch, question, prompt, rows)
                else:
                    self._run_range(launch, num_rows=rows.spans[launch.spec.stage].length)

    def _question_of(self, rows: PromptRows) -> QuestionRows | None:
        """Return what runs the rows after the last visual token in the first range, if it runs those before them first."""
        return self._question if 0 < rows.num_before < rows.length else None

    def _num_rows(self, rows: PromptRows) -> dict[str, NDArray[np.int32]]:
        """Return the real rows of each layer range, which states stop at."""
        counts = [rows.spans[stage].length for stage in self._stages]
        if self._question_of(rows) is not None:
            counts[0] = rows.num_before
        return {f"prompt.num_rows.{index}": np.array([count], np.int32) for index, count in enumerate(counts)}

    def _run_in_two_parts(
        self, launch: BoundLaunch, question: QuestionRows, prompt: DecoderPrompt, rows: PromptRows
    ) -> None:
        """Enqueue the first range for the rows before the question, which may be kept, then for the question's."""
        first = rows.num_before
        self.prefix_was_kept = question.bring_back(prompt.key, num_rows=first)
        if not self.prefix_was_kept:
            self._run_range(launch, num_rows=first)
            question.keep(prompt.key, num_rows=first)
        rest = question.send(prompt, rows)
        self.timeline.enqueue(rest.spec.label, rest.launch)
        question.finish(rest, rows)

    def _run_range(self, launch: BoundLaunch, *, num_rows: int) -> None:
        """Enqueue a layer range and a copy of its first ``num_rows`` KV rows to the cache."""
        self.timeline.enqueue(launch.spec.label, launch.launch)
        if launch.cache is not None:
            launch.cache.length = 0
        launch.keep(self._device, num_rows=num_rows)

    def _run_overridden(
        self,
        launches: Sequence[BoundLaunch],
        prompt: DecoderPrompt,
        rows: PromptRows,
        override: SelectorOverride,
    ) -> dict[int, NDArray[np.int32]]:
        """Run the launches with all selections on the host and return the kept indices of each stage."""
        kept_of: dict[int, NDArray[np.int32]] = {}
        host, spans, tokens = HostSelection(self._programs), rows.spans, rows.tokens
        original = np.arange(spans[0].num_visual, dtype=np.int32)
        for stage, selection in enumerate(self._selections):
            is_range = [one for one in launches if one.spec.stage == stage and one.cache is not None]
            self._run(is_range, prompt, rows)
            kept = kept_of[stage] = override(stage, original, spans[stage + 1].num_visual)
            original = original[kept]
            host.replace(selection, kept, tokens, spans[stage], num_text=prompt.text_bucket)
            tokens = tokens.kept(kept)
        self._run(_after(launches, len(self._selections) - 1), prompt, rows)
        return kept_of

    def _repair(
        self,
        launches: Sequence[BoundLaunch],
        prompt: DecoderPrompt,
        rows: PromptRows,
        unsettled: Sequence[NDArray[np.int32]],
    ) -> dict[int, NDArray[np.int32]]:
        """Redo each stage whose parallel NMS had not settled exactly on the host; return the kept indices of these stages.

        ``unsettled`` are views of each stage's counter.
        """
        kept_of: dict[int, NDArray[np.int32]] = {}
        memory, spans, tokens = self._memory, rows.spans, rows.tokens
        for stage, selection in enumerate(self._selections):
            if not any(count[0] for count in unsettled[stage:]):
                break
            if unsettled[stage][0] == 0:
                shape = (spans[stage + 1].num_visual,)
                tokens = tokens.kept(memory.host(selection.outputs[KEPT_INDICES], shape))
                continue
            host = HostSelection(self._programs)
            kept = kept_of[stage] = host.exact(selection, tokens, spans[stage])
            host.replace(selection, kept, tokens, spans[stage], num_text=prompt.text_bucket)
            self._run(_after(launches, stage), prompt, rows)
            # Later stages saw other tokens, so their counters have changed.
            memory.fetch(self._device, "results")
            self._device.synchronize()
            tokens = tokens.kept(kept)
        return kept_of

    def _result(
        self, rows: PromptRows, kept_of: dict[int, NDArray[np.int32]], *, has_scores: bool
    ) -> PrefillResult:
        """Return the downloaded results; ``kept_of`` has the kept indices of stages that were selected on the host."""
        memory, spans = self._memory, rows.spans
        self._logits = memory.host("results.logits")[0].copy()
        ids, logits = (memory.host(f"results.{name}").reshape(-1).copy() for name in (TOP_IDS, TOP_LOGITS))
        result = PrefillResult(rows, self._logits, TopTokens(ids, logits), kept=[])
        result.num_repaired = len(kept_of) if has_scores else 0
        original = np.arange(spans[0].num_visual, dtype=np.int32)
        for stage, selection in enumerate(self._selections):
            indices = kept_of.get(stage)
            if indices is None:
                indices = memory.host(selection.outputs[KEPT_INDICES], (spans[stage + 1].num_visual,))
            original = original[indices]
            result.kept.append(original)
            if has_scores:
                scores = memory.host(selection.outputs[SCORES], (spans[stage].num_visual,))
                result.scores.append(scores.copy())
        return result


@final
class _Step:
    """The decode program at one number of rows, and views of its inputs and results on the host."""

    def __init__(self, programs: Programs, num_rows: int) -> None:
        self.launches = programs.at("decode", {"T": num_rows})
        manifest, host = programs.manifest, programs.memory.host
        ranges = range(len(programs.caches))
        self.rows: NDArray[np.int32] = host("step.rows", (num_rows,))
        self.rows[:] = np.arange(num_rows)
        if manifest.dimensions.linear is not None:
            host("step.num_rows")[0] = num_rows
        self.embeds: NDArray[Any] = host("step.embeds", (num_rows, manifest.dimensions.hidden_size))
        shape = manifest.position_axes, num_rows
        self.positions = [host(f"step.position_ids.{index}", shape) for index in ranges]
        self.past_lengths = [host(f"step.past_length.{index}") for index in ranges]
        self.top = tuple(host(f"top.{name}")[:num_rows] for name in (TOP_IDS, TOP_LOGITS))
        self.run = CapturedRun(self.launches)


@final
class CapturedRun:
    """Launches that run in the same way many times."""

    def __init__(self, launches: Sequence[BoundLaunch]) -> None:
        self._launches = launches
        # A method would hold this object in a cycle, and its memory until the garbage is collected.
        self._run: Callable[[], None] = partial(_enqueue, launches)
        self._num_runs = 0

    def enqueue(self, device: Device, notes: list[str]) -> None:
        """Enqueue them: launch by launch the first time, later as one captured sequence."""
        # The first run warms up the engines, because lazy work such as compiling kernels cannot be captured.
        self._num_runs += 1
        if self._num_runs == 2 and all(launch.launch.capturable for launch in self._launches):
            try:
                self._run = device.capture(self._run)
            except BackendError as error:  # TensorRT does not say beforehand whether it can be captured
                notes.append(f"decode runs without a CUDA graph, which costs time: {error}")
        self._run()


def no_room(manifest: Manifest) -> ShapeError:
    """Return the error of full KV caches."""
    return ShapeError(
        f"decode: expected at most {manifest.max_new_tokens} new tokens, the KV caches are full; export with a larger"
        " --max-new-tokens"
    )


def download_logits(device: Device, memory: Memory, *, row: int) -> NDArray[np.float32]:
    """Return all logits [V] of a row of the last decode step."""
    place = "logits.logits"
    found: NDArray[np.float32] = memory.host(place)[row]
    device.download(found, memory.tensor(place).rows(row, 1))
    device.synchronize()
    return found.copy()


def _enqueue(launches: Iterable[BoundLaunch]) -> None:
    for launch in launches:
        launch.launch.enqueue()


def _after(launches: Iterable[BoundLaunch], stage: int) -> list[BoundLaunch]:
    """Return the launches after the selection of ``stage``."""
    return [launch for launch in launches if launch.spec.stage > stage]
