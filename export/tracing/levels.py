"""The graphs of several levels put together: levels share graphs and profiles, and each has its own programs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from trio_edge.export.tracing.wiring import Wiring

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trio_edge.export.plan import ExportPlan
    from trio_edge.export.tracing.wiring import Outline
    from trio_edge.runtime.bundle.manifest import Program, Role


def wire(
    plan: ExportPlan, *, is_quantized: Callable[[Role], bool]
) -> tuple[list[Outline], list[tuple[Program, ...]]]:
    """Return all graphs and pieces of a bundle, and the programs of each level; called under FakeTensorMode."""
    levels = [Wiring(level, is_quantized=is_quantized, bundle=plan) for level in plan.levels]
    graphs: list[Outline] = []
    names = []
    for level, wiring in zip(plan.levels, levels):
        names.append(_add(graphs, wiring.graphs, level=level.level))
    specs = [graph.spec for graph in graphs]
    return graphs, [wiring.programs(specs, known) for wiring, known in zip(levels, names)]


def _add(graphs: list[Outline], more: Sequence[Outline], *, level: str) -> dict[tuple[str, str], str]:
    """Add the graphs and profiles of a level to ``graphs``; return the names of profiles that are called otherwise there."""
    names: dict[tuple[str, str], str] = {}
    place = 0  # graphs stay in the order of a prefill
    for graph in more:
        keys = [(known.spec.name, known.piece) for known in graphs]
        key = graph.spec.name, graph.piece
        if key not in keys:
            graphs.insert(place, graph)
            place += 1
            continue
        index = keys.index(key)
        place, known = index + 1, graphs[index]
        profiles = [*known.spec.profiles]
        taken = {one.name for other in graphs if other.spec.name == key[0] for one in other.spec.profiles}
        for profile in graph.spec.profiles:
            same = next((one for one in profiles if one.sizes == profile.sizes), None)
            if same is None:
                name = f"{profile.name}@{level}" if profile.name in taken else profile.name
                same = msgspec.structs.replace(profile, name=name)
                profiles.append(same)
            names[key[0], profile.name] = same.name
        graphs[index] = replace(known, spec=msgspec.structs.replace(known.spec, profiles=tuple(profiles)))
    return names
