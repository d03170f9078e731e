"""Times every launch of a backend's engines on the device's own clock, around any backend and unknown to the decoder.

Events are recorded in the stream before and after a launch and read when the answer is done, so nothing waits. Launches that
the decoder captures as one sequence cannot have events between them: they are timed in a pass of their own, without capture.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, NamedTuple, final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from trio_edge.runtime.backend import Backend
    from trio_edge.runtime.bundle import Bundle
    from trio_edge.runtime.device import Device, DeviceTensor, Engine, Event, Launch, LoadedGraphs
    from trio_edge.runtime.manifest import GraphSpec, Profile

DECODE = "decode"
"""Name of the profile that decodes one token."""


class GraphCall(NamedTuple):
    """One launch."""

    graph: str
    profile: str
    start_ms: float
    """Since the first launch that was taken with it."""
    milliseconds: float
    """On the device's clock."""


@final
class Recording:
    """Pairs of events around launches; made once, used again for every answer."""

    def __init__(self) -> None:
        self.enabled = True
        self.first_launch = 0.0
        """When the host enqueued the first launch since the last ``take``, in ``time.perf_counter`` seconds."""
        self.memory: dict[str, int] = {}
        """Bytes of the device's memory by what they are for, as the backend says."""
        self.captured = False
        """Whether decode steps run as one captured sequence, so that their graphs are not timed."""
        self.launched: list[tuple[str, str]] = []
        """Graph and profile of each launch since the last ``take``."""
        self.marks: list[tuple[Callable[[], None], Callable[[], None]]] = []
        """For each of them what records the event before it and the one behind it."""
        self._device: Device | None = None
        self._pairs: list[tuple[Event, Event]] = []

    def attach(self, graphs: LoadedGraphs) -> None:
        """Record in the stream of the graphs' device from now on."""
        self._device, self._pairs, self.marks, self.launched = graphs.device, [], [], []
        self.memory = dict(graphs.memory)
        self.captured = False

    def free_bytes(self) -> int | None:
        """Return how much memory is free on the device; None where it does not say."""
        return None if self._device is None else self._device.free_bytes()

    def grow(self) -> None:
        """Make events for one launch more."""
        assert self._device is not None  # a launch belongs to a device
        start, end = self._device.event(), self._device.event()
        self._pairs.append((start, end))
        self.marks.append((start.record, end.record))

    def take(self) -> tuple[GraphCall, ...]:
        """Return the calls since the last ``take``; the device must have done them."""
        calls = tuple(
            GraphCall(
                graph=graph,
                profile=profile,
                start_ms=start.milliseconds_since(self._pairs[0][0]),
                milliseconds=end.milliseconds_since(start),
            )
            for (graph, profile), (start, end) in zip(self.launched, self._pairs)
        )
        self.launched.clear()
        return calls


@final
class RecordingBackend:
    """A backend whose engines record their launches. Results are the backend's own."""

    def __init__(self, backend: Backend, recording: Recording, *, capture: bool = True) -> None:
        """Wrap ``backend``.

        Args:
            backend: Loads the graphs.
            recording: Where the launches of the graphs loaded last go.
            capture: False times decode steps launch by launch where the decoder would capture them as one sequence.
        """
        self._backend, self._recording, self._capture = backend, recording, capture

    @property
    def name(self) -> str:
        """See ``Backend.name``."""
        return self._backend.name

    def load(self, bundle: Bundle, names: Sequence[str] | None = None) -> LoadedGraphs:
        """See ``Backend.load``."""
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
        capture = self._capture and profile.name == DECODE
        return RecordedLaunch(launch, self._recording, names, capture=capture)

    def close(self) -> None:
        self._engine.close()


@final
class RecordedLaunch:
    """A launch between two events. What it does beside the launch is little: it finds its code and data in no cache."""

    __slots__ = ("_capture", "_enqueue", "_launch", "_names", "_recording")

    def __init__(
        self, launch: Launch, recording: Recording, names: tuple[str, str], *, capture: bool
    ) -> None:
        """Wrap ``launch``.

        Args:
            launch: What is timed.
            recording: Where its events are.
            names: Of its graph and its profile.
            capture: Whether the decoder may capture it with others; then it cannot be timed.
        """
        self._launch, self._enqueue, self._capture = launch, launch.enqueue, capture
        self._recording, self._names = recording, names

    @property
    def capturable(self) -> bool:
        """See ``Launch.capturable``."""
        return self._capture and self._launch.capturable

    def enqueue(self) -> None:
        """See ``Launch.enqueue``."""
        recording = self._recording
        if self._capture and self._launch.capturable:
            recording.captured = True
            self._enqueue()
            return
        if not recording.enabled:
            self._enqueue()
            return
        launched = recording.launched
        index = len(launched)
        if index == len(recording.marks):
            recording.grow()
        start, end = recording.marks[index]
        if index == 0:
            recording.first_launch = time.perf_counter()
        launched.append(self._names)
        start()
        self._enqueue()
        end()
