"""Times every launch of a backend's engines on the device's own clock. It wraps any backend, and the decoder does not know.

On a GPU, events are recorded in the stream before and after a launch and read when the answer is done, so nothing waits. On the
host a launch is done when its call returns: two looks at the clock are all. Launches that the decoder captures as one sequence
cannot have events between them; they are timed in runs of their own, without capture.

A wrapped launch does little besides the launch, because between graphs it finds its code and data in no cache: everything that
it needs is bound beforehand, and it leaves plain tuples, which become ``GraphCall``s when all is measured.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, NamedTuple, final

from trio_edge.runtime.devices.host import HostDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from trio_edge.runtime.backends.interface import Backend
    from trio_edge.runtime.bundle.manifest import GraphSpec, Profile
    from trio_edge.runtime.bundle.reader import Bundle
    from trio_edge.runtime.devices.interface import Device, DeviceTensor, Engine, Event, Launch, LoadedGraphs

DECODE = "decode"
"""Name of the profile that decodes one token."""

Stamp = tuple[tuple[str, str], float, float]
"""Graph and profile of a launch, and the seconds of ``time.perf_counter`` before and after it."""


class GraphCall(NamedTuple):
    """One launch."""

    graph: str
    profile: str
    start_ms: float
    """Since the first launch of the answer."""
    milliseconds: float
    """On the device's clock."""


def graph_calls(stamps: Sequence[Stamp]) -> tuple[GraphCall, ...]:
    """Return the launches of an answer."""
    first = stamps[0][1] if stamps else 0.0
    return tuple(
        GraphCall(graph, profile, 1e3 * (start - first), 1e3 * (end - start))
        for (graph, profile), start, end in stamps
    )


@final
class Recording:
    """The times of an answer's launches."""

    def __init__(self) -> None:
        self.memory: dict[str, int] = {}
        """Bytes of the device's memory by what they are for, as the backend says."""
        self.captured = False
        """Whether decode steps run as one captured sequence, so that their graphs are not timed."""
        self._device: Device | None = None
        self._stamps: list[Stamp] = []
        self._events = _EventPairs()

    def attach(self, graphs: LoadedGraphs) -> None:
        """Time launches on the graphs' device from now on."""
        self._device, self._stamps, self._events = graphs.device, [], _EventPairs()
        self.memory = dict(graphs.memory)
        self.captured = False

    def free_bytes(self) -> int | None:
        """Return how much memory is free on the device; None where it does not say."""
        return None if self._device is None else self._device.free_bytes()

    def timed(self, launch: Launch, names: tuple[str, str], *, capture: bool) -> Launch:
        """Return ``launch`` with its time taken; the decoder may ``capture`` it with others, then it cannot be timed."""
        assert self._device is not None  # a launch belongs to a device
        if isinstance(self._device, HostDevice):
            return _ClockedLaunch(launch, names, self._stamps)
        return _EventedLaunch(launch, self, names, self._events, self._device, capture=capture)

    def take(self) -> list[Stamp]:
        """Return the launches since the last ``take``, in order; the device must have done them."""
        found = [*self._stamps, *self._events.take()]
        self._stamps.clear()
        return found


@final
class _EventPairs:
    """Pairs of events around launches; made once, used again for every answer."""

    def __init__(self) -> None:
        self.first_launch = 0.0
        """When the host enqueued the first, ``time.perf_counter`` seconds."""
        self.launched: list[tuple[str, str]] = []
        """Graph and profile of each launch since the last ``take``."""
        self.marks: list[tuple[Event, Event]] = []
        """The events before and after each of them."""

    def take(self) -> list[Stamp]:
        found = []
        for names, marks in zip(self.launched, self.marks):
            start, end = (
                self.first_launch + mark.milliseconds_since(self.marks[0][0]) / 1e3 for mark in marks
            )
            found.append((names, start, end))
        self.launched.clear()  # the events stay: making them takes longer than recording them
        return found


@final
class RecordingBackend:
    """A backend whose engines record their launches. Results are the backend's own."""

    def __init__(self, backend: Backend, recording: Recording, *, capture: bool = True) -> None:
        """Wrap ``backend``; ``recording`` takes the launches of the graphs loaded last.

        Without ``capture``, decode steps are timed launch by launch where the decoder would capture them as one sequence.
        """
        self._backend, self._recording, self._capture = backend, recording, capture

    @property
    def name(self) -> str:
        """Name of the wrapped backend."""
        return self._backend.name

    def load(self, bundle: Bundle, names: Sequence[str] | None = None) -> LoadedGraphs:
        """Load graphs whose engines record their launches; see ``Backend.load``."""
        graphs = self._backend.load(bundle, names)
        self._recording.attach(graphs)
        engines: dict[str, Engine] = {
            name: _RecordingEngine(engine, self._recording, capture=self._capture)
            for name, engine in graphs.engines.items()
        }
        return dataclasses.replace(graphs, engines=engines)


@final
class _RecordingEngine:
    def __init__(self, engine: Engine, recording: Recording, *, capture: bool) -> None:
        self._engine, self._recording, self._capture = engine, recording, capture

    @property
    def spec(self) -> GraphSpec:
        return self._engine.spec

    def prepare(self, profile: Profile, tensors: Mapping[str, DeviceTensor]) -> Launch:
        launch = self._engine.prepare(profile, tensors)
        names = (self._engine.spec.name, profile.name)
        # The decoder captures nothing but decode steps.
        return self._recording.timed(launch, names, capture=self._capture and profile.name == DECODE)

    def close(self) -> None:
        self._engine.close()


@final
class _ClockedLaunch:
    """A launch on the host between two looks at its clock; nothing is captured there."""

    __slots__ = ("enqueue",)
    capturable = False

    def __init__(self, launch: Launch, names: tuple[str, str], stamps: list[Stamp]) -> None:
        plain, clock, keep = launch.enqueue, time.perf_counter, stamps.append

        def timed() -> None:
            start = clock()
            plain()
            keep((names, start, clock()))

        self.enqueue: Callable[[], None] = timed


@final
class _EventedLaunch:
    """A launch between two events of its stream."""

    __slots__ = ("_capture", "_device", "_launch", "_names", "_pairs", "_recording")

    def __init__(
        self,
        launch: Launch,
        recording: Recording,
        names: tuple[str, str],
        pairs: _EventPairs,
        device: Device,
        *,
        capture: bool,
    ) -> None:
        self._launch, self._recording, self._names = launch, recording, names
        self._pairs, self._device, self._capture = pairs, device, capture

    @property
    def capturable(self) -> bool:
        return self._capture and self._launch.capturable

    def enqueue(self) -> None:
        if self._capture and self._launch.capturable:
            self._recording.captured = True
            self._launch.enqueue()
        else:
            self._enqueue_between_events()

    def _enqueue_between_events(self) -> None:
        pairs = self._pairs
        index = len(pairs.launched)
        if index == len(pairs.marks):
            pairs.marks.append((self._device.event(), self._device.event()))
        if index == 0:  # events have no common clock with the host; this moment ties them together
            pairs.first_launch = time.perf_counter()
        start, end = pairs.marks[index]
        pairs.launched.append(self._names)
        start.record()
        self._launch.enqueue()
        end.record()
