"""Times every launch of a backend's engines on the device's own clock, around any backend and unknown to the decoder.

Events are recorded in the stream before and after a launch and read when the answer is done, so nothing waits. Launches that
the decoder captures as one sequence cannot have events between them: they are timed in a pass of their own, without capture.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, NamedTuple, final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
        self._device: Device | None = None
        self._pairs: list[tuple[Event, Event]] = []
        self._launched: list[tuple[str, str]] = []

    def attach(self, graphs: LoadedGraphs) -> None:
        """Record in the stream of the graphs' device from now on."""
        self._device, self._pairs, self._launched = graphs.device, [], []
        self.memory = dict(graphs.memory)
        self.captured = False

    def free_bytes(self) -> int | None:
        """Return how much memory is free on the device; None where it does not say."""
        return None if self._device is None else self._device.free_bytes()

    def enqueue(self, graph: str, profile: str, launch: Launch) -> None:
        """Enqueue ``launch`` between two events."""
        index = len(self._launched)
        if index == len(self._pairs):
            assert self._device is not None  # a launch belongs to a device
            self._pairs.append((self._device.event(), self._device.event()))
        if index == 0:
            self.first_launch = time.perf_counter()
        start, end = self._pairs[index]
        self._launched.append((graph, profile))
        start.record()
        launch.enqueue()
        end.record()

    def take(self) -> tuple[GraphCall, ...]:
        """Return the calls since the last ``take``; the device must have done them."""
        calls = tuple(
            GraphCall(
                graph=graph,
                profile=profile,
                start_ms=start.milliseconds_since(self._pairs[0][0]),
                milliseconds=end.milliseconds_since(start),
            )
            for (graph, profile), (start, end) in zip(self._launched, self._pairs)
        )
        self._launched.clear()
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
        return _RecordingLaunch(
            launch, self._recording, self._engine.spec.name, profile.name, capture=self._capture
        )

    def close(self) -> None:
        self._engine.close()


@final
class _RecordingLaunch:
    def __init__(
        self, launch: Launch, recording: Recording, graph: str, profile: str, *, capture: bool
    ) -> None:
        self._launch, self._recording, self._graph, self._profile = launch, recording, graph, profile
        self._capture = capture and profile == DECODE

    @property
    def capturable(self) -> bool:
        return self._capture and self._launch.capturable

    def enqueue(self) -> None:
        if self.capturable:
            self._recording.captured = True
            self._launch.enqueue()
        elif self._recording.enabled:
            self._recording.enqueue(self._graph, self._profile, self._launch)
        else:
            self._launch.enqueue()
