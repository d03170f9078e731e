"""The graphs of a bundle before they are traced: modules, tensors and sizes, and the programs that run the graphs.

Each tensor is said once, with its shape and its place: where it comes from, or goes to, in the program that runs its graph
first. ``trio_edge.runtime.bundle.manifest`` describes places.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, cast, final

import msgspec
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from trio_edge.export.graphs.attention import DecoderRange, RotaryTables
from trio_edge.export.graphs.head import Head
from trio_edge.export.graphs.probe import Probe, Saliency
from trio_edge.export.graphs.reduce import FEATURE_NAMES, Reduce
from trio_edge.export.graphs.select import Select
from trio_edge.export.quantize.unpacking import read_weight
from trio_edge.export.tracing import tables
from trio_edge.runtime.bundle import graph_io as io
from trio_edge.runtime.bundle.manifest import (
    CACHE,
    SLOT_STATES,
    SLOTS,
    STATES,
    GraphSpec,
    Launch,
    Profile,
    Program,
    TensorSpec,
    shape_at,
    stacks_of,
)
from trio_edge.trio.decoder_layers import is_zero_centered
from trio_edge.trio.methods import stage_method, token_method
from trio_edge.trio.saliency import CandidateHead, ProbeHead, key_value_gram
from trio_edge.trio.selectors.interface import stage_selector

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.export.families.clip import ClipGraphs
    from trio_edge.export.plan import ExportPlan
    from trio_edge.runtime.bundle.manifest import DType, PieceName, ProgramName, Role
    from trio_edge.trio.methods import TokenMethod
    from trio_edge.trio.saliency import ProxySaliency
    from trio_edge.trio.selectors.interface import OtherInput


_NEW = "new_"
"""Before the name of the states that a launch replaces: the stack of the new ones."""


class _Tensor(NamedTuple):
    """An input or output of a graph, and its place in the program that runs the graph first."""

    spec: TensorSpec
    place: str


def _tensor(name: str, place: str, shape: tuple[int | str, ...], dtype: DType = "int32") -> _Tensor:
    """Return a tensor; after a place that ends with a dot comes its name."""
    return _Tensor(TensorSpec(name=name, dtype=dtype, shape=shape), place + name * place.endswith("."))


@dataclass(frozen=True, slots=True)
class Outline:
    """A graph, or a piece of one, before it is traced."""

    spec: GraphSpec
    """Pieces of one graph have its name and role."""
    places: Mapping[str, str]
    """Place of each input and output in the program that runs the graph first."""
    profiles: Sequence[str]
    """Profile at each size of that program."""
    module: nn.Module
    """Its ``forward`` takes the inputs in order."""
    piece: PieceName | None = None
    constants: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Values of buffers besides rotary frequencies; under FakeTensorMode buffers have none."""


