"""The manifest (``trio.json``), the only description of a bundle. Export writes it once, everything else reads it.

It describes graphs, and programs that run them one after the other. Each tensor of a launch has a place: device memory with a
name. So the place of an input says where the tensor comes from: from an earlier launch, or from the host. The runtime checks
the programs, allocates their places and obeys. It need not know what a tensor means, so it runs selectors that are newer than
itself.

``prefix.hidden_states_out``  a tensor; by convention the graph's name and the output's
``new_rows[3]``               one of several equal tensors in a row, a stack
``cache.prefix[3]``           keys or values of a layer in a KV cache: a stack that launches read and rows are appended to
``states.prefix.delta[1]``    a state of a layer with linear attention, which new ones replace after a launch
``zeros.plane``               never written, always zero
``prompt.length.0``           sent by the host before the program runs, see ``checks.SENT_BY_HOST``
``results.scores.0``          read by the host afterwards, see ``checks.READ_BY_HOST``

Two launches may write the same place; the later one replaces what the earlier one wrote.

Symbols in shapes: N visual tokens (padded), S sequence rows of a graph (padded), C rows of its KV cache, R rows of the
sequence after a selection (padded). Vision graphs also have B image tiles, or P patches and W windows; CLIP's text tower
has M texts. A probe has its own symbols: PS rows, PR probe rows and PN visual tokens in its forward half, GS, GR and GN in
its backward half. L is the number of rows of a head that a probe shares. All other axes are numbers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import msgspec

from trio_edge.runtime.bundle.generation import GenerationSettings
from trio_edge.runtime.bundle.limits import (
    Axis,
    Bytes,
    Digest,
    Extent,
    Layer,
    Name,
    Symbol,
    TokenId,
    Tokens,
    Work,
)
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

SCHEMA_VERSION = 6
MANIFEST_NAME = "trio.json"
DTYPE_BYTES = {"float32": 4, "float16": 2, "int32": 4, "int64": 8, "int8": 1, "float8_e4m3fn": 1}
"""Bytes per element."""

DType = Literal["float32", "float16", "int32", "int64", "int8"]
FloatType = Literal["float32", "float16"]
CacheType = Literal["float32", "float16", "int8"]
StoredType = Literal["float32", "float16", "int32", "int64", "int8", "int4", "float8_e4m3fn"]
"""Element types of arrays in weight files; INT4 stores two elements per byte, the first one in the low half."""
QuantizedFormat = Literal["int8", "fp8", "int4"]
Part = Literal["vision", "prefix", "segments", "suffix", "select", "head", "embedding", "kv"]
"""Parts of a bundle; each has its own quantization format."""
Role = Literal["vision", "clip_text", "reduce", "prefix", "probe", "select", "segment", "suffix", "head"]
PART_FROM_ROLE: dict[Role, Part] = {
    "vision": "vision",
    "prefix": "prefix",
    "segment": "segments",
    "suffix": "suffix",
    "select": "select",
    "head": "head",
}
"""Part of the graphs that can be quantized."""


LevelName: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}\Z")]
Place: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9_.]{1,200}(\[[0-9]{1,5}\])?\Z")]
HostFunction = Literal["enter_head", "likeliest_rows", "exact_nms"]
"""What the host does between two graphs: send probe rows to the head, look up the rows of the lm_head for the likeliest
tokens, or select in place of a select graph. See ``runtime/model``."""
ProgramName = Literal["vision", "reduce", "prefill", "question", "branch", "decode", "batch", "exact"]
"""Images to visual tokens; their selection before the decoder; the prompt; with --follow-ups a question after kept rows of the
first layer range, and other text after kept rows of all ranges; new tokens; with --batch a new token of each of several answers;
and the selection of each stage on the host, after which a prefill goes on."""

AUTO = "auto"
"""In place of a level's name: the lowest level that is sure enough."""
DEFAULT = "default"
"""Name of the only level of other bundles."""
ZEROS = "zeros."
CACHE = "cache."
SLOTS = "slots."
"""KV caches of the answers that decode together, in place of ``CACHE``."""
STATES, SLOT_STATES = "states.", "slot_states."
"""States of layers with linear attention, and those of the answers that decode together."""
JOINT = (
    *("prompt", "question", "branch", "step", "batch"),
    *("results", "top", "logits", "entering", "found", "likeliest"),
)
"""Namespaces whose places one copy moves between host and device."""
SINGLE = ("image", "kept", "hidden")
"""Namespaces whose places are copied one by one."""
SENT = (
    *("prompt", "rows", "question", "branch", "step", "batch"),
    *("entering", "likeliest", "image", "zeros", "cache", "slots", "states", "slot_states"),
)
"""Namespaces that no launch writes; rows of KV caches are appended, and states replaced, between launches."""


