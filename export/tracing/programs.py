"""Writes a bundle's programs: the order of its graphs, and the place of each of their tensors.

The graphs are built here, so their wiring is known here. See ``trio_edge.runtime.bundle.programs`` for places.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

import msgspec

from trio_edge.runtime.bundle import graph_io
from trio_edge.runtime.bundle.manifest import Launch, Program, find_profile, shape_at

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trio_edge.export.tracing.layout import Layout
    from trio_edge.runtime.bundle.manifest import GraphSpec, Profile

_TOP = (graph_io.TOP_LOGITS, graph_io.TOP_IDS)
_STATE = {
    graph_io.GRADIENT_STATE: graph_io.PROBE_STATE,
    graph_io.GRADIENT_ATTENTION: graph_io.PROBE_ATTENTION,
    graph_io.GRADIENT_KEYS: graph_io.PROBE_KEYS,
    graph_io.GRADIENT: graph_io.OUTPUT_GRADIENT,
}
"""Inputs of a probe's backward half, and the earlier outputs that they are."""


def programs_of(
    graphs: Sequence[GraphSpec], layout: Layout, *, sources: Mapping[str, Mapping[str, str]]
) -> tuple[Program, ...]:
    """Return the programs of ``graphs``; ``sources`` are the places of inputs that selectors add, by graph and input."""
    return _Wiring(graphs, layout, sources).programs()


