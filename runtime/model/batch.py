"""Several answers under way, which decode together where a bundle has the program for it (--batch).

All answers share the graphs, and the decoder's KV caches, which a prompt fills. The answer that has them decodes alone, as
if there were no batch: with drafts, and several rows a step. Once another prompt comes, its rows move to a *slot*: KV caches of
its own, which the program "batch" reads for all answers at once. A step reads the decoder's weights once for all of them.

An answer whose next token is asked for takes along each other one whose last tokens were taken: these find their next tokens
ready. So no caller needs to know of the others, and an answer is at most one step ahead of its reader.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, final

import numpy as np

from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.bundle.graph_io import TOP_IDS, TOP_LOGITS
from trio_edge.runtime.model.decoder import CapturedRun, download_logits
from trio_edge.runtime.model.sampling import TopTokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from trio_edge.runtime.answer import Generation
    from trio_edge.runtime.devices.memory import Stack
    from trio_edge.runtime.model.decoder import Decoder
    from trio_edge.runtime.model.levels import Level
    from trio_edge.runtime.model.next_tokens import NextTokens
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
        places = ((launch, launch.spec.cache) for launch in launches)
        ranges = [
            (launch.new_rows, self._memory.at(launch.spec, 0)[2][name]) for launch, name in places if name
        ]
        self._new_rows: list[Stack] = [new for new, _ in ranges if new is not None]
        self._slots: list[Stack] = [slots for _, slots in ranges]
        self._free = [*range(self.size)]
        self._done = self._device.event()
        host, rows = self._memory.host, (self.size,)
        host("batch.rows", rows)[:] = np.arange(self.size)
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
            cache.stack.copy_slot(self._device, slots, slot=(0, seat.slot), first_row=0, num_rows=length)
        return seat

    def bring_back(self, seat: Seat, decoder: Decoder) -> None:
        """Enqueue a copy of a slot's rows to the decoder, and free the slot."""
        for cache, slots, length in zip(decoder.caches, self._slots, seat.lengths):
            slots.copy_slot(self._device, cache.stack, slot=(seat.slot, 0), first_row=0, num_rows=length)
        decoder.resume(seat.lengths, next_position=seat.next_position)
        self.free(seat)

    def free(self, seat: Seat) -> None:
        """Free a slot."""
        self._free.append(seat.slot)

    def kv_bytes(self, seat: Seat) -> int:
        """Return the bytes of the KV rows in use."""
        rows = zip(self._slots, seat.lengths)
        return sum(slots.bytes_per_row // self.size * length for slots, length in rows)

    def decode(self, embeds: Mapping[Seat, NDArray[Any]]) -> dict[Seat, TopTokens]:
        """Run a token of each answer, whose embeddings [D] are given; return the most likely next tokens.

        Raises:
            ShapeError: If a slot has no room for it.
            BackendError: If a graph fails.
        """
        for slots, lengths in zip(self._slots, zip(*(seat.lengths for seat in embeds))):
            if max(lengths) >= slots.shape[-2]:
                raise ShapeError(
                    f"decode: expected at most {self._programs.manifest.max_new_tokens} new tokens, the KV caches are full;"
                    " export with a larger --max-new-tokens"
                )
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
            for index, (new, slots) in enumerate(zip(self._new_rows, self._slots)):
                slot, first = (seat.slot, seat.slot), seat.lengths[index]
                new.copy_slot(device, slots, slot=slot, first_row=first, num_rows=1)
                seat.lengths[index] += 1
            seat.next_position += 1
        self._done.wait()
        ids, logits = self._top
        return {seat: TopTokens(ids[seat.slot].copy(), logits[seat.slot].copy()) for seat in embeds}

    def logits(self, seat: Seat) -> NDArray[np.float32]:
        """Return all logits [V] of an answer in the last step, which are downloaded now."""
        return download_logits(self._device, self._memory, row=seat.slot)


@dataclass(eq=False, slots=True)
class Running:
    """An answer under way."""

    level: Level
    answer: NextTokens
    generation: Generation
    seat: Seat | None = None
    """None while its rows are in the decoder's KV caches."""
    found: list[int] = field(default_factory=list)
    """Its next tokens, which were found in a step for another answer."""
    failure: ShapeError | None = None
    """Why that step found none."""
    is_over: bool = False
    """Whether nobody will ask for more."""

    @property
    def can_go_on(self) -> bool:
        """Whether its last tokens were taken, and more may come."""
        has_ended = self.is_over or self.answer.is_over or self.generation.is_cancelled
        return not (self.found or self.failure or has_ended)


@final
class Answers:
    """The answers under way, oldest first. Not thread-safe."""

    def __init__(self) -> None:
        self._running: list[Running] = []
        self.owner: object = None
        """Whose rows are in the decoder's KV caches: a ``Running``, or the plan of questions."""

    def make_way(self, owner: object = None) -> None:
        """Give the decoder's KV caches to a new owner. The answer that has them takes a seat, or cannot go on."""
        before, self.owner = self.owner, owner
        self._keep([one for one in self._running if not one.is_over])
        if isinstance(before, Running) and before in self._running:
            batch = before.level.batch
            if batch is not None and batch.has_room:
                before.seat = batch.take(before.level.decoder)
            else:
                self._running.remove(before)

    def start(self, level: Level, answer: NextTokens, generation: Generation) -> Running:
        """Return a new answer, whose prompt has just run: it owns the KV caches.

        Answers at other levels, and the oldest ones if there are too many, cannot go on.
        """
        others = [one for one in self._running if one.level is level]
        size = 1 if level.batch is None else level.batch.size
        self.owner = running = Running(level, answer, generation)
        self._keep([*others, running][-size:])
        return running

    def next(self, running: Running) -> list[int]:
        """Return the next tokens of an answer.

        Raises:
            ShapeError: If it cannot go on, because others were started, or its rules allow no token.
            BackendError: If a graph fails.
        """
        self._keep([one for one in self._running if not one.is_over])
        if running not in self._running:
            raise ShapeError(
                f"answer: expected {_at_a_time(running.level)}, another was started; finish streaming first"
            )
        if not running.found and running.failure is None:
            self._advance(running)
        if running.failure is not None:
            raise running.failure
        found, running.found = running.found, []
        return found

    def _advance(self, running: Running) -> None:
        """Find the next tokens of an answer, alone or together with the others that can go on."""
        level, batch = running.level, running.level.batch
        others = [one for one in self._running if one is not running and one.can_go_on]
        is_last = len(self._running) == 1 and (self.owner is None or isinstance(self.owner, Running))
        if batch is not None and running.seat is not None and is_last:
            batch.bring_back(running.seat, level.decoder)
            running.seat, self.owner = None, running
        if batch is None or (running.seat is None and not others):
            running.found = running.answer.after(level.decoder, running.generation.statistics)
            return
        while not running.found and running.failure is None:
            self._step(batch, [running, *(one for one in others if one.can_go_on)])

    def _step(self, batch: Batch, together: list[Running]) -> None:
        start, seats = time.perf_counter(), dict[Running, Seat]()
        for one in together:
            if one.seat is None:
                one.seat, self.owner = batch.take(one.level.decoder), None
            seats[one] = one.seat
        tops = batch.decode({seat: one.answer.waiting for one, seat in seats.items()})
        milliseconds = 1e3 * (time.perf_counter() - start)
        for one, seat in seats.items():
            statistics = one.generation.statistics
            statistics.kv_bytes = batch.kv_bytes(seat)
            logits = partial(batch.logits, seat)
            try:
                one.found = one.answer.ran(tops[seat], logits, statistics, milliseconds=milliseconds)
            except ShapeError as error:  # it belongs to this answer alone
                one.failure = error

    def _keep(self, kept: list[Running]) -> None:
        """Go on with ``kept`` only."""
        for one in self._running:
            if one not in kept and one.seat is not None and one.level.batch is not None:
                one.level.batch.free(one.seat)
        self._running = kept


def _at_a_time(level: Level) -> str:
    size = 1 if level.batch is None else level.batch.size
    return "one answer at a time" if size == 1 else f"at most {size} answers at a time, at one level"
