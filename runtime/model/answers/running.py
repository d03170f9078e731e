"""The answers under way: which one has the decoder's KV caches, and which decode together.

All answers share the graphs, and the decoder's KV caches, which a prompt fills. The answer that has them decodes alone, as
if there were no batch: with drafts, and several rows a step. Once another prompt comes, its rows move to a slot of the batch.

An answer whose next token is asked for takes along each other one whose last tokens were taken: these find their next tokens
ready. So no caller needs to know of the others, and an answer is at most one step ahead of its reader.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, final

from trio_edge.runtime.bundle.errors import BackendError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trio_edge.runtime.answer import Generation
    from trio_edge.runtime.devices.interface import LoadedGraphs
    from trio_edge.runtime.model.answers.next_tokens import NextTokens
    from trio_edge.runtime.model.batch import Batch, Seat
    from trio_edge.runtime.model.levels import Level


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
    has_reader: bool = True
    """Whether somebody may ask for more."""

    @property
    def can_go_on(self) -> bool:
        """Whether its last tokens were taken, and more may come."""
        has_ended = self.answer.is_over or self.generation.is_cancelled
        return self.has_reader and not (self.found or self.failure or has_ended)

    @property
    def needs_rows(self) -> bool:
        """Whether its rows may be read again, or its next tokens are not taken yet."""
        return self.has_reader and (bool(self.found) or not self.answer.is_over)


@final
class RunningAnswers:
    """The answers under way, oldest first, and the graphs that they share. Only ``turn`` and ``close`` are thread-safe."""

    def __init__(self, graphs: LoadedGraphs, level: Level) -> None:
        self._graphs, self._running = graphs, list[Running]()
        self.owner: object = None
        """Whose rows are in the decoder's KV caches: a ``Running``, or the plan of questions."""
        self.last = level
        """The level whose rows these are."""
        self._is_open, self._process = True, os.getpid()
        self._lock = threading.Lock()
        """Held while the graphs run, because all answers share the graphs' memory, which ``close`` releases."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other answer runs the graphs.

        Raises:
            BackendError: As ``check_open``.
        """
        with self._lock:
            self.check_open()
            yield

    def check_open(self) -> None:
        """Raise BackendError if the graphs are closed, or were loaded by another process."""
        if not self._is_open:
            raise BackendError("pipeline: expected an open one, got a closed one; load the bundle again")
        # A fork lacks the threads of the graphs and would wait for them forever.
        if os.getpid() != self._process:
            raise BackendError(
                "pipeline: expected the process that loaded it, got a fork of it; load the bundle in each process"
            )

    def close(self) -> None:
        """Release all graphs and device memory; closing again does nothing."""
        with self._lock:
            self._is_open = False
            self._graphs.close()

    def make_way(self, owner: object = None) -> None:
        """Give the decoder's KV caches to a new owner. The answer that has them takes a seat, or cannot go on."""
        before, self.owner = self.owner, owner
        self._keep([one for one in self._running if one.needs_rows])
        if isinstance(before, Running) and before in self._running:
            batch = before.level.batch
            if batch is not None and batch.has_room:
                before.seat = batch.take(before.level.decoder)
            else:
                self._running.remove(before)

    def start(self, level: Level, answer: NextTokens, generation: Generation) -> Running:
        """Return a new answer, whose prompt has just run, and which has its first tokens: it owns the KV caches.

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
        self._keep([one for one in self._running if one.needs_rows])
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
        start = time.perf_counter()
        seats: dict[Running, Seat] = {}
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