@final
class _Wiring:
    """Builds the launches of all programs."""

    def __init__(
        self, graphs: Sequence[GraphSpec], layout: Layout, sources: Mapping[str, Mapping[str, str]]
    ) -> None:
        self._layout, self._sources = layout, sources
        self._graphs = {spec.name: spec for spec in graphs}
        self._ranges = [spec for spec in graphs if spec.role in ("prefix", "segment", "suffix")]
        self._selects = [spec for spec in graphs if spec.role == "select"]
        self._head = self._graphs["head"]
        self._sizes = [(rows, bucket) for rows in layout.visual_sizes for bucket in layout.text_buckets]
        """Visual rows and text bucket of each prefill."""

    def programs(self) -> tuple[Program, ...]:
        prefill = self._prefill()
        sizes = tuple({"N": rows, "T": bucket} for rows, bucket in self._sizes)
        exact = tuple(
            msgspec.structs.replace(launch, runs="exact_nms", profiles=())
            for launch in prefill
            if self._graphs.get(launch.runs) in self._selects
        )
        found = [self._vision()]
        if "reduce" in self._graphs:
            found.append(self._reduce())
        found.append(Program(name="prefill", sizes=sizes, launches=tuple(prefill)))
        if self._layout.follow_ups:
            found.append(self._question())
        found.append(Program(name="decode", sizes=({},), launches=tuple(self._decode())))
        if exact:
            found.append(Program(name="exact", sizes=sizes, launches=exact))
        return tuple(found)

    # Before the decoder

    def _vision(self) -> Program:
        spec = self._graphs["vision"]
        launch = _launch(spec, spec.profiles, _images(spec, {}), outputs=_kept(spec))
        return Program(
            name="vision", sizes=tuple(profile.sizes for profile in spec.profiles), launches=(launch,)
        )

    def _reduce(self) -> Program:
        spec, launches = self._graphs["reduce"], []
        before = [self._graphs["vision"]]
        if (texts := self._graphs.get(graph_io.CLIP_TEXT)) is not None:
            profiles = [find_profile(texts, {"M": profile.sizes["M"]}) for profile in spec.profiles]
            launches.append(_launch(texts, profiles, _images(texts, {})))
            before.append(texts)
        known = {tensor.name: f"{graph.name}.{tensor.name}" for graph in before for tensor in graph.outputs}
        launches.append(_launch(spec, spec.profiles, _images(spec, known), outputs=_kept(spec)))
        sizes = tuple(profile.sizes for profile in spec.profiles)
        return Program(name="reduce", sizes=sizes, launches=tuple(launches))

    # The prompt

    def _prefill(self) -> list[Launch]:
        launches = []
        for index, spec in enumerate(self._ranges):
            profiles = [
                find_profile(spec, {"S": rows + bucket, "C": 0})
                for rows, bucket in zip(self._rows(index), self._buckets())
            ]
            before = _entering(self._selects[index - 1]) if index else {}
            sources = {
                graph_io.EMBEDS: "rows.embeds",
                graph_io.HIDDEN: before.get(graph_io.HIDDEN, ""),
                graph_io.POSITIONS: self._positions(index),
                graph_io.PAST_LENGTH: "zeros.past_length",
                **self._planes(index, spec),
            }
            launches.append(_range_launch(spec, profiles, sources, new="new_rows", stage=index))
            if index < len(self._selects):
                launches += [*self._probe(index), self._select(index)]
        last = self._ranges[-1].name
        sources = {
            graph_io.HIDDEN: f"{last}.{graph_io.HIDDEN_OUT}",
            graph_io.LAST_ROW: "prompt.last_row",
        }
        profiles = [self._head_profile(rows + bucket) for rows, bucket in self._last_rows()]
        outputs = {name: f"results.{name}" for name in (graph_io.LOGITS, *_TOP)}
        return [
            *launches,
            _launch(self._head, profiles, sources, outputs=outputs, stage=len(self._selects)),
        ]

    def _rows(self, index: int) -> list[int]:
        """Return the visual rows of layer range ``index`` in each prefill."""
        if index == 0:
            return [rows for rows, _ in self._sizes]
        return [self._layout.schedule.stages[index - 1].keep] * len(self._sizes)

    def _last_rows(self) -> list[tuple[int, int]]:
        return list(zip(self._rows(len(self._selects)), self._buckets()))

    def _buckets(self) -> list[int]:
        return [bucket for _, bucket in self._sizes]

    def _positions(self, index: int) -> str:
        return _entering(self._selects[index - 1])[graph_io.POSITIONS] if index else "prompt.position_ids"

    def _visual_rows(self, stage: int) -> str:
        return _entering(self._selects[stage - 1])[graph_io.VISUAL_ROWS] if stage else "prompt.visual_rows"

    def _planes(self, index: int, reader: GraphSpec) -> dict[str, str]:
        """Return the places of the DeepStack planes that ``reader`` reads, those that enter layer range ``index``."""
        names = [name for name in reader.input_names if name.startswith(graph_io.DEEPSTACK)]
        if index == 0:
            return {name: f"rows.deepstack.{name.removeprefix(graph_io.DEEPSTACK)}" for name in names}
        entering = _entering(self._selects[index - 1])
        return {name: entering[name] for name in names}

    def _probe(self, stage: int) -> list[Launch]:
        """Return the launches that give the scores that a select graph reads, if it reads any."""
        if graph_io.SALIENCY not in self._selects[stage].input_names:
            return []
        layer, label = self._selects[stage].first_layer, self._selects[stage].name
        halves = [spec for spec in self._graphs.values() if spec.first_layer == layer]
        forward, backward = (
            next(spec for spec in halves if any(tensor.name == name for tensor in spec.outputs))
            for name in (graph_io.PROBE_OUTPUT, graph_io.SALIENCY_SCORES)
        )
        gradient = next(
            spec
            for spec in self._graphs.values()
            if any(tensor.name == graph_io.OUTPUT_GRADIENT for tensor in spec.outputs)
        )
        num_rows = self._layout.schedule.num_probe_rows
        hidden = f"{self._ranges[stage].name}.{graph_io.HIDDEN_OUT}"
        sources = {
            graph_io.PROBE_HIDDEN: hidden,
            graph_io.PROBE_POSITIONS: self._positions(stage),
            graph_io.PROBE_VISUAL_ROWS: self._visual_rows(stage),
            graph_io.PROBE_ROWS: f"prompt.probe_rows.{stage}",
            graph_io.PROBE_LENGTH: f"prompt.length.{stage}",
            graph_io.PROBE_OUTPUT: f"probe.{graph_io.PROBE_OUTPUT}",
            graph_io.CANDIDATE_LOGITS: "likeliest.logits",
            graph_io.CANDIDATE_ROWS: "likeliest.rows",
            graph_io.GRADIENT_HIDDEN: hidden,
            graph_io.GRADIENT_POSITIONS: self._positions(stage),
            graph_io.GRADIENT_VISUAL_ROWS: self._visual_rows(stage),
            graph_io.GRADIENT_NUM_VISUAL: f"prompt.num_visual.{stage}",
            **{name: f"probe.{output}" for name, output in _STATE.items()},
        }

        def piece(spec: GraphSpec, letter: str) -> Launch:
            profiles = [
                find_profile(
                    spec,
                    {f"{letter}S": rows + bucket, f"{letter}N": rows, f"{letter}R": num_rows},
                )
                for rows, bucket in zip(self._rows(stage), self._buckets())
            ]
            return _launch(spec, profiles, sources, label=label, stage=stage, space="probe")

        whole = [find_profile(gradient, {"GR": num_rows})] * len(self._sizes)
        between = _launch(gradient, whole, sources, label=label, stage=stage, space="probe")
        given = self._candidates(label, stage) if graph_io.CANDIDATE_ROWS in gradient.input_names else []
        return [piece(forward, "P"), *given, between, piece(backward, "G")]

    def _candidates(self, label: str, stage: int) -> list[Launch]:
        """Return the launches that give the likeliest tokens of the probe rows and their rows of a quantized head."""
        rows = self._layout.schedule.num_probe_rows
        profiles = [find_profile(self._head, {"S": rows, "L": rows})] * len(self._sizes)
        entering = {graph_io.HIDDEN: "entering.hidden_states", graph_io.LAST_ROW: "entering.rows"}
        found = {name: f"found.{name}" for name in _TOP}
        return [
            Launch(
                runs="enter_head",
                label=label,
                stage=stage,
                inputs={graph_io.PROBE_OUTPUT: f"probe.{graph_io.PROBE_OUTPUT}"},
                outputs=entering,
            ),
            _launch(self._head, profiles, entering, outputs=found, label=label, stage=stage),
            Launch(
                runs="likeliest_rows",
                label=label,
                stage=stage,
                inputs=found,
                outputs={
                    graph_io.CANDIDATE_LOGITS: "likeliest.logits",
                    graph_io.CANDIDATE_ROWS: "likeliest.rows",
                },
            ),
        ]

    def _select(self, stage: int) -> Launch:
        spec, entering = self._selects[stage], self._ranges[stage].name
        keep = self._layout.schedule.stages[stage].keep
        profiles = []
        for (whole, bucket), rows in zip(self._sizes, self._rows(stage)):
            sizes = {"N": rows, "S": rows + bucket, "R": keep + bucket, "F": whole + bucket}
            profiles.append(find_profile(spec, {name: sizes[name] for name in spec.profiles[0].sizes}))
        images = "prompt.visual_images"
        if stage:
            images = _entering(self._selects[stage - 1]).get(graph_io.VISUAL_IMAGES, images)
        sources = {
            graph_io.HIDDEN: f"{entering}.{graph_io.HIDDEN_OUT}",
            graph_io.PREVIOUS: f"{entering}.{graph_io.PREVIOUS}",
            graph_io.POSITIONS: self._positions(stage),
            graph_io.VISUAL_ROWS: self._visual_rows(stage),
            graph_io.VISUAL_IMAGES: images,
            graph_io.NUM_VISUAL: f"prompt.num_visual.{stage}",
            graph_io.LENGTH: f"prompt.length.{stage}",
            graph_io.PROMPT_EMBEDS: "rows.embeds",
            graph_io.PROMPT_IS_VISUAL: "prompt.is_visual",
            graph_io.PROMPT_LENGTH: "prompt.length",
            graph_io.SALIENCY: f"probe.{graph_io.SALIENCY_SCORES}",
            **self._planes(stage, spec),
            **self._sources.get(spec.name, {}),
        }
        outputs = {name: f"results.{name}.{stage}" for name in graph_io.SELECT_RESULTS}
        return _launch(spec, profiles, sources, outputs=outputs, stage=stage)

    def _head_profile(self, rows: int) -> Profile:
        return find_profile(
            self._head, {"S": rows, "L": 1} if graph_io.is_shared(self._head) else {"S": rows}
        )

    # After the prompt

    def _question(self) -> Program:
        """Return the program of the question's rows, which follow kept rows of the first layer range."""
        spec, buckets = self._ranges[0], self._layout.text_buckets
        capacity = _capacity(spec)
        sources = {
            graph_io.EMBEDS: "question.embeds",
            graph_io.POSITIONS: "question.position_ids",
            graph_io.PAST_LENGTH: "question.past_length",
            **_no_planes(spec),
        }
        profiles = [find_profile(spec, {"S": bucket, "C": capacity}) for bucket in buckets]
        launch = _range_launch(spec, profiles, sources, new="question_rows", label="question", space="after")
        return Program(name="question", sizes=tuple({"T": bucket} for bucket in buckets), launches=(launch,))

    def _decode(self) -> list[Launch]:
        launches, hidden = [], ""
        for index, spec in enumerate(self._ranges):
            sources = {
                graph_io.EMBEDS: "step.embedding",
                graph_io.HIDDEN: hidden,
                graph_io.POSITIONS: f"step.position_ids.{index}",
                graph_io.PAST_LENGTH: f"step.past_length.{index}",
                **_no_planes(spec),
            }
            profiles = [find_profile(spec, {"S": 1, "C": _capacity(spec)})]
            launches.append(_range_launch(spec, profiles, sources, new=f"new_row.{spec.name}", stage=index))
            hidden = f"{spec.name}.{graph_io.HIDDEN_OUT}"
        outputs = {name: f"top.{name}" for name in _TOP} | {graph_io.LOGITS: "logits.logits"}
        sources = {graph_io.HIDDEN: hidden, graph_io.LAST_ROW: "zeros.last_row"}
        profiles = [self._head_profile(1)]
        return [
            *launches,
            _launch(self._head, profiles, sources, outputs=outputs, stage=len(self._selects)),
        ]


