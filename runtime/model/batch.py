"""A step for several answers, where a bundle has the program for it (--batch).

Each answer's rows are in a *slot*: KV caches of its own, which the program "batch" reads for all answers at once. A step reads
the decoder's weights once for all of them. ``answers/running.py`` decides who takes part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from trio_edge.runtime.bundle.graph_io import TOP_IDS, TOP_LOGITS
from trio_edge.runtime.model.answers.sampling import TopTokens
from trio_edge.runtime.model.decoder import CapturedRun, download_logits, no_room

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from trio_edge.runtime.devices.memory import Stack
    from trio_edge.runtime.model.decoder import Decoder
    from trio_edge.runtime.model.programs import Programs


@dataclass(eq=False, slots=True)
class Seat:
    """An answer's slot of a batch, and the rows that are in it."""

    slot: int
    lengths: list[int]
    """Valid rows of each KV cache."""
    next_position: int


@final
class Batch:
    """The program that decodes a token of each of several answers."""

    def __init__(self, programs: Programs) -> None:
        (sizes,) = programs.sizes["batch"]
        self.size = sizes["B"]
        self._programs, self._device, self._memory = programs, programs.device, programs.memory
        self._is_compact = programs.manifest.schedule.positions == "compact"
        launches = programs.at("batch", sizes)
        self._run = CapturedRun(launches)
        ranges = [launch for launch in launches if launch.spec.cache is not None]
        self._new_rows = [launch.new_rows for launch in ranges]
        self._slots = [self._memory.at(one.spec, 0)[2].get(str(one.spec.cache)) for one in ranges]
        """Of each layer range; None, as the new rows, where a range has states only."""
        self._capacities = programs.manifest.kv_capacities
        pairs = [pair for launch in ranges for pair in launch.states]
        self._states = [(*pair, alone) for pair, alone in zip(pairs, programs.states)]
        """New states of a step, those of the slots, and those of an answer alone."""
        self._free = [*range(self.size)]
        self._done = self._device.event()
        host, rows = self._memory.host, (self.size,)
        host("batch.rows", rows)[:] = np.arange(self.size)
        if self._states:
            host("batch.num_rows", rows)[:] = 1
        self._embeds: NDArray[Any] = host("batch.embeds")
        shape = programs.manifest.position_axes, self.size
        self._positions = [host(f"batch.position_ids.{index}", shape) for index, _ in enumerate(ranges)]
        self._past_lengths = [host(f"batch.past_length.{index}", rows) for index, _ in enumerate(ranges)]
        self._top = [host(f"top.{name}")[: self.size] for name in (TOP_IDS, TOP_LOGITS)]

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return bool(self._free)

    def take(self, decoder: Decoder) -> Seat:
        """Enqueue a copy of the decoder's rows to a free slot."""
        seat = Seat(self._free.pop(0), [cache.length for cache in decoder.caches], decoder.next_position)
        for cache, slots, length in zip(decoder.caches, self._slots, seat.lengths):
            self._copy(cache.stack, slots, (0, seat.slot), length)
        for _, slots, alone in self._states:
            self._copy(alone, slots, (0, seat.slot), alone.shape[-2])
        return seat

    def bring_back(self, seat: Seat, decoder: Decoder) -> None:
        """Enqueue a copy of a slot's rows to the decoder, and free the slot."""
        for cache, slots, length in zip(decoder.caches, self._slots, seat.lengths):
            self._copy(slots, cache.stack, (seat.slot, 0), length)
        for _, slots, alone in self._states:
            self._copy(slots, alone, (seat.slot, 0), alone.shape[-2])
        decoder.resume(seat.lengths, next_position=seat.next_position)
        self.free(seat)

    def _copy(
        self,
        source: Stack | None,
        target: Stack | None,
        slot: tuple[int, int],
        num_rows: int,
        first_row: int = 0,
    ) -> None:
        """Enqueue a copy of an answer's rows or states; see ``Stack.copy_slot``."""
        if source is not None and target is not None:
            source.copy_slot(self._device, target, slot=slot, first_row=first_row, num_rows=num_rows)

    def free(self, seat: Seat) -> None:
        """Free a slot."""
        self._free.append(seat.slot)

    def kv_bytes(self, seat: Seat) -> int:
        """Return the bytes of the KV rows in use."""
        rows = zip(self._slots, seat.lengths)
        return sum(slots.bytes_per_row // self.size * length for slots, length in rows if slots is not None)

    def decode(self, embeds: Mapping[Seat, NDArray[Any]]) -> dict[Seat, TopTokens]:
        """Run a token of each answer, whose embeddings [D] are given; return the most likely next tokens.

        Raises:
            ShapeError: If a slot has no room for it.
            BackendError: If a graph fails.
        """
        for capacity, lengths in zip(self._capacities, zip(*(seat.lengths for seat in embeds))):
            if max(lengths) >= capacity:
                raise no_room(self._programs.manifest)
        # The other slots' rows must be finite, and see nothing.
        for array in (self._embeds, *self._positions, *self._past_lengths):
            array[...] = 0
        for seat, row in embeds.items():
            self._embeds[seat.slot] = row
            for positions, past, length in zip(self._positions, self._past_lengths, seat.lengths):
                positions[:, seat.slot] = length if self._is_compact else seat.next_position
                past[seat.slot] = length
        device = self._device
        self._memory.send(device, "batch")
        self._run.enqueue(device, self._programs.notes)
        self._memory.fetch(device, "top")
        self._done.record()
        # As in a step of one answer, the device copies the new rows while the host samples.
        for seat in embeds:
            slot = seat.slot, seat.slot
            for index, (rows, slots) in enumerate(zip(self._new_rows, self._slots)):
                self._copy(rows, slots, slot, 1, first_row=seat.lengths[index])
                seat.lengths[index] += 1
            for new, kept, _ in self._states:
                self._copy(new, kept, slot, new.shape[-2])
            seat.next_position += 1
        self._done.wait()
        ids, logits = self._top
        return {seat: TopTokens(ids[seat.slot].copy(), logits[seat.slot].copy()) for seat in embeds}

    def logits(self, seat: Seat) -> NDArray[np.float32]:
        """Return all logits [V] of an answer in the last step, which are downloaded now."""
        return download_logits(self._device, self._memory, row=seat.slot)