class _Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every manifest value: immutable, keyword-only, unknown keys rejected."""


class TensorSpec(_Spec, frozen=True):
    """Name, dtype and shape of one graph input or output."""

    name: Name
    dtype: DType
    shape: tuple[Axis | Symbol, ...]
    """Numbers, or one of the symbols of this module's head."""


class Profile(_Spec, frozen=True):
    """One set of fixed sizes that a graph runs at."""

    name: Name
    """"prefill_2928+64" (visual rows and text bucket), "prefill_64" where there is only one visual size, "decode" or, with as many
    rows, "decode_4"."""
    sizes: dict[Symbol, Extent]
    """Value of each symbol in the graph's shapes; symbols of other pieces are left out and count as 0."""


PieceName = Literal["layers", "logits", "probe", "gradient", "saliency"]


class Piece(_Spec, frozen=True):
    """One of several computations in a graph that read the same weights.

    A profile belongs to one piece. At this profile all sizes of the other pieces are 0, so they compute nothing.
    """

    name: PieceName
    file: Name
    """The piece as a separate ONNX graph, for backends that share weights between graphs."""
    inputs: tuple[Name, ...]
    outputs: tuple[Name, ...]
    profiles: tuple[Name, ...]
    weight_bytes: Bytes


class GraphSpec(_Spec, frozen=True):
    """One ONNX graph of the bundle."""

    name: Name
    role: Role
    file: Name
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    weight_bytes: Bytes
    """Bytes of weights that an engine of this graph holds."""
    first_layer: Layer | None = None
    """First decoder layer of a prefix, segment or suffix; for a probe or select graph, the layer whose input it scores."""
    num_layers: Layer = 0
    """Decoder layers that run in this graph, and own a KV cache or states."""
    opset: Layer | None = None
    """ONNX opset if it differs from the manifest's: quantized types need a later one."""
    pieces: tuple[Piece, ...] = ()
    """Computations in the graph; empty if there is only one."""

    def split(self) -> tuple[GraphSpec, ...]:
        """Return each piece as a separate graph, called ``graph.piece``; the graph itself if it has no pieces."""
        parts = (
            msgspec.structs.replace(
                self,
                name=f"{self.name}.{piece.name}",
                file=piece.file,
                inputs=tuple(tensor for tensor in self.inputs if tensor.name in piece.inputs),
                outputs=tuple(tensor for tensor in self.outputs if tensor.name in piece.outputs),
                profiles=tuple(profile for profile in self.profiles if profile.name in piece.profiles),
                weight_bytes=piece.weight_bytes,
                pieces=(),
            )
            for piece in self.pieces
        )
        return tuple(parts) or (self,)

    def at_profiles(self, names: Sequence[str]) -> GraphSpec:
        """Return the graph with only the profiles called ``names``, in this order."""
        known = {profile.name: profile for profile in self.profiles}
        pieces = tuple(
            msgspec.structs.replace(piece, profiles=tuple(name for name in names if name in piece.profiles))
            for piece in self.pieces
        )
        profiles = tuple(known[name] for name in names if name in known)
        return msgspec.structs.replace(self, profiles=profiles, pieces=pieces)

    def part_at(self, profile: Profile) -> GraphSpec:
        """Return the graph of ``split()`` that runs at ``profile``, one of this graph's profiles."""
        return next(part for part in self.split() if profile in part.profiles)

    @property
    def layers(self) -> range:
        """The decoder layers that run in this graph."""
        first = self.first_layer or 0
        return range(first, first + self.num_layers)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs in graph order."""
        return tuple(tensor.name for tensor in self.inputs)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Inputs, then outputs, in graph order."""
        return (*self.inputs, *self.outputs)

    def tensor(self, name: str) -> TensorSpec:
        """Return the input or output called ``name``."""
        return next(tensor for tensor in self.tensors if tensor.name == name)