def _launch(
    spec: GraphSpec,
    profiles: Sequence[Profile],
    sources: Mapping[str, str],
    *,
    outputs: Mapping[str, str] | None = None,
    label: str | None = None,
    stage: int = 0,
    space: str | None = None,
    cache: str | None = None,
) -> Launch:
    """Return a launch of ``spec``.

    Args:
        spec: A graph.
        profiles: Its profiles at the program's sizes, all of one piece.
        sources: Places of its inputs; the inputs of other pieces read zeros, if they have elements.
        outputs: Places of outputs; the others get one with their name in ``space``.
        label: See ``Launch``; by default the graph's name.
        stage: See ``Launch``.
        space: By default the graph's name.
        cache: See ``Launch``.
    """
    part = spec.part_at(profiles[0])
    inputs = {}
    for tensor in spec.inputs:
        if tensor in part.inputs:
            inputs[tensor.name] = sources[tensor.name]
        elif math.prod(shape_at(tensor.shape, profiles[0])):
            inputs[tensor.name] = f"zeros.{tensor.name}"
    given = outputs or {}
    return Launch(
        runs=spec.name,
        label=label or spec.name,
        profiles=tuple(profile.name for profile in profiles),
        inputs=inputs,
        outputs={
            tensor.name: given.get(tensor.name, f"{space or spec.name}.{tensor.name}")
            for tensor in part.outputs
        },
        stage=stage,
        cache=cache,
    )