@final
class Wiring:
    """All graphs and programs of a bundle.

    TRIO's probe is in three pieces (``export/graphs/probe.py``). The two halves are pieces of the layer range after the stage,
    and the gradient between them is a piece of the head. If these are quantized, backward half and gradient are graphs of their
    own.
    """

    def __init__(
        self, plan: ExportPlan, *, is_quantized: Callable[[Role], bool], bundle: ExportPlan | None = None
    ) -> None:
        """Describe the graphs; called under FakeTensorMode.

        ``is_quantized`` tells whether the linear layers of a role are going to be quantized. ``plan`` is one level of
        ``bundle``; by default there is no other.
        """
        levels = [level.layout for level in (bundle or plan).levels]
        self._splits = max((layout.schedule.layers for layout in levels), key=len)
        """First layer of each layer range after the first, the same in all levels."""
        self._of_levels = [layout for layout in levels if layout.schedule.stages]
        self._plan, self._model, self._layout = plan, plan.model, plan.layout
        self._dimensions, self._dtype = plan.dimensions, plan.layout.dtype
        self._is_quantized = is_quantized
        layout, num_planes = plan.layout, plan.model.vision.num_deepstack
        self._method = stage_method(plan.layout.schedule.method)
        """The method of all stages."""
        self._prompts = [(rows, bucket) for rows in layout.visual_sizes for bucket in layout.text_buckets]
        """Visual rows and text bucket of each prefill."""
        self._at = {
            io.HIDDEN: "rows.embeds",
            io.POSITIONS: "prompt.position_ids",
            io.VISUAL_ROWS: "prompt.visual_rows",
            io.VISUAL_IMAGES: "prompt.visual_images",
            **{f"{io.DEEPSTACK}{plane}": f"rows.deepstack.{plane}" for plane in range(num_planes)},
        }
        """Place of each input that the next graph of a prefill may read from the graph before."""
        buckets = layout.text_buckets
        small = [rows for rows in io.SMALL_FOLLOW_UPS if rows < buckets[0]]
        self._follow_rows = [*small, *buckets] if plan.options.follow_ups else []
        """Rows of a question that follows KV rows, as it is shorter than a prompt."""
        # a state cannot take back a wrong draft
        most = 1 if plan.dimensions.linear else min(plan.options.decode_rows, layout.max_new_tokens)
        self._steps = {_step_name(rows): rows for rows in io.STEP_ROWS if rows <= most}
        """Rows of a decode step, by profile."""
        self._batch = plan.options.batch
        """Answers that decode together."""
        self._has_answers = self._batch > 1 or plan.dimensions.linear is not None
        """Whether layer ranges have an axis of answers; without answers, as for a probe, states have no elements."""
        self._sizes = {
            "width": self._dimensions.hidden_size,
            "vocab": self._dimensions.vocab_size,
            "axes": plan.model.position_axes,
            "heads": self._dimensions.num_heads,
            "keys": self._dimensions.num_kv_heads * self._dimensions.head_size,
            "candidates": io.num_candidates(self._dimensions),
        }
        self._launches: defaultdict[ProgramName, list[Launch]] = defaultdict(list)
        self.graphs: list[Outline] = []
        """In the order of a prefill; pieces of one graph follow each other, first the one with the graph's role."""
        self._describe_vision()
        if plan.clip_graphs is not None:
            self._describe_clip(plan.clip_graphs)
        if plan.selector is not None and plan.options.token_method is not None:
            self._describe_reduction(plan.selector, token_method(plan.options.token_method))
        self._describe_decoder()

    def programs(
        self, whole: Sequence[GraphSpec] = (), names: Mapping[tuple[str, str], str] = MappingProxyType({})
    ) -> tuple[Program, ...]:
        """Return the programs.

        In a bundle with several levels ``whole`` has all graphs and pieces, and ``names`` the name of each graph's profile
        that is called otherwise there.
        """
        specs = whole or [graph.spec for graph in self.graphs]
        prompts = [{"N": rows, "T": bucket} for rows, bucket in self._prompts]
        images = {
            graph.spec.role: [profile.sizes for profile in graph.spec.profiles] for graph in self.graphs
        }
        sizes: dict[ProgramName, list[dict[str, int]]] = {
            "vision": images["vision"],
            "reduce": images.get("reduce", []),
            "prefill": prompts,
            "question": [{"T": rows} for rows in self._follow_rows],
            "branch": [{"T": rows} for rows in self._follow_rows],
            "decode": [{"T": rows} for rows in self._steps.values()],
            "batch": [{"B": self._batch}],
            "exact": prompts,
        }
        return tuple(
            Program(
                name=name,
                sizes=tuple(runs_at),
                launches=tuple(_with_zeros(launch, specs, names) for launch in launches),
            )
            for name, runs_at in sizes.items()
            if (launches := self._launches[name])
        )

    def _run(
        self,
        program: ProgramName,
        graph: Outline,
        instead: Mapping[str, str] | None = None,
        *,
        profiles: Sequence[str] | None = None,
        label: str | None = None,
        stage: int = 0,
    ) -> None:
        """Let ``program`` run ``graph`` next, with its own places and profiles or those given; for the rest see ``Launch``."""
        spec, places = graph.spec, {**graph.places, **(instead or {})}
        outputs = {tensor.name: places[tensor.name] for tensor in spec.outputs}
        launch = Launch(
            runs=spec.name,
            label=label or spec.name,
            profiles=tuple(profiles or graph.profiles),
            inputs={tensor.name: places[tensor.name] for tensor in spec.inputs},
            outputs=outputs,
            stage=stage,
            cache=(SLOTS if program == "batch" else CACHE) + spec.name if spec.num_layers else None,
            states={
                name: name.removeprefix(_NEW)
                for name in stacks_of(outputs)
                if name.removeprefix(_NEW).startswith((STATES, SLOT_STATES))
            },
        )
        self._launches[program].append(launch)

    def _tensors(
        self, rows: Sequence[tables.Row], has: Sequence[str] = (), **own: int | str
    ) -> list[_Tensor]:
        """Return the tensors of a table; ``own`` has sizes and parts of places besides those of the model."""
        sizes: dict[Any, Any] = {**self._sizes, **own}
        return [
            _tensor(
                row.name,
                self._at[row.place[1:]] if row.place[0] == "@" else row.place.format(**own),
                tuple(sizes.get(axis, axis) for axis in row.shape),
                self._dtype if row.dtype == "model" else row.dtype,
            )
            for row in rows
            if row.when in ("", *has)
        ]

    # Before the decoder

    def _describe_vision(self) -> None:
        vision, layout = self._model.vision, self._layout
        kept = (io.KEPT_PATCHES, io.KEPT_TOKENS)
        graph = _outline(
            "vision",
            "vision",
            [_Tensor(spec, f"image.{spec.name}") for spec in vision.inputs],
            [
                _Tensor(spec, "kept.vision" if spec.name in kept else f"vision.{spec.name}")
                for spec in vision.outputs
            ],
            [
                Profile(name="_".join(f"{axis.lower()}{n}" for axis, n in sizes.items()), sizes=dict(sizes))
                for sizes in layout.vision_sizes
            ],
            vision.module,
            constants=vision.constants,
        )
        self.graphs.append(graph)
        self._run("vision", graph)

    def _describe_clip(self, clip: ClipGraphs) -> None:
        """Describe CLIP's text tower, which runs when tokens are selected."""
        layout = self._layout
        texts = ("M", clip.text.position_embedding.num_embeddings, clip.projection_size)
        graph = _outline(
            io.CLIP_TEXT,
            io.CLIP_TEXT,
            [_tensor(io.CLIP_IDS, "image.", texts[:2])],
            [_tensor(io.CLIP_TEXTS, f"{io.CLIP_TEXT}.", texts, self._dtype)],
            [Profile(name=f"m{count}", sizes={"M": count}) for count in layout.clip_texts],
            clip.text,
            at_sizes=[f"m{count}" for _ in layout.vision_rows for count in layout.clip_texts],
        )
        self.graphs.append(graph)
        self._run("reduce", graph)

    def _describe_reduction(self, selector: Any, row: TokenMethod) -> None:
        """Describe the selector before the decoder."""
        layout, dtype = self._layout, self._dtype
        before = {
            spec.name: _Tensor(spec, graph.places[spec.name])
            for graph in self.graphs
            for spec in graph.spec.outputs
        }
        width = self._dimensions.hidden_size
        kept: tuple[int, int] = (selector.num_keep, width)
        has_clip = self._plan.clip_graphs is not None
        reads_text = row.reads_text and not has_clip
        inputs = [
            before[io.VISUAL_TOKENS],
            _tensor(io.NUM_VISUAL, "image.", (1,)),
            _tensor(io.IS_NEWLINE, "image.", ("N",)),
        ]
        if row.reads_features:
            inputs += [before[name] for name in FEATURE_NAMES]
        if reads_text:
            inputs.append(_tensor(io.TEXT_EMBEDS, "image.", ("T", width), dtype))
            inputs.append(_tensor(io.NUM_TEXT, "image.", (1,)))
        if has_clip:
            texts = before[io.CLIP_TEXTS]
            marks = _tensor(io.TEXT_MARKS, "image.", texts.spec.shape[:2])
            inputs += [before[io.CLIP_PATCHES], texts, marks]
        if row.reads_previous:
            inputs.append(_tensor(io.PREVIOUS_TOKENS, "image.", ("N", width), dtype))
            inputs.append(_tensor(io.HAS_PREVIOUS, "image.", (1,)))
        planes = range(self._model.vision.num_deepstack)
        inputs += [before[f"{io.DEEPSTACK_TOKENS}{plane}"] for plane in planes]
        counts = [{"M": count} for count in layout.clip_texts]
        if not counts and reads_text:
            counts = [{"T": bucket} for bucket in layout.text_buckets]
        graph = _outline(
            "reduce",
            "reduce",
            inputs,
            [
                _tensor(io.REDUCED_TOKENS, "reduce.", kept, dtype),
                _tensor(io.KEPT_TOKENS, "kept.reduce", kept[:1]),
                *(_tensor(f"{io.REDUCED_DEEPSTACK}{plane}", "reduce.", kept, dtype) for plane in planes),
            ],
            [
                Profile(name="+".join([f"n{rows}", *map(str, count.values())]), sizes={"N": rows, **count})
                for rows in layout.vision_rows
                for count in counts or [{}]
            ],
            Reduce(selector, others=[tensor.spec.name for tensor in inputs[3:]]),
        )
        self.graphs.append(graph)
        self._run("reduce", graph)

    # The decoder

    def _describe_decoder(self) -> None:
        starts = [0, *self._splits, self._dimensions.num_layers]
        ranges = [range(start, stop) for start, stop in zip(starts, starts[1:])]
        most = [layout.visual_sizes[-1] for layout in self._of_levels]
        selectors: list[Any] = [
            stage_selector(
                self._model,
                self._layout.schedule,
                stage=stage,
                max_visual=max(most) if stage == 0 else max(keeps[stage - 1] for keeps in self._keeps),
                max_images=self._layout.max_images,
                is_quantized=self._is_quantized(self._role(stage + 1)),
            )
            for stage in range(len(self._layout.schedule.stages))
        ]
        has_probes = self._method.has_probe and len(ranges) > 1
        heads = [self._head(is_shared=has_probes), *([self._gradient()] if has_probes else [])]
        for index, layers in enumerate(ranges):
            halves: list[Outline] = []
            if index > 0 and selectors:
                if has_probes:
                    halves = self._probe(index - 1, selectors[index - 1].saliency, *heads)
                self.graphs += [half for half in halves if half.piece is None]
                self.graphs.append(self._select(index - 1, selectors[index - 1]))
            piece: PieceName | None = "layers" if has_probes and index > 0 else None
            self.graphs.append(self._range(index, layers, piece=piece))
            self.graphs += [half for half in halves if half.piece is not None]
        self._run("prefill", heads[0], stage=len(selectors))
        top = {name: f"top.{name}" for name in (io.TOP_LOGITS, io.TOP_IDS)}
        step = {io.LAST_ROW: "step.rows", io.LOGITS: "logits.logits", **top}
        self._run("decode", heads[0], step, profiles=[*self._steps], stage=len(selectors))
        if self._batch > 1:
            step |= {io.LAST_ROW: "batch.rows"}
            self._run("batch", heads[0], step, profiles=[_step_name(self._batch)], stage=len(selectors))
        if follows := [profile.name for profile in self._follows(0)]:
            after = {io.HIDDEN: f"after_{len(self._splits)}.{io.HIDDEN_OUT}", io.LAST_ROW: "branch.last_row"}
            self._run("branch", heads[0], after, profiles=follows, label="branch", stage=len(selectors))
        self.graphs += heads

    def _max_visual(self, index: int) -> int:
        """Return the most visual rows of layer range ``index``: the largest N, or K of its stage."""
        layout = self._layout
        return layout.schedule.rows_of(len(self._splits) + 1, layout.visual_sizes[-1])[index]

    @property
    def _keeps(self) -> list[list[int]]:
        """K of each stage, for each level that has stages."""
        return [[stage.keep for stage in layout.schedule.stages] for layout in self._of_levels]

    def _select_name(self, stage: int) -> str:
        """Return the name of a select graph, which levels share that keep as many tokens there."""
        known = dict.fromkeys(pair for keeps in self._keeps for pair in enumerate(keeps))
        return f"select_{[*known].index((stage, self._layout.schedule.stages[stage].keep)) + 1}"

    def _selections_before(self, index: int) -> int:
        """Return the selections before layer range ``index``: none at a level that keeps all."""
        return min(index, len(self._layout.schedule.stages))

    def _role(self, index: int) -> Role:
        if index == 0:
            return "prefix"
        return "suffix" if index == len(self._splits) else "segment"

    def _name(self, index: int) -> str:
        role = self._role(index)
        return f"segment_{index}" if role == "segment" else role

    def _rotary(self) -> RotaryTables:
        frequencies = torch.empty(self._model.inv_freq.shape, dtype=torch.float32)
        return RotaryTables(frequencies, attention_scaling=self._model.attention_scaling)

    def _prefills(
        self,
        index: int,
        sizes: Callable[[int, int, int], dict[str, int]],
        *,
        label: str = "prefill",
        by_prompt: bool = False,
    ) -> tuple[list[Profile], list[str]]:
        """Return the profiles of a graph that reads what enters layer range ``index``, and those at each prompt's sizes.

        ``sizes`` gets the prompt's visual rows, those that enter, and the text bucket. After a stage the former only matter
        ``by_prompt``.
        """
        is_reduced = index > 0 and len(self._layout.schedule.stages) > 0
        entering = self._max_visual(index) if is_reduced else None
        by_rows = by_prompt if is_reduced else len(self._layout.visual_sizes) > 1
        found: dict[str, Profile] = {}
        prompts = sorted(self._prompts, key=lambda prompt: prompt[1]) if is_reduced else self._prompts
        for rows, bucket in prompts:
            name = f"{label}_{rows}+{bucket}" if by_rows else f"{label}_{bucket}"
            made = sizes(rows, entering or rows, bucket)
            # few visual rows and a long text may be as many rows as others
            if made not in (one.sizes for one in found.values()):
                found[name] = Profile(name=name, sizes=made)
        wanted = [sizes(rows, entering or rows, bucket) for rows, bucket in self._prompts]
        at_sizes = [next(one.name for one in found.values() if one.sizes == given) for given in wanted]
        return list(found.values()), at_sizes

    def _follows(self, capacity: int) -> list[Profile]:
        """Return the profiles of a question's rows after KV rows; none without --follow-ups."""
        return [
            Profile(name=f"follow_{rows}", sizes={"S": rows, "C": capacity}) for rows in self._follow_rows
        ]

    def _range(self, index: int, layers: range, *, piece: PieceName | None) -> Outline:
        """Describe decoder layers; DeepStack planes, one for each of the model's first layers, are the last inputs."""
        layout, dims, dtype, name = self._layout, self._dimensions, self._dtype, self._name(index)
        batch, answers = ("B", "several answers") if self._has_answers else (1, "one answer")
        rows = (batch, "S", dims.hidden_size)
        kept, made = self._kept(name, layers, batch)
        planes = [f"{io.DEEPSTACK}{layer}" for layer in layers if layer < self._model.vision.num_deepstack]
        has = ["later" if index else "first", answers, *(["states"] if dims.linear else [])]
        inputs = self._tensors(tables.RANGE_INPUTS, has, batch=batch, index=index) + kept
        inputs += [_tensor(plane, self._at[plane], rows, dtype) for plane in planes]
        outputs = [_tensor(io.HIDDEN_OUT, f"{name}.", rows, dtype), *made]
        if index < len(self._splits) and self._method.reads_previous:
            outputs.append(_tensor(io.PREVIOUS, f"{name}.", rows, dtype))
        capacity = self._max_visual(index) + layout.text_buckets[-1] + layout.max_new_tokens
        questions = self._follows(capacity)
        steps = [Profile(name=name, sizes={"S": rows, "C": capacity}) for name, rows in self._steps.items()]
        prefills, at_sizes = self._prefills(index, lambda _all, rows, text: {"S": rows + text, "C": 0})
        profiles = [*prefills, *questions, *steps]
        if self._has_answers:
            profiles = [Profile(name=one.name, sizes={"B": 1, **one.sizes}) for one in profiles]
        if self._batch > 1:
            profiles.append(Profile(name="batch", sizes={"B": self._batch, "S": 1, "C": capacity}))
        graph = _outline(
            name,
            self._role(index),
            inputs,
            outputs,
            profiles,
            DecoderRange([self._model.layers[layer] for layer in layers], self._rotary()),
            at_sizes=at_sizes,
            piece=piece,
            first_layer=layers.start,
            num_layers=len(layers),
        )
        self._run_range(index, graph, [profile.name for profile in questions])
        self._at |= {io.HIDDEN: f"{name}.{io.HIDDEN_OUT}", io.PREVIOUS: f"{name}.{io.PREVIOUS}"}
        return graph

    def _kept(self, name: str, layers: range, batch: int | str) -> tuple[list[_Tensor], list[_Tensor]]:
        """Return what a layer range reads of earlier rows, two tensors for each layer, and what it returns of the new ones."""
        dims, linear = self._dimensions, self._dimensions.linear
        past, new = ((batch, dims.num_kv_heads, axis, dims.head_size) for axis in ("C", "S"))
        kept, made, cached, states = [], [], 0, 0
        for layer in layers:
            if layer not in dims.linear_layers:
                for part in ("key", "value"):
                    read, written = f"{io.PAST_PREFIX}{layer}.{part}", f"{io.PRESENT_PREFIX}{layer}.{part}"
                    kept.append(_tensor(read, f"{CACHE}{name}[{cached}]", past, self._dtype))
                    made.append(_tensor(written, f"new_rows[{cached}]", new, self._dtype))
                    cached += 1
                continue
            assert linear is not None, "it has these layers"
            for part, (_, *sizes) in linear.shapes().items():
                dtype: DType = "float32" if part == "delta" else self._dtype
                read, written = f"{io.PAST_STATES}{layer}.{part}", f"{io.PRESENT_STATES}{layer}.{part}"
                kept.append(_tensor(read, f"zeros.{part}", (batch, *sizes), dtype))
                made.append(
                    _tensor(written, f"{_NEW}{STATES}{name}.{part}[{states}]", (batch, *sizes), dtype)
                )
            states += 1
        return kept, made

    def _states(self, graph: Outline, to: str = STATES) -> dict[str, str]:
        """Return the places of a range's states, in ``to``, where it goes on after earlier rows."""
        made = {
            name.removeprefix(io.PRESENT_STATES): place.removeprefix(f"{_NEW}{STATES}")
            for name, place in graph.places.items()
            if name.startswith(io.PRESENT_STATES)
        }
        read = {f"{io.PAST_STATES}{part}": to + place for part, place in made.items()}
        return read | {f"{io.PRESENT_STATES}{part}": _NEW + to + place for part, place in made.items()}

    def _run_range(self, index: int, graph: Outline, questions: Sequence[str]) -> None:
        """Let prefill, decode and, at the profiles ``questions``, later questions run layer range ``index``."""
        name = graph.spec.name
        new = [tensor.name for tensor in graph.spec.outputs if tensor.name.startswith(io.PRESENT_PREFIX)]
        planes = [tensor.name for tensor in graph.spec.inputs if tensor.name.startswith(io.DEEPSTACK)]
        no_planes = dict.fromkeys(planes, "zeros.plane")
        self._run("prefill", graph, stage=self._selections_before(index))
        if questions:
            self._run_question(index, graph, questions, new, no_planes)
        before = {io.HIDDEN: f"{self._name(index - 1)}.{io.HIDDEN_OUT}"}

        def step(sent: str, rows: str) -> dict[str, str]:
            return {
                **(before if index else {io.EMBEDS: f"{sent}.embeds"}),
                io.POSITIONS: f"{sent}.position_ids.{index}",
                io.PAST_LENGTH: f"{sent}.past_length.{index}",
                io.NUM_ROWS: f"{sent}.num_rows",
                **{part: f"{rows}.{name}[{i}]" for i, part in enumerate(new)},
                **no_planes,
                **self._states(graph, SLOT_STATES if sent == "batch" else STATES),
            }

        stage = self._selections_before(index)
        self._run("decode", graph, step("step", "new_row"), profiles=[*self._steps], stage=stage)
        if self._batch > 1:
            past = [tensor.name for tensor in graph.spec.inputs if tensor.name.startswith(io.PAST_PREFIX)]
            slots = {part: f"slots.{name}[{i}]" for i, part in enumerate(past)}
            self._run("batch", graph, step("batch", "batch_row") | slots, profiles=["batch"], stage=stage)

    def _run_question(
        self,
        index: int,
        graph: Outline,
        profiles: Sequence[str],
        new: Sequence[str],
        planes: Mapping[str, str],
    ) -> None:
        """Let a later question run layer range ``index`` after kept rows, and the first one also for its own program."""
        question = {
            io.EMBEDS: "question.embeds",
            io.POSITIONS: "question.position_ids",
            io.PAST_LENGTH: "question.past_length",
            io.NUM_ROWS: "question.num_rows",
            io.HIDDEN_OUT: f"after.{io.HIDDEN_OUT}",
            io.PREVIOUS: f"after.{io.PREVIOUS}",
            **{part: f"question_rows[{i}]" for i, part in enumerate(new)},
            **planes,
            **self._states(graph),
        }
        if index == 0:
            self._run("question", graph, question, profiles=profiles, label="question")
        question |= {
            io.EMBEDS: "branch.embeds",
            io.HIDDEN: f"after_{index - 1}.{io.HIDDEN_OUT}",
            io.POSITIONS: f"branch.position_ids.{index}",
            io.PAST_LENGTH: f"branch.past_length.{index}",
            io.NUM_ROWS: "branch.num_rows",
            io.HIDDEN_OUT: f"after_{index}.{io.HIDDEN_OUT}",
            io.PREVIOUS: f"after_{index}.{io.PREVIOUS}",
        }
        before = self._selections_before(index)
        self._run("branch", graph, question, profiles=profiles, label="branch", stage=before)

    def _select(self, stage: int, selector: Any) -> Outline:
        schedule, method, name = self._layout.schedule, self._method, f"select_{stage + 1}"
        keep, layer = schedule.stages[stage].keep, schedule.stages[stage].layer
        flags = "reads_previous", "reads_prompt", "has_probe"
        has = [schedule.budget, *(flag for flag in flags if getattr(method, flag))]
        inputs = self._tensors(tables.SELECT_INPUTS, has, stage=stage)
        outputs = self._tensors(tables.SELECT_OUTPUTS, has, stage=stage, name=name, keep=keep)
        own_inputs: Mapping[str, OtherInput] = getattr(selector, "other_inputs", {})
        inputs += [
            _tensor(own, other.place, other.shape, cast("DType", other.dtype))
            for own, other in own_inputs.items()
        ]
        for plane in range(layer, self._model.vision.num_deepstack):
            entering = f"{io.DEEPSTACK}{plane}"
            rows, kept = ((1, axis, self._dimensions.hidden_size) for axis in "SR")
            inputs.append(_tensor(entering, self._at[entering], rows, self._dtype))
            outputs.append(_tensor(f"{io.KEPT_DEEPSTACK}{plane}", f"{name}.", kept, self._dtype))
        reads_prompt = any("F" in tensor.spec.shape for tensor in inputs)

        def sizes(whole: int, rows: int, bucket: int) -> dict[str, int]:
            own = {"N": rows, "S": rows + bucket, "R": keep + bucket}
            return {**own, "F": whole + bucket} if reads_prompt else own

        others = [tensor.spec.name for tensor in inputs[5:]]
        profiles, at_sizes = self._prefills(stage, sizes, by_prompt=reads_prompt)
        module = Select(
            selector, self._rotary(), preserve_positions=schedule.positions == "preserved", others=others
        )
        graph = _outline(
            self._select_name(stage),
            "select",
            inputs,
            outputs,
            profiles,
            module,
            at_sizes=at_sizes,
            first_layer=layer,
        )
        self._run("prefill", graph, label=name, stage=stage)
        launch = self._launches["prefill"][-1]
        self._launches["exact"].append(msgspec.structs.replace(launch, runs="exact_nms", profiles=()))
        self._at |= {
            tensor.spec.name.removeprefix("kept_"): tensor.place
            for tensor in outputs
            if tensor.spec.name not in io.SELECT_RESULTS
        }
        return graph

    def _probe(self, stage: int, probe: ProxySaliency, head: Outline, gradient: Outline) -> list[Outline]:
        """Describe the halves of a stage's probe; the head's gradient runs between them."""
        forward, backward = self._half(stage, "probe", probe), self._half(stage, "saliency", probe)
        label = f"select_{stage + 1}"
        self._run("prefill", forward, label=label, stage=stage)
        if self._is_quantized("head"):
            self._run_candidates(head, gradient, label=label, stage=stage)
        self._run("prefill", gradient, label=label, stage=stage)
        self._run("prefill", backward, label=label, stage=stage)
        return [forward, backward]

    def _half(self, stage: int, name: PieceName, probe: ProxySaliency) -> Outline:
        """Describe one half of a stage's probe, a piece of the next layer range or a graph of its own."""
        schedule, role = self._layout.schedule, self._role(stage + 1)
        layer, is_forward = schedule.stages[stage].layer, name == "probe"
        has, state = ["needs_keys"] if probe.needs_keys else [], sum(probe.state_widths)
        inputs, outputs = (self._tensors(rows, has, stage=stage, state=state) for rows in tables.HALVES[name])
        constants = {}
        if probe.form != "direct" and not is_forward:
            constants["saliency.key_value_gram"] = _gram(self._plan.source.checkpoint, layer, probe.layer)
        letter, num_rows = "P" if is_forward else "G", schedule.num_probe_rows
        profiles, at_sizes = self._prefills(
            stage,
            lambda _all, rows, text: {f"{letter}S": rows + text, f"{letter}N": rows, f"{letter}R": num_rows},
            label=name,
        )
        is_alone = not is_forward and self._is_quantized(role)
        return _outline(
            f"probe_{stage + 1}" if is_alone else self._name(stage + 1),
            "probe" if is_alone else role,
            inputs,
            outputs,
            profiles,
            (Probe if is_forward else Saliency)(probe, self._rotary()),
            at_sizes=at_sizes,
            piece=None if is_alone else name,
            first_layer=layer,
            constants=constants,
        )

    def _run_candidates(self, head: Outline, gradient: Outline, *, label: str, stage: int) -> None:
        """Let a prefill find the likeliest tokens of the probe rows and their rows of a quantized head."""
        entering = {io.HIDDEN: "entering.hidden_states", io.LAST_ROW: "entering.rows"}
        found = {name: f"found.{name}" for name in (io.TOP_LOGITS, io.TOP_IDS)}
        output = {io.PROBE_OUTPUT: gradient.places[io.PROBE_OUTPUT]}
        likeliest = {name: gradient.places[name] for name in (io.CANDIDATE_LOGITS, io.CANDIDATE_ROWS)}
        launches = self._launches["prefill"]
        launches.append(Launch(runs="enter_head", label=label, stage=stage, inputs=output, outputs=entering))
        name = io.CANDIDATES if self._layout.schedule.num_probe_rows > 1 else "decode"
        self._run(
            "prefill",
            head,
            {**entering, **found, io.LOGITS: f"head.{io.LOGITS}"},
            profiles=[name] * len(self._prompts),
            label=label,
            stage=stage,
        )
        launches.append(
            Launch(runs="likeliest_rows", label=label, stage=stage, inputs=found, outputs=likeliest)
        )

    def _head(self, *, is_shared: bool) -> Outline:
        """Describe the head, which probes may share."""
        count, num_rows = io.num_candidates(self._dimensions), self._layout.schedule.num_probe_rows
        last = len(self._splits)
        steps = self._steps | ({_step_name(self._batch): self._batch} if self._batch > 1 else {})
        more = [Profile(name=name, sizes={"S": rows, "L": rows}) for name, rows in steps.items()]
        more += [Profile(name=one.name, sizes={"S": one.sizes["S"], "L": 1}) for one in self._follows(0)]
        is_quantized = is_shared and self._is_quantized("head")
        if is_quantized and num_rows > 1:  # one row is as in decode
            more.append(Profile(name=io.CANDIDATES, sizes={"S": num_rows, "L": num_rows}))
        prefills, at_sizes = self._prefills(last, lambda _all, rows, text: {"S": rows + text, "L": 1})
        return _outline(
            "head",
            "head",
            self._tensors(tables.HEAD_INPUTS, name=self._name(last)),
            self._tensors(tables.HEAD_OUTPUTS, [self._plan.options.outputs]),
            [*prefills, *more],
            Head(
                self._model.final_norm,
                self._model.lm_head,
                num_candidates=count,
                has_hidden=self._plan.options.outputs == "hidden",
            ),
            at_sizes=at_sizes,
            piece="logits" if is_shared and not is_quantized else None,
        )

    def _gradient(self) -> Outline:
        """Describe the head's gradient; that of a quantized head gets the rows of the likeliest tokens."""
        norm, is_alone = self._model.final_norm, self._is_quantized("head")
        inputs = self._tensors(tables.GRADIENT_INPUTS, ["quantized"] if is_alone else [])
        return _outline(
            "gradient" if is_alone else "head",
            "probe" if is_alone else "head",
            inputs,
            self._tensors(tables.GRADIENT_OUTPUTS),
            [Profile(name="gradient", sizes={"GR": self._layout.schedule.num_probe_rows})],
            CandidateHead(norm) if is_alone else ProbeHead(norm, self._model.lm_head),
            at_sizes=["gradient"] * len(self._prompts),
            piece=None if is_alone else "gradient",
        )