def shape_at(shape: tuple[int | str, ...], profile: Profile) -> tuple[int, ...]:
    """Return a tensor's shape at a profile; symbols of other pieces are 0."""
    return tuple(profile.sizes.get(size, 0) if isinstance(size, str) else size for size in shape)


class StoredTensor(_Spec, frozen=True):
    """An array in one of the bundle's weight files."""

    file: Name
    dtype: StoredType
    shape: tuple[Axis, ...]
    offset: Bytes
    """Bytes from the start of the file."""

    @property
    def num_bytes(self) -> int:
        """Size of the array in bytes."""
        count = math.prod(self.shape)
        return (count + 1) // 2 if self.dtype == "int4" else count * DTYPE_BYTES[self.dtype]


class Quantization(_Spec, frozen=True):
    """The rounding of weights, and of keys and values in the KV caches."""

    formats: dict[Name, QuantizedFormat]
    """By ``Part``."""
    method: Literal["round-to-nearest", "awq", "smoothquant", "awq+smoothquant", "checkpoint"]
    """Method that found the scales; "checkpoint" if the checkpoint's own integers are used."""
    block_size: Tokens | None = None
    """Inputs per INT4 scale, in layers whose number of inputs is a multiple of it."""
    num_samples: Extent = 0
    """Samples that activations were collected from, without the tokens that the bundle's stages drop."""
    outliers: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """Share of the inputs of INT4 weights that stay in the bundle's element type."""
    inputs: tuple[Part, ...] = ()
    """Parts in INT8 or FP8 whose linear layers also have their inputs in that format."""


class FileEntry(_Spec, frozen=True):
    """A file of the bundle, with its size and hash."""

    path: Name
    """Relative to the bundle, forward slashes, no '..'."""
    num_bytes: Bytes
    sha256: Digest


class LinearAttention(_Spec, frozen=True):
    """Sizes of the layers that have states of fixed size in place of keys and values.

    They are Qwen3.5's GatedDeltaNet, or LFM2's short convolution, which has a width and no heads.
    """

    layers: tuple[Layer, ...]
    kernel_size: Axis
    """Rows that the convolution reaches."""
    width: Extent = 0
    """Channels of a short convolution."""
    num_key_heads: Extent = 0
    num_value_heads: Extent = 0
    key_size: Extent = 0
    value_size: Extent = 0

    @property
    def channels(self) -> int:
        """Width of what passes the convolution; in GatedDeltaNet queries, keys and values together."""
        return self.width + 2 * self.num_key_heads * self.key_size + self.num_value_heads * self.value_size

    def shapes(self, batch: int = 1) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a layer's states for ``batch`` answers: rows before the convolution, and the delta rule's."""
        found: dict[str, tuple[int, ...]] = {"conv": (batch, 1, self.kernel_size - 1, self.channels)}
        if not self.width:
            found["delta"] = (batch, self.num_value_heads, self.key_size, self.value_size)
        return found

    def state_bytes(self, *, element_bytes: int) -> int:
        """Return the bytes of a layer's states; those of the delta rule are float32."""
        conv, *delta = map(math.prod, self.shapes().values())
        return conv * element_bytes + 4 * sum(delta)


