"""Runs the question's rows of the first layer range separately, after the rows of the images and the text before them.

Up to its last visual token, a prompt does not depend on the question. A bundle exported with --follow-ups runs these rows
first and the question's rows after them, in a program of its own. A further question about the same images reuses the first
rows and runs only its own. Both parts always run separately, so answers are the same bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, final

import numpy as np

from trio_edge.runtime.bundle.manifest import stack_of
from trio_edge.runtime.devices.memory import Recent, copy_tensor

if TYPE_CHECKING:
    from trio_edge.runtime.devices.interface import DeviceTensor
    from trio_edge.runtime.devices.memory import KVCache, Stack
    from trio_edge.runtime.model.decoder_prompt import DecoderPrompt, PromptRows
    from trio_edge.runtime.model.programs import BoundLaunch, Programs


class _Slot(NamedTuple):
    """The first rows of one prompt: their keys and values, the range's outputs for them, and its states after them."""

    cache: Stack | None
    outputs: tuple[DeviceTensor, ...]
    states: tuple[Stack, ...]


@final
class QuestionRows:
    """Sends the question's rows and collects their results, and keeps the first rows of recent prompts."""

    def __init__(self, programs: Programs, *, count: int) -> None:
        """Allocate memory to keep ``count`` prompts."""
        self._programs, self._device, self._memory = programs, programs.device, programs.memory
        first, question = programs.launches["prefill"][0], programs.launches["question"][0]
        self._pairs = [
            (self._memory.tensor(place), self._memory.tensor(question.outputs[name]))
            for name, place in first.outputs.items()
            if stack_of(place) is None and name in question.outputs
        ]
        """The range's outputs for all rows of a prompt, and for the question's rows."""
        assert first.cache is not None, "a layer range has one"
        self._cache: KVCache = programs.caches[first.cache]
        self._states = [self._memory.stack(name) for name in first.states.values()]
        self._recent = Recent([self._slot() for _ in range(count)])

    def _slot(self) -> _Slot:
        manifest = self._programs.manifest
        rows = manifest.max_visual + manifest.text_buckets[-1]
        stack, purpose = self._cache.stack, "kept KV rows"
        cache = None if stack is None else stack.of_rows(self._device, rows, purpose=purpose)
        states = (one.of_rows(self._device, one.shape[-2], purpose="kept states") for one in self._states)
        outputs = tuple(
            whole._replace(address=self._device.allocate(whole.num_bytes, purpose="kept rows"))
            for whole, _ in self._pairs
        )
        return _Slot(cache, outputs, tuple(states))

    def bring_back(self, key: bytes, *, num_rows: int) -> bool:
        """Enqueue copies of a kept prompt's first rows to the range's outputs; return False if they are not kept."""
        if (slot := self._recent.find(key)) is None:
            return False
        self._cache.length = 0
        self._cache.append(self._device, slot.cache, num_rows=num_rows)
        for kept, state in zip(slot.states, self._states):
            kept.copy_whole(self._device, state)
        for (whole, _), kept in zip(self._pairs, slot.outputs):
            copy_tensor(self._device, whole.rows(0, num_rows), kept.rows(0, num_rows))
        return True

    def keep(self, key: bytes, *, num_rows: int) -> None:
        """Enqueue copies of the first rows from the range's outputs; a prompt without a key is not kept."""
        if (slot := self._recent.take(key)) is None:
            return
        if self._cache.stack is not None and slot.cache is not None:
            self._cache.stack.copy_to(self._device, slot.cache, first_row=0, num_rows=num_rows)
        for kept, state in zip(slot.states, self._states):
            state.copy_whole(self._device, kept)
        for (whole, _), kept in zip(self._pairs, slot.outputs):
            copy_tensor(self._device, kept.rows(0, num_rows), whole.rows(0, num_rows))

    def send(self, prompt: DecoderPrompt, rows: PromptRows) -> BoundLaunch:
        """Enqueue the inputs of the rows after the last visual token, and return their launch."""
        first = rows.num_before
        count = rows.length - first
        bucket = self._programs.rows_for("question", count)
        ids = np.zeros((len(prompt.positions.ids), bucket), np.int32)
        ids[:, :count] = prompt.positions.ids[:, first : rows.length]
        values = {
            "question.position_ids": ids,
            "question.past_length": np.array([first], np.int32),
            "question.num_rows": np.array([count], np.int32),
        }
        (launch,) = self._programs.at("question", {"T": bucket})
        self._memory.send(self._device, "question", values)
        embeds = self._memory.tensor("question.embeds")
        copy_tensor(
            self._device, embeds.rows(0, count), self._memory.tensor("rows.embeds").rows(first, count)
        )
        self._device.clear(embeds.rows(count, bucket - count))
        return launch

    def finish(self, launch: BoundLaunch, rows: PromptRows) -> None:
        """Enqueue copies of the results to their place after the first rows."""
        first, count = rows.num_before, rows.length - rows.num_before
        launch.keep(self._device, num_rows=count)
        for whole, own in self._pairs:
            copy_tensor(self._device, whole.rows(first, count), own.rows(0, count))
            self._device.clear(whole.rows(rows.length, rows.padded - rows.length))