def _step_name(num_rows: int) -> str:
    return f"decode_{num_rows}" if num_rows > 1 else "decode"


def _with_zeros(launch: Launch, graphs: Sequence[GraphSpec], names: Mapping[tuple[str, str], str]) -> Launch:
    """Return the launch of a whole graph: inputs of other pieces read zeros, if they have elements."""
    profiles = tuple(names.get((launch.runs, name), name) for name in launch.profiles)
    launch = msgspec.structs.replace(launch, profiles=profiles)
    specs = [spec for spec in graphs if spec.name == launch.runs]
    if len(specs) < 2:
        return launch
    profile = next(one for spec in specs for one in spec.profiles if one.name in launch.profiles)
    inputs = {
        tensor.name: launch.inputs.get(tensor.name, f"zeros.{tensor.name}")
        for spec in specs
        for tensor in spec.inputs
        if tensor.name in launch.inputs or 0 not in shape_at(tensor.shape, profile)
    }
    return msgspec.structs.replace(launch, inputs=inputs)


def _outline(
    name: str,
    role: Role,
    inputs: Sequence[_Tensor],
    outputs: Sequence[_Tensor],
    profiles: Sequence[Profile],
    module: nn.Module,
    *,
    at_sizes: Sequence[str] | None = None,
    piece: PieceName | None = None,
    first_layer: int | None = None,
    num_layers: int = 0,
    constants: Mapping[str, NDArray[Any]] = MappingProxyType({}),
) -> Outline:
    """Return a graph; its first program runs at all of ``profiles``, or at those named ``at_sizes``."""
    spec = GraphSpec(
        name=name,
        role=role,
        file=f"{name}.onnx" if piece is None else f"{name}.{piece}.onnx",
        inputs=tuple(tensor.spec for tensor in inputs),
        outputs=tuple(tensor.spec for tensor in outputs),
        weight_bytes=0,  # known when the graph is written
        profiles=tuple(profiles),
        first_layer=first_layer,
        num_layers=num_layers,
    )
    places = {tensor.spec.name: tensor.place for tensor in (*inputs, *outputs)}
    at_sizes = at_sizes or [profile.name for profile in profiles]
    return Outline(spec, places, at_sizes, module, piece, constants)


def _gram(checkpoint: Checkpoint, index: int, layer: Any) -> NDArray[Any]:
    prefix, norm = f"language_model.layers.{index}", layer.input_layernorm
    norm_name = next(name for name, part in layer.named_children() if part is norm)
    with unset_fake_temporarily():
        key, value, weight = (
            read_weight(checkpoint, f"{prefix}.{name}.weight")
            for name in ("self_attn.k_proj", "self_attn.v_proj", norm_name)
        )
        if is_zero_centered(norm):
            weight = 1.0 + weight.to(torch.promote_types(weight.dtype, torch.float32))
        gram: NDArray[Any] = key_value_gram(key, value, weight).to(torch.float32).numpy()
        return gram
