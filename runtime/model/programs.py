"""A bundle's programs, bound to one memory, and the device's time in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, final

from trio_edge.runtime.bundle.manifest import SLOTS
from trio_edge.runtime.devices.memory import KVCache, Memory
from trio_edge.runtime.model.head_candidates import EnterHead, LikeliestRows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.runtime.bundle.manifest import Launch, Manifest
    from trio_edge.runtime.bundle.reader import TokenTable
    from trio_edge.runtime.devices.interface import Device, DeviceTensor, Event, LoadedGraphs, PreparedLaunch
    from trio_edge.runtime.devices.memory import Stack


class BoundLaunch(NamedTuple):
    """A launch at one of its program's sizes."""

    spec: Launch
    launch: PreparedLaunch
    tensors: dict[str, DeviceTensor]
    """Inputs and outputs of the graph; empty for a function on the host."""
    cache: KVCache | None = None
    """Takes the rows of ``new_rows``; None if these belong to several answers."""
    new_rows: Stack | None = None
    states: tuple[tuple[Stack, Stack], ...] = ()
    """New states, and those that they replace."""

    def keep(self, device: Device, *, num_rows: int) -> None:
        """Enqueue copies of the first ``num_rows`` new rows to the KV cache, and of new states to the places of the old ones."""
        if self.cache is not None:
            self.cache.append(device, self.new_rows, num_rows=num_rows)
        for new, old in self.states:
            new.copy_whole(device, old)


@final
class Programs:
    """Binds a level's programs at their first use. Whoever loaded the graphs closes them."""

    def __init__(
        self,
        manifest: Manifest,
        graphs: LoadedGraphs,
        *,
        head_rows: TokenTable | None = None,
        memory: Memory | None = None,
    ) -> None:
        """Take the places of ``manifest`` from ``memory``, which levels share; None allocates it.

        ``head_rows`` is the manifest's table, if it has one.

        Raises:
            BackendError: If the device has too little memory.
        """
        self.manifest, self.device, self.notes = manifest, graphs.device, graphs.notes
        self.memory = memory or Memory(manifest, graphs.device)
        self.launches: dict[str, tuple[Launch, ...]] = {
            program.name: program.launches for program in manifest.programs
        }
        """Launches of each program as the manifest describes them."""
        ranges = [launch for launch in self.launches["decode"] if launch.cache is not None]
        self.caches = {
            str(launch.cache): KVCache(self.memory.at(launch, 0)[2].get(str(launch.cache)), capacity)
            for launch, capacity in zip(ranges, manifest.kv_capacities)
        }
        """KV caches by name, in the order of the layer ranges, at this level's capacity."""
        self.states = [self.memory.stack(name) for launch in ranges for name in launch.states.values()]
        """States of layers with linear attention, which a decode step replaces."""
        self._engines, self._head_rows = graphs.engines, head_rows
        self.sizes: dict[str, tuple[dict[str, int], ...]] = {
            program.name: program.sizes for program in manifest.programs
        }
        """Sizes of each program, ascending."""
        self._bound: dict[tuple[str, int], tuple[BoundLaunch, ...]] = {}

    def rows_for(self, name: str, count: int) -> int:
        """Return the smallest T of a program with room for ``count`` rows of text."""
        return min(sizes["T"] for sizes in self.sizes[name] if sizes["T"] >= count)

    def at(self, name: str, sizes: Mapping[str, int]) -> tuple[BoundLaunch, ...]:
        """Return the launches of a program at ``sizes``; symbols that the program does not have are left out."""
        known = self.sizes[name]
        key = name, known.index({symbol: sizes[symbol] for symbol in known[0]})
        if key not in self._bound:
            self._bound[key] = tuple(self._bind(spec, key[1]) for spec in self.launches[key[0]])
        return self._bound[key]

    def _bind(self, spec: Launch, index: int) -> BoundLaunch:
        if spec.runs == "enter_head":
            return BoundLaunch(spec, EnterHead(self.device, self.memory, spec), {})
        if spec.runs == "likeliest_rows":
            assert self._head_rows is not None, "the manifest has them"
            return BoundLaunch(spec, LikeliestRows(self.device, self.memory, spec, rows=self._head_rows), {})
        profile, tensors, stacks = self.memory.at(spec, index)
        launch = self._engines[spec.runs].prepare(profile, tensors)
        is_alone = spec.cache is not None and not spec.cache.startswith(SLOTS)
        cache = self.caches[str(spec.cache)] if is_alone else None
        known = {str(spec.cache), *spec.states, *spec.states.values()}
        new_rows = next((stack for name, stack in stacks.items() if name not in known), None)
        states = tuple((stacks[new], self.memory.stack(kept)) for new, kept in spec.states.items())
        return BoundLaunch(spec, launch, tensors, cache, new_rows, states)


@final
class Timeline:
    """One pair of events around launches for each name; recording does not wait for the device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._events: dict[str, tuple[Event, Event]] = {}
        self.recorded: list[str] = []
        """Names since it was last cleared."""

    def enqueue(self, name: str, *launches: PreparedLaunch) -> None:
        """Enqueue ``launches`` between two events; a later call with the same name replaces the time."""
        if name not in self._events:
            self._events[name] = self._device.event(), self._device.event()
        start, end = self._events[name]
        start.record()
        for launch in launches:
            launch.enqueue()
        end.record()
        if name not in self.recorded:
            self.recorded.append(name)

    def milliseconds(self) -> dict[str, float]:
        """Return the device's times by name in order; the device must have reached their end."""
        return {
            name: end.milliseconds_since(start)
            for name, (start, end) in self._events.items()
            if name in self.recorded
        }
