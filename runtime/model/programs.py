"""A bundle's programs, bound to one memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, final

from trio_edge.runtime.buffers.memory import Memory
from trio_edge.runtime.model.head_candidates import EnterHead, LikeliestRows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.runtime.buffers.kv_cache import KVCache, Stack
    from trio_edge.runtime.bundle.manifest import Manifest, Profile
    from trio_edge.runtime.bundle.programs.program import Launch, Program
    from trio_edge.runtime.bundle.token_table import TokenTable
    from trio_edge.runtime.devices.interface import DeviceTensor, LoadedGraphs, PreparedLaunch


class BoundLaunch(NamedTuple):
    """A launch at one of its program's sizes."""

    spec: Launch
    launch: PreparedLaunch
    tensors: dict[str, DeviceTensor]
    """Inputs and outputs of the graph; empty for a function on the host."""
    cache: KVCache | None = None
    """Takes the rows of ``new_rows``."""
    new_rows: Stack | None = None


@final
class Programs:
    """Binds programs at their first use. Whoever loaded the graphs closes them."""

    def __init__(
        self, manifest: Manifest, graphs: LoadedGraphs, *, head_rows: TokenTable | None = None
    ) -> None:
        """Allocate the memory of all programs. ``head_rows`` is the manifest's table, if it has one.

        Raises:
            BackendError: If the device has too little memory.
        """
        self.manifest, self.device, self.notes = manifest, graphs.device, graphs.notes
        self.memory = Memory(manifest, graphs.device)
        self._engines, self._head_rows = graphs.engines, head_rows
        self._programs: dict[str, Program] = {program.name: program for program in manifest.programs}
        self._bound: dict[tuple[str, int], tuple[BoundLaunch, ...]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._programs

    def launches(self, name: str) -> tuple[Launch, ...]:
        """Return the launches of a program as the manifest describes them; none without the program."""
        return self._programs[name].launches if name in self else ()

    def sizes(self, name: str) -> tuple[Mapping[str, int], ...]:
        """Return the sizes that a program runs at."""
        return self._programs[name].sizes

    def at(self, name: str, sizes: Mapping[str, int]) -> tuple[BoundLaunch, ...]:
        """Return the launches of a program at ``sizes``."""
        key = name, self._programs[name].at(sizes)
        if key not in self._bound:
            self._bound[key] = tuple(self._bind(spec, key[1]) for spec in self.launches(name))
        return self._bound[key]

    def _bind(self, spec: Launch, index: int) -> BoundLaunch:
        if not spec.profiles:
            return BoundLaunch(spec, self._on_host(spec), {})
        profile, tensors = self.memory.bound(spec, index)
        launch = self._engine_launch(spec, profile, tensors)
        if spec.cache is None:
            return BoundLaunch(spec, launch, tensors)
        (new,) = (stack for name, stack in self.memory.stacks(spec, index).items() if name != spec.cache)
        return BoundLaunch(spec, launch, tensors, self.memory.cache(spec.cache), new)

    def _engine_launch(
        self, spec: Launch, profile: Profile, tensors: Mapping[str, DeviceTensor]
    ) -> PreparedLaunch:
        return self._engines[spec.runs].prepare(profile, tensors)

    def _on_host(self, spec: Launch) -> PreparedLaunch:
        if spec.runs == "enter_head":
            return EnterHead(self.device, self.memory, spec)
        assert self._head_rows is not None, "the manifest has them"
        return LikeliestRows(self.device, self.memory, spec, rows=self._head_rows)