def _range_launch(
    spec: GraphSpec,
    profiles: Sequence[Profile],
    sources: Mapping[str, str],
    *,
    new: str,
    stage: int = 0,
    label: str | None = None,
    space: str | None = None,
) -> Launch:
    """Return a launch of a layer range that writes its new rows to the stack ``new``."""
    past = [name for name in spec.input_names if name.startswith(graph_io.PAST_PREFIX)]
    present = [tensor.name for tensor in spec.outputs if tensor.name.startswith(graph_io.PRESENT_PREFIX)]
    cache = f"cache.{spec.name}"
    caches = {name: f"{cache}[{index}]" for index, name in enumerate(past)}
    outputs = {name: f"{new}[{index}]" for index, name in enumerate(present)}
    return _launch(
        spec,
        profiles,
        {**sources, **caches},
        outputs=outputs,
        label=label,
        stage=stage,
        space=space,
        cache=cache,
    )


def _images(spec: GraphSpec, known: Mapping[str, str]) -> dict[str, str]:
    """Return the places of a graph's inputs before the decoder: those of earlier outputs, or of an image."""
    return {name: known.get(name, f"image.{name}") for name in spec.input_names}


def _kept(spec: GraphSpec) -> dict[str, str]:
    names = (graph_io.KEPT_PATCHES, graph_io.KEPT_TOKENS)
    return {tensor.name: f"kept.{spec.name}" for tensor in spec.outputs if tensor.name in names}


def _entering(select: GraphSpec) -> dict[str, str]:
    """Return the places of what enters the layer range and the stage after a select graph, by their input's name."""
    return {
        tensor.name.removeprefix("kept_"): f"{select.name}.{tensor.name}"
        for tensor in select.outputs
        if tensor.name not in graph_io.SELECT_RESULTS
    }


def _no_planes(spec: GraphSpec) -> dict[str, str]:
    """Return the source of DeepStack planes of text, which has none."""
    return {name: "zeros.plane" for name in spec.input_names if name.startswith(graph_io.DEEPSTACK)}


def _capacity(spec: GraphSpec) -> int:
    return max(profile.sizes.get("C", 0) for profile in spec.profiles)
