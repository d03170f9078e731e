"""Times every launch of a backend's engines on the device's clock. It wraps any backend; the decoder does not notice.

On a GPU, events in the stream before and after each launch are read when the answer is done, so nothing waits. On the host a
launch is done when its call returns, so the clock is read before and after it. The decoder captures decode steps as one
sequence, which cannot have events inside; these launches are timed in separate runs, without capture.

A wrapped launch must do little, because its own code and data are not in the processor's caches: everything is bound beforehand,
and it stores plain tuples, of which ``take`` makes ``GraphCall``s.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, final

from trio_edge.runtime.devices.host import HostDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from trio_edge.runtime.backends.interface import Backend
    from trio_edge.runtime.bundle.manifest import GraphSpec, Profile
    from trio_edge.runtime.bundle.reader import Bundle
    from trio_edge.runtime.devices.interface import DeviceTensor, Engine, Event, LoadedGraphs, PreparedLaunch

_DECODE = "decode"


def is_decode(profile: str) -> bool:
    """Return whether a profile of this name is a decode step's; levels may have their own."""
    return profile.startswith(_DECODE)


_Stamp = tuple[tuple[str, str], float, float]


class GraphCall(NamedTuple):
    """One launch. Its start and end are ``time.perf_counter`` seconds, and their difference is the device's."""

    graph: str
    profile: str
    start: float
    end: float

    @property
    def milliseconds(self) -> float:
        """The launch's time."""
        return 1e3 * (self.end - self.start)


@final
class Recording:
    """The times of an answer's launches."""

    def __init__(self, graphs: LoadedGraphs) -> None:
        """Prepare for launches on the device of ``graphs``."""
        self.memory = dict(graphs.memory)
        """Bytes of device memory by purpose, as the backend reports them."""
        self.captured = False
        """Whether decode steps run as one captured sequence, whose graphs are not timed."""
        self._device = graphs.device
        self._stamps: list[_Stamp] = []
        self._first_launch = 0.0
        """``time.perf_counter`` seconds when the host enqueued the first launch between events."""
        self._launched: list[tuple[str, str]] = []
        """Graph and profile of each launch between events since the last ``take``."""
        self._marks: list[tuple[Event, Event]] = []
        """The events before and after each launch, reused for every answer."""

    def free_bytes(self) -> int | None:
        """Return the free memory of the device; None if it does not tell."""
        return self._device.free_bytes()

    def timed(self, launch: PreparedLaunch, names: tuple[str, str], *, capture: bool) -> PreparedLaunch:
        """Return a launch that also records its time; one that the decoder may ``capture`` is not timed when it does."""
        if isinstance(self._device, HostDevice):
            return _ClockedLaunch(launch, names, self._stamps)
        return _EventedLaunch(launch, self, names, capture)

    def events(self, names: tuple[str, str]) -> tuple[Event, Event]:
        """Return the events to record before and after the next launch."""
        index = len(self._launched)
        if index == len(self._marks):
            self._marks.append((self._device.event(), self._device.event()))
        if index == 0:  # events and the host have no common clock; this moment relates the two
            self._first_launch = time.perf_counter()
        self._launched.append(names)
        return self._marks[index]

    def take(self) -> list[GraphCall]:
        """Return the launches since the last ``take``, in order; the device must have finished them."""
        found = [GraphCall(*names, start, end) for names, start, end in self._stamps]
        for names, marks in zip(self._launched, self._marks):
            start, end = (
                self._first_launch + mark.milliseconds_since(self._marks[0][0]) / 1e3 for mark in marks
            )
            found.append(GraphCall(*names, start, end))
        self._stamps.clear()
        self._launched.clear()  # the events stay, because making them takes longer than recording them
        return found


@final
class RecordingBackend:
    """A backend whose engines record their launches; results do not change."""

    recording: Recording
    """Launches of the graphs that were loaded last."""

    def __init__(self, backend: Backend, *, capture: bool = True) -> None:
        """Wrap ``backend``. Without ``capture``, the decoder captures no decode steps, so that their launches are timed."""
        self._backend, self._capture = backend, capture

    @property
    def name(self) -> str:
        """Name of the wrapped backend."""
        return self._backend.name

    def load(self, bundle: Bundle, names: Sequence[str] | None = None) -> LoadedGraphs:
        """Load graphs whose engines record their launches; see ``Backend.load``."""
        graphs = self._backend.load(bundle, names)
        self.recording = Recording(graphs)
        engines: dict[str, Engine] = {
            name: _RecordingEngine(engine, self.recording, self._capture)
            for name, engine in graphs.engines.items()
        }
        return dataclasses.replace(graphs, engines=engines)


@final
@dataclass(frozen=True)
class _RecordingEngine:
    engine: Engine
    recording: Recording
    capture: bool

    @property
    def spec(self) -> GraphSpec:
        return self.engine.spec

    def prepare(self, profile: Profile, tensors: Mapping[str, DeviceTensor]) -> PreparedLaunch:
        launch = self.engine.prepare(profile, tensors)
        names = (self.engine.spec.name, profile.name)
        # the decoder captures only decode steps
        return self.recording.timed(launch, names, capture=self.capture and is_decode(profile.name))

    def close(self) -> None:
        self.engine.close()


@final
class _ClockedLaunch:
    """A launch on the host, timed with the host's clock; the host captures nothing."""

    __slots__ = ("enqueue",)
    capturable = False

    def __init__(self, launch: PreparedLaunch, names: tuple[str, str], stamps: list[_Stamp]) -> None:
        plain, clock, keep = launch.enqueue, time.perf_counter, stamps.append

        def timed() -> None:
            start = clock()
            plain()
            keep((names, start, clock()))

        self.enqueue: Callable[[], None] = timed


@final
@dataclass(frozen=True, slots=True)
class _EventedLaunch:
    """A launch between two events of its stream."""

    launch: PreparedLaunch
    recording: Recording
    names: tuple[str, str]
    capture: bool

    @property
    def capturable(self) -> bool:
        return self.capture and self.launch.capturable

    def enqueue(self) -> None:
        if self.capturable:
            self.recording.captured = True
            self.launch.enqueue()
            return
        start, end = self.recording.events(self.names)
        start.record()
        self.launch.enqueue()
        end.record()