class Dimensions(_Spec, frozen=True):
    """Sizes of the decoder."""

    num_layers: Layer
    hidden_size: Axis
    num_heads: Axis
    num_kv_heads: Axis
    head_size: Axis
    intermediate_size: Axis
    vocab_size: Axis
    linear: LinearAttention | None = None
    """None if all layers have keys and values."""
    has_attention_gate: bool = False
    """Whether the query projection of attention also gives a gate of the heads' outputs."""

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """Layers with linear attention."""
        return () if self.linear is None else self.linear.layers

    def num_cached(self, layers: Iterable[int]) -> int:
        """Return how many of ``layers`` have keys and values."""
        return sum(layer not in self.linear_layers for layer in layers)

    def workspace_bytes(self, rows: int, *, element_bytes: int, score_bytes: int = 0) -> int:
        """Return the activations of a layer range at ``rows`` rows; ``score_bytes`` are 0 with fused attention."""
        hidden, mlp = rows * self.hidden_size, rows * self.intermediate_size
        heads = rows * (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        return 3 * hidden * element_bytes + max(heads * element_bytes + score_bytes, 3 * mlp * element_bytes)


class VisionDimensions(_Spec, frozen=True):
    """Sizes of the vision tower and its projector that determine the cost of the vision graph."""

    num_layers: Layer
    """Layers that the vision graph runs."""
    hidden_size: Axis
    intermediate_size: Axis
    patches_per_tile: Tokens | None
    """Patches per tile, with the class token; None if the whole image of P patches is one tile."""
    projector_weights: Work
    """Weights that each visual token is multiplied with."""
    mlp_matrices: Layer = 2
    """Matrices of an MLP: 2, or 3 with a gate."""
    patches_per_window: Tokens | None = None
    """Patches per attention window; None if all layers attend to the whole tile."""
    num_full_layers: Layer = 0
    """Layers that attend to the whole tile, in a tower with windows."""
    projected_per_tile: Tokens | None = None
    """Tokens per tile that enter the projector; None if they are the decoder's tokens, or if P patches are one tile."""
    patches_per_token: Tokens | None = None
    """Patches per token of the projector, if P patches are one tile."""
    merged_weights: Work = 0
    """Weights with the same cost per projector token as the encoder's own reduction."""
    num_merged_layers: Layer = 0
    """Layers after a merge of 2x2 patches inside the tower, the last ones."""

    def workspace_bytes(self, count: int, *, element_bytes: int) -> int:
        """Return the activations of the vision graph for ``count`` tiles, or patches of one tile, with fused attention."""
        patches = count * (self.patches_per_tile or 1)
        return patches * (6 * self.hidden_size + 2 * self.intermediate_size) * element_bytes


class TextSpec(_Spec, frozen=True):
    """The tokenizer's files and special tokens."""

    tokenizer: Name
    chat_template: Name
    image_token: Name
    image_token_id: TokenId
    bos_token: str
    eos_token: str
    stop_token_ids: tuple[TokenId, ...]
    video_token: Name | None = None
    """Placeholder of a video in the chat template; None, like ``video_token_id``, if the model takes no videos."""
    video_token_id: TokenId | None = None


class ClipTextSpec(_Spec, frozen=True):
    """Constants for turning questions into CLIP's texts."""

    tokenizer: Name
    start_id: TokenId
    end_id: TokenId
    """End token, also used as padding."""
    length: Annotated[int, msgspec.Meta(ge=3, le=4096)]
    """L, tokens per text, including start and end."""


class DecisionSpec(_Spec, frozen=True):
    """How questions with a fixed set of answers are asked."""

    version: Name
    """Version of the wording; "own" if the checkpoint brought a template of its own."""
    template: Name
    """File of the Jinja template; see ``runtime/decisions/wording.py``."""
    labels: Literal["letters", "words"]
    """Whether options are answered by letters and digits, or by their names."""


class ImageSize(_Spec, frozen=True):
    """An image size that the bundle has exact shapes for."""

    width: Axis
    """In pixels."""
    height: Axis
    """In pixels."""
    num_visual: Tokens
    """Visual tokens of such an image."""
    rows: Tokens
    """N at which it runs; larger than ``num_visual`` only if a stage keeps more tokens than the image has."""


class Cost(_Spec, frozen=True):
    """FLOPs and KV bytes of one answer's prefill, counted by ``trio_edge.trio.cost.flops``, at ``num_text`` text tokens."""

    num_visual: Extent
    """Visual tokens that the vision graph returns for all images."""
    num_text: Extent
    full_flops: dict[Name, Work]
    """By part ("vision", "decoder" with its head) without reduction."""
    reduced_flops: dict[Name, Work]
    """By part, with "select" for the stages and, if there are any, "reduce" for the selection before the decoder and
    "clip_text" for the text tower."""
    full_kv_bytes: Bytes
    reduced_kv_bytes: Bytes
    num_images: Tokens = 1
    image_tokens: Extent | None = None
    """Visual tokens of the same images without encoder reduction; None if equal to ``num_visual``."""


class Launch(_Spec, frozen=True, kw_only=True, omit_defaults=True):
    """One run of a graph, or of a function on the host."""

    runs: Name
    """A graph, or a ``HostFunction`` if there are no profiles."""
    label: Name
    """Name of the device's time; consecutive launches with the same label are timed together."""
    profiles: tuple[Name, ...] = ()
    """Profile of the graph at each of the program's sizes."""
    inputs: dict[Name, Place]
    """By tensor. Tensors that are missing, here and below, have no elements at the profiles."""
    outputs: dict[Name, Place]
    stage: Layer = 0
    """Selections that are done before."""
    cache: Name | None = None
    """KV cache of a layer range: the launch's new keys and values, its outputs in a stack, are appended to it."""
    states: dict[Name, Name] = {}
    """Stacks of new states that the launch writes, and those that they replace afterwards."""


class Program(_Spec, frozen=True):
    """Launches in order."""

    name: ProgramName
    sizes: tuple[dict[Symbol, Extent], ...]
    """The sizes that it runs at: N visual tokens and T text tokens of a prefill, or those of the vision or reduce graph."""
    launches: tuple[Launch, ...]


def stack_of(place: str) -> tuple[str, int] | None:
    """Return the name and the index of a place in a stack; None for other places."""
    name, bracket, index = place.partition("[")
    return (name, int(index[:-1])) if bracket else None


def stacks_of(places: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the tensors of each stack in ``places``, in their order in the stack."""
    found: dict[str, dict[int, str]] = {}
    for tensor, place in places.items():
        if (stack := stack_of(place)) is not None:
            found.setdefault(stack[0], {})[stack[1]] = tensor
    return {name: [tensors[index] for index in sorted(tensors)] for name, tensors in found.items()}


class LevelSpec(_Spec, frozen=True):
    """One budget of a bundle with several: what differs from the manifest's own, which is the default level's."""

    name: LevelName
    schedule: Schedule
    visual_sizes: tuple[Tokens, ...]
    image_sizes: tuple[ImageSize, ...]
    image_processing: dict[str, Any]
    video_processing: dict[str, Any] | None
    cost: Cost
    programs: tuple[Program, ...]


class Manifest(_Spec, frozen=True):
    """Everything that the runtime must know about a bundle."""

    schema_version: int
    family: Name
    model: Name
    """Alias, Hub id or folder name that was exported."""
    revision: Name | None
    dtype: FloatType
    opset: Layer
    dimensions: Dimensions
    schedule: Schedule
    visual_sizes: tuple[Tokens, ...]
    """Every N, the rows for visual tokens in a prefill, ascending; images are padded to one of them."""
    image_sizes: tuple[ImageSize, ...]
    """Image sizes with exact shapes; empty if there are none."""
    text_buckets: tuple[Tokens, ...]
    """Text lengths, ascending; the text tokens of a prompt together are padded to one of them."""
    max_new_tokens: Tokens
    max_position: Axis
    """Number of positions that the model supports."""
    position_axes: Literal[1, 3]
    """A, rows of position ids: 1, or 3 for M-RoPE (time, row, column)."""
    text: TextSpec
    image_processing: dict[str, Any]
    max_images: Tokens
    """Largest number of images, or pairs of video frames, of the largest size in a prompt."""
    encoder_keep: Tokens | None
    """Patches per tile, or visual tokens per image, that the vision graph keeps; None for all."""
    token_method: Name | None
    """Selector of the reduce graph between vision and prefix, by its name in ``trio_edge.trio.methods``; None for none."""
    token_keep: Tokens | None
    """K, visual tokens of each image that the reduce graph passes on."""
    token_embedding: StoredTensor
    graphs: tuple[GraphSpec, ...]
    """In the order in which a prefill runs them."""
    programs: tuple[Program, ...]
    """What the runtime does with them."""
    files: tuple[FileEntry, ...]
    """Every file of the bundle except the manifest itself."""
    model_bytes: Bytes
    """Bytes of all the model's weights in ``dtype``, each tensor counted once."""
    cost: Cost
    tools: dict[Name, Name]
    """Versions of the packages that made the bundle."""
    vision: VisionDimensions | None = None
    """None in bundles of releases that did not write it."""
    token_embedding_scales: StoredTensor | None = None
    """[V], one scale for each row of an INT8 table."""
    head_rows: StoredTensor | None = None
    """[V, D], rows of the lm_head that the host reads for the probes' gradient; only if the head is quantized."""
    head_row_scales: StoredTensor | None = None
    """[V], as ``token_embedding_scales``."""
    quantization: Quantization | None = None
    """None if all weights and the KV caches are in ``dtype``."""
    clip_text: ClipTextSpec | None = None
    """Set if the reduce graph compares the question with the image in CLIP's space; CLIP's text tower is a graph then."""
    decisions: DecisionSpec | None = None
    """None in bundles of releases that did not write it."""
    generation: GenerationSettings = GenerationSettings()
    """The checkpoint's generation settings, which apply where the user sets nothing else."""
    video_processing: dict[str, Any] | None = None
    """None if the bundle takes no videos."""
    num_deepstack: Layer = 0
    """Number of first decoder layers to whose outputs DeepStack adds features of inner vision layers."""
    level: LevelName = DEFAULT
    """Name of the default level."""
    levels: tuple[LevelSpec, ...] = ()
    """Further levels, which run the same graphs."""

    @property
    def level_names(self) -> tuple[str, ...]:
        """Names of all levels, from the least FLOPs to the most."""
        work = {one.name: sum(one.cost.reduced_flops.values()) for one in self.levels}
        work[self.level] = sum(self.cost.reduced_flops.values())
        return tuple(sorted(work, key=lambda name: work[name]))

    @property
    def _budgets(self) -> tuple[Manifest | LevelSpec, ...]:
        return (self, *self.levels)

    @property
    def all_programs(self) -> tuple[Program, ...]:
        """The programs of all levels."""
        return (*self.programs, *(program for level in self.levels for program in level.programs))

    def at_level(self, name: str) -> Manifest:
        """Return the manifest of a bundle that has only the level ``name``, with the graphs and profiles that it runs."""
        if not self.levels:
            return self
        own: dict[str, Any] = {"levels": ()}
        if name != self.level:
            found = msgspec.structs.asdict(next(level for level in self.levels if level.name == name))
            own |= {"level": found.pop("name"), **found}
        one = msgspec.structs.replace(self, **own)
        used: dict[str, dict[str, None]] = {}
        for launch in (launch for program in one.programs for launch in program.launches):
            used.setdefault(launch.runs, {}).update(dict.fromkeys(launch.profiles))
        graphs = tuple(graph.at_profiles([*used[graph.name]]) for graph in self.graphs if graph.name in used)
        return msgspec.structs.replace(one, graphs=graphs)

    def graph(self, name: str) -> GraphSpec:
        """Return the graph called ``name``."""
        return next(graph for graph in self.graphs if graph.name == name)

    def program(self, name: str) -> Program:
        """Return the program called ``name``."""
        return next(program for program in self.programs if program.name == name)

    def format_of(self, graph: GraphSpec) -> QuantizedFormat | None:
        """Return the quantized format of the linear layers of ``graph``; None for floating point."""
        if graph.role == "probe":
            return None if graph.opset is None else self.format_of(self._owner(graph))
        part = PART_FROM_ROLE.get(graph.role)
        return None if part is None or self.quantization is None else self.quantization.formats.get(part)

    def _owner(self, probe: GraphSpec) -> GraphSpec:
        """Return the graph whose weights ``probe`` shares: the range of its layer, or the head."""
        layer = probe.first_layer
        if layer is None:
            return self.graph("head")
        before = [graph for graph in self.ranges if (graph.first_layer or 0) <= layer]
        return before[-1] if before else self.ranges[0]

    @property
    def ranges(self) -> tuple[GraphSpec, ...]:
        """The decoder layer ranges in order: prefix, segments, suffix."""
        return tuple(graph for graph in self.graphs if graph.role in ("prefix", "segment", "suffix"))

    @property
    def selects(self) -> tuple[GraphSpec, ...]:
        """The select graphs in order of their stages."""
        return tuple(graph for graph in self.graphs if graph.role == "select")

    @property
    def max_visual(self) -> int:
        """Largest N of all levels."""
        return max(one.visual_sizes[-1] for one in self._budgets)

    @property
    def kv_capacities(self) -> tuple[int, ...]:
        """C, token rows of each layer range's KV cache: the largest prefill of all levels, and all new tokens."""
        count, text = len(self.ranges), self.text_buckets[-1] + self.max_new_tokens
        rows = (one.schedule.rows_of(count, one.visual_sizes[-1]) for one in self._budgets)
        return tuple(max(each) + text for each in zip(*rows))

    @property
    def kv_dtype(self) -> CacheType:
        """Element type of the KV caches."""
        is_rounded = self.quantization is not None and "kv" in self.quantization.formats
        return "int8" if is_rounded else self.dtype

    @property
    def kv_bytes(self) -> int:
        """Bytes of all KV caches as allocated, at full capacity: one, and those of the answers that decode together."""
        dims, row = self.dimensions, 2 * self._num_caches * DTYPE_BYTES[self.kv_dtype]
        row *= dims.num_kv_heads * dims.head_size
        return sum(
            dims.num_cached(graph.layers) * rows * row for graph, rows in zip(self.ranges, self.kv_capacities)
        )

    @property
    def state_bytes(self) -> int:
        """Bytes of all states of layers with linear attention, of as many answers."""
        if (linear := self.dimensions.linear) is None:
            return 0
        one = linear.state_bytes(element_bytes=DTYPE_BYTES[self.dtype])
        return self._num_caches * len(linear.layers) * one

    @property
    def _num_caches(self) -> int:
        return 1 if self.batch == 1 else 1 + self.batch

    @property
    def batch(self) -> int:
        """Answers that may decode together."""
        return next((program.sizes[0]["B"] for program in self.programs if program.name == "batch"), 1)

    @property
    def device_weight_ratio(self) -> float:
        """Weights in all graphs divided by the model's weights; above 1, probe layers and heads are repeated."""
        return sum(graph.weight_bytes for graph in self.graphs) / self.model_bytes

    @property
    def selection(self) -> str:
        """The token reduction in words, with its methods."""
        parts = []
        if self.encoder_keep is not None:
            parts.append(f"vision graph keeps {self.encoder_keep}")
        if self.token_method is not None:
            parts.append(f"{self.token_method} keeps {self.token_keep} before the decoder")
        if self.schedule.stages:
            stages = ", ".join(f"{stage.keep} at layer {stage.layer}" for stage in self.schedule.stages)
            parts.append(f"{self.schedule.method} keeps {stages}")
        return "; ".join(parts) or "keeps all visual tokens"

    @property
    def average_keep(self) -> float:
        """Mean over layers of the visual tokens processed, as a fraction of the tokens before any reduction."""
        whole = self.cost.image_tokens or self.cost.num_visual
        share = self.average_keep_of(self.cost.num_visual, num_images=self.cost.num_images)
        return share * self.cost.num_visual / whole

    def average_keep_of(self, num_visual: int, *, num_images: int = 1) -> float:
        """Return the mean over layers of the visual tokens processed, as a fraction of the ``num_visual`` of all images."""
        if num_visual == 0:
            return 1.0
        most = None if self.token_keep is None else self.token_keep * num_images
        entering = num_visual if most is None else min(most, num_visual)
        share = self.schedule.average_keep(num_layers=self.dimensions.num_layers, num_visual=entering)
        return share * entering / num_visual


def json_from_manifest(manifest: Manifest) -> bytes:
    """Return ``manifest`` as indented JSON; ``checks.manifest_from_json`` reads it back to an equal value."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
