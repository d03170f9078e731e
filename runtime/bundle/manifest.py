"""The manifest (``trio.json``): the only description of a bundle. Export writes it once, everything else reads it.

Symbols in shapes: N visual tokens (padded), S sequence rows of a graph (padded), C rows of its past KV cache, R rows
of the sequence after a selection (padded); of a vision graph also B image tiles, or P patches and W windows; of CLIP's
text tower M texts. A probe has symbols of its own: of its forward half PS rows, PR probe rows and PN visual tokens, of its
backward half GS, GR and GN; L is the rows of a head that the probe shares. All other axes are numbers.
"""

from __future__ import annotations

import math
import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from trio_edge.runtime.bundle.errors import ManifestError, ScheduleError
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
from trio_edge.runtime.bundle.typed_json import typed

SCHEMA_VERSION = 4
MANIFEST_NAME = "trio.json"
_NUMBER = re.compile(r"[0-9]{1,4}")
DTYPE_BYTES = {"float32": 4, "float16": 2, "int32": 4, "int64": 8, "int8": 1, "float8_e4m3fn": 1}
"""Bytes of an element."""

DType = Literal["float32", "float16", "int32", "int64", "int8"]
FloatType = Literal["float32", "float16"]
CacheType = Literal["float32", "float16", "int8"]
StoredType = Literal["float32", "float16", "int32", "int64", "int8", "int4", "float8_e4m3fn"]
"""Element types of arrays in weight files; INT4 has two elements in a byte, the first in its low half."""
QuantizedFormat = Literal["int8", "fp8", "int4"]
Part = Literal["vision", "prefix", "segments", "suffix", "select", "head", "embedding", "kv"]
"""Parts of a bundle, each with a format of its own."""
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
    """"prefill_2928+64" (visual rows and text bucket), "prefill_64" where only one visual size is left, "decode"."""
    sizes: dict[Symbol, Extent]
    """Value of each symbol in the graph's shapes; 0 for those of other pieces, which are left out."""


PieceName = Literal["layers", "logits", "probe", "gradient", "saliency"]


class Piece(_Spec, frozen=True):
    """One computation of a graph that holds several, because they read the same weights.

    A profile belongs to one piece. At it, all sizes of the others are 0: they compute nothing.
    """

    name: PieceName
    file: Name
    """The piece as an ONNX graph of its own, for backends that need not have weights in one graph to have them once."""
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
    """First decoder layer of a prefix, segment or suffix; of a probe or select graph the layer that it looks at."""
    num_layers: Layer = 0
    """Decoder layers that run in this graph and own a KV cache."""
    opset: Layer | None = None
    """ONNX opset where it is another than the manifest's: quantized types came later."""
    pieces: tuple[Piece, ...] = ()
    """Computations in the graph; empty if it is one."""

    def split(self) -> tuple[GraphSpec, ...]:
        """Return each piece as a graph of its own, called ``graph.piece``; the graph itself if it has none."""
        return tuple(map(self._alone, self.pieces)) or (self,)

    def part_at(self, profile: Profile) -> GraphSpec:
        """Return the one of ``split()`` that runs at ``profile``, which is one of this graph's."""
        return next(part for part in self.split() if profile in part.profiles)

    def _alone(self, piece: Piece) -> GraphSpec:
        return msgspec.structs.replace(
            self,
            name=f"{self.name}.{piece.name}",
            file=piece.file,
            inputs=tuple(tensor for tensor in self.inputs if tensor.name in piece.inputs),
            outputs=tuple(tensor for tensor in self.outputs if tensor.name in piece.outputs),
            profiles=tuple(profile for profile in self.profiles if profile.name in piece.profiles),
            weight_bytes=piece.weight_bytes,
            pieces=(),
        )

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


class StoredTensor(_Spec, frozen=True):
    """An array inside one of the bundle's weight files."""

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
    """The search for scales; "checkpoint" where its own integers were taken over."""
    block_size: Tokens | None = None
    """Inputs that share an INT4 scale, where their number is a multiple of it."""
    num_samples: Extent = 0
    """Samples that activations were collected from; the tokens that the bundle's stages drop were dropped."""
    inputs: tuple[Part, ...] = ()
    """Parts in INT8 or FP8 whose linear layers have their inputs in that format too."""


class FileEntry(_Spec, frozen=True):
    """A file of the bundle and what it must contain."""

    path: Name
    """Relative to the bundle, forward slashes, no '..'."""
    num_bytes: Bytes
    sha256: Digest


class Dimensions(_Spec, frozen=True):
    """Sizes of the decoder."""

    num_layers: Layer
    hidden_size: Axis
    num_heads: Axis
    num_kv_heads: Axis
    head_size: Axis
    intermediate_size: Axis
    vocab_size: Axis


class VisionDimensions(_Spec, frozen=True):
    """Sizes of the vision tower and its projector, as far as they decide what the vision graph computes."""

    num_layers: Layer
    """Layers that run."""
    hidden_size: Axis
    intermediate_size: Axis
    patches_per_tile: Tokens | None
    """With the class token; None where the whole image of P patches is one tile."""
    projector_weights: Work
    """Weights that each visual token is multiplied with."""
    mlp_matrices: Layer = 2
    """2, or 3 where the MLP has a gate."""
    patches_per_window: Tokens | None = None
    """Patches that a patch attends to in layers with windows; None if all layers attend to the whole tile."""
    num_full_layers: Layer = 0
    """Layers that attend to the whole tile, besides those with windows."""
    projected_per_tile: Tokens | None = None
    """Tokens of each tile that the projector sees; None where it sees the decoder's, or P patches are one tile."""
    patches_per_token: Tokens | None = None
    """Patches that are one token of the projector, where P patches are one tile."""
    merged_weights: Work = 0
    """Weights that would cost what the encoder's own reduction does for each token of the projector."""


class TextSpec(_Spec, frozen=True):
    """Tokens with a meaning, and where the tokenizer's files are."""

    tokenizer: Name
    chat_template: Name
    image_token: Name
    image_token_id: TokenId
    bos_token: str
    eos_token: str
    stop_token_ids: tuple[TokenId, ...]
    video_token: Name | None = None
    """Stands for a video in the chat template; None where the model takes none, as ``video_token_id``."""
    video_token_id: TokenId | None = None


class ClipTextSpec(_Spec, frozen=True):
    """Constants that make texts of a CLIP model from questions."""

    tokenizer: Name
    start_id: TokenId
    end_id: TokenId
    """Also what a text is padded with."""
    length: Annotated[int, msgspec.Meta(ge=3, le=4096)]
    """L, tokens of a text, start and end among them."""


class ImageSize(_Spec, frozen=True):
    """An image size that the bundle has exact shapes for."""

    width: Axis
    height: Axis
    """In pixels."""
    num_visual: Tokens
    """Visual tokens that such an image gives."""
    rows: Tokens
    """N that it runs at; more than ``num_visual`` only where a stage keeps more than the image has."""


class Cost(_Spec, frozen=True):
    """FLOPs and KV bytes of one answer's prefill, counted by ``trio_edge.trio.cost.flops``, at ``num_text`` text tokens."""

    num_visual: Extent
    """Visual tokens that the vision graph gives for all images."""
    num_text: Extent
    full_flops: dict[Name, Work]
    """Per part ("vision", "decoder" with its head) without reduction."""
    reduced_flops: dict[Name, Work]
    """Per part, with "select" for the stages and, where there are, "reduce" for the selection before the decoder and
    "clip_text" for the text tower."""
    full_kv_bytes: Bytes
    reduced_kv_bytes: Bytes
    num_images: Tokens = 1
    picture_tokens: Extent | None = None
    """Visual tokens of the same images without encoder reduction; None if they are ``num_visual``."""


class Manifest(_Spec, frozen=True):
    """Everything that a runtime must know about a bundle."""

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
    """Every N, rows of the visual span in a prefill, ascending; images are padded to one of them."""
    image_sizes: tuple[ImageSize, ...]
    """Image sizes that were exported for; empty if any image is as good as another."""
    text_buckets: tuple[Tokens, ...]
    """Text tokens (before and after the image together) are padded to one of these, ascending."""
    max_new_tokens: Tokens
    max_position: Axis
    """Positions the model was made for."""
    position_axes: Literal[1, 3]
    """A, rows of position ids: 1, or 3 for M-RoPE (time, row, column)."""
    text: TextSpec
    image_processing: dict[str, Any]
    max_images: Tokens
    """Images of a prompt, or pairs of a video's frames, of the largest size that was exported for."""
    encoder_keep: Tokens | None
    """Patches per tile, or visual tokens of the image, that the vision graph keeps; None for all."""
    token_method: Name | None
    """Selector of the reduce graph between vision and prefix, by its name in ``trio_edge.trio.methods``; None without one."""
    token_keep: Tokens | None
    """K, visual tokens of each image that the reduce graph passes on."""
    token_embedding: StoredTensor
    graphs: tuple[GraphSpec, ...]
    """In the order in which a prefill runs them."""
    files: tuple[FileEntry, ...]
    """Every file of the bundle except the manifest itself."""
    model_bytes: Bytes
    """Bytes of the whole model's weights in ``dtype``, each tensor once."""
    cost: Cost
    tools: dict[Name, Name]
    """Versions of the packages that made the bundle."""
    vision: VisionDimensions | None = None
    """None in bundles of releases that did not write it."""
    token_embedding_scales: StoredTensor | None = None
    """[V] of an INT8 table, one for each row."""
    quantization: Quantization | None = None
    """None where all weights and the KV caches are in ``dtype``."""
    clip_text: ClipTextSpec | None = None
    """Set where the reduce graph compares the question in CLIP's space; its text tower is a graph then."""
    generation: GenerationSettings = GenerationSettings()
    """How the checkpoint wants answers to be made, where the user says nothing else."""
    video_processing: dict[str, Any] | None = None
    """None where the bundle takes no videos."""
    num_deepstack: Layer = 0
    """Decoder layers, from the first on, whose outputs get features of inner vision layers added (DeepStack)."""

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ManifestError(
                f"manifest has schema_version {self.schema_version}, this release reads {SCHEMA_VERSION};"
                " export the bundle again"
            )
        for name, sizes in (("text_buckets", self.text_buckets), ("visual_sizes", self.visual_sizes)):
            if not sizes or list(sizes) != sorted(set(sizes)):
                raise ManifestError(f"{name}: expected ascending sizes, got {sizes}; export again")
        self._check_files()
        self._check_embedding()
        self._check_sizes()
        self._check_graphs()

    def _check_embedding(self) -> None:
        table, scales = self.token_embedding, self.token_embedding_scales
        if table.dtype not in ("float32", "float16", "int8") or (table.dtype == "int8") != (
            scales is not None
        ):
            raise ManifestError(
                "token_embedding: expected float32 or float16 rows, or int8 rows with scales, got"
                f" {table.dtype} {'without' if scales is None else 'with'} scales; export the bundle again"
            )
        shape = self.dimensions.vocab_size, self.dimensions.hidden_size
        self._check_stored("token_embedding", table, shape)
        if scales is not None:
            self._check_stored("token_embedding_scales", scales, shape[:1])
            if scales.dtype not in ("float32", "float16"):
                raise ManifestError(
                    f"token_embedding_scales: expected float32 or float16, got {scales.dtype}; export the bundle again"
                )

    def _check_stored(self, name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
        sizes = {entry.path: entry.num_bytes for entry in self.files}
        end = tensor.offset + tensor.num_bytes
        if tensor.shape != shape or end > sizes.get(tensor.file, end):
            raise ManifestError(
                f"{name}: expected {list(shape)} inside {tensor.file}, got {list(tensor.shape)} up to byte {end};"
                " export the bundle again"
            )

    def _check_sizes(self) -> None:
        """Raise ManifestError for sizes that no other check compares with anything."""
        dims = self.dimensions
        try:
            self.schedule.check_fits(num_layers=dims.num_layers, max_visual=self.max_visual)
        except ScheduleError as error:
            raise ManifestError(f"schedule: {error}; export the bundle again") from None
        if (
            min(
                dims.num_layers,
                self.model_bytes,
                self.cost.reduced_kv_bytes,
                sum(self.cost.reduced_flops.values()),
            )
            < 1
        ):
            raise ManifestError(
                "dimensions, model_bytes, cost: expected numbers above 0, got 0; export the bundle again"
            )
        if (self.token_method is None) != (self.token_keep is None):
            raise ManifestError(
                f"token_keep: expected a number with a token_method and nowhere else, got {self.token_keep} with"
                f" {self.token_method!r}; export the bundle again"
            )
        if self.max_images > self.max_visual or dims.num_heads % dims.num_kv_heads:
            raise ManifestError(
                f"max_images, num_kv_heads: expected at most {self.max_visual} (visual tokens) and a divisor of"
                f" {dims.num_heads}, got {self.max_images} and {dims.num_kv_heads}; export the bundle again"
            )

    def _check_files(self) -> None:
        known = {entry.path for entry in self.files}
        used = graph_files(self) | {self.text.tokenizer, self.text.chat_template, self.token_embedding.file}
        if self.token_embedding_scales is not None:
            used.add(self.token_embedding_scales.file)
        if self.clip_text is not None:
            used.add(self.clip_text.tokenizer)
        for path in sorted(known | used):
            _check_relative(path)
        if len(known) != len(self.files):
            raise ManifestError("files: expected each file once, got one twice; export the bundle again")
        if missing := sorted(used - known):
            raise ManifestError(
                f"files: expected an entry for {missing[0]!r}, got none; export the bundle again"
            )

    def _check_graphs(self) -> None:
        roles = [graph.role for graph in self.graphs if graph.role != "probe"]
        num_stages = len(self.schedule.stages)
        before = [] if self.clip_text is None else ["clip_text"]
        before += [] if self.token_method is None else ["reduce"]
        expected = ["vision", *before, "prefix"]
        for stage in range(num_stages):
            expected += ["select", "suffix" if stage == num_stages - 1 else "segment"]
        expected.append("head")
        if roles != expected:
            raise ManifestError(f"graphs: expected roles {expected}, got {roles}; export the bundle again")
        self._check_graph_names()
        # The decoder appends KV rows range by range: a gap or an overlap would give wrong answers without an error.
        next_layer = 0
        for graph in self.ranges:
            if graph.first_layer != next_layer or graph.num_layers < 1:
                raise ManifestError(
                    f"graph {graph.name!r}: expected to start at layer {next_layer}, got {graph.first_layer}"
                )
            next_layer += graph.num_layers
        if next_layer != self.dimensions.num_layers:
            raise ManifestError(
                f"graphs: expected {self.dimensions.num_layers} decoder layers, got {next_layer}"
            )

    def _check_graph_names(self) -> None:
        """Raise ManifestError for names that graphs of a role do not have: files are called after them."""
        found: set[str] = set()
        for graph in self.graphs:
            name, role = graph.name, graph.role
            is_numbered = role in ("probe", "select", "segment") and _NUMBER.fullmatch(
                name.removeprefix(f"{role}_")
            )
            is_known = name == role or is_numbered or (role, name) == ("probe", "gradient")
            if not is_known or name in found:
                raise ManifestError(
                    f"graphs: expected a name of its own after the role {role}, got {name!r}; export the bundle again"
                )
            found.add(name)

    def graph(self, name: str) -> GraphSpec:
        """Return the graph called ``name``."""
        return next(graph for graph in self.graphs if graph.name == name)

    def format_of(self, graph: GraphSpec) -> QuantizedFormat | None:
        """Return what the linear layers of ``graph`` are quantized to; None in floating point."""
        if graph.role == "probe":
            return self.format_of(self._owner(graph))
        part = PART_FROM_ROLE.get(graph.role)
        return None if part is None or self.quantization is None else self.quantization.formats.get(part)

    def _owner(self, probe: GraphSpec) -> GraphSpec:
        """Return the graph that the weights of ``probe`` belong to: the range of its layer, or the head."""
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
        """Largest N."""
        return self.visual_sizes[-1]

    @property
    def visual_rows(self) -> tuple[int, ...]:
        """Rows of the visual span in each layer range: the largest N, then K of every stage."""
        return (self.max_visual, *(stage.keep for stage in self.schedule.stages))

    @property
    def kv_capacities(self) -> tuple[int, ...]:
        """C, token rows of each layer range's KV cache: the largest prefill and all new tokens."""
        largest = self.text_buckets[-1]
        return tuple(rows + largest + self.max_new_tokens for rows in self.visual_rows)

    @property
    def kv_dtype(self) -> CacheType:
        """Element type of the KV caches."""
        is_rounded = self.quantization is not None and "kv" in self.quantization.formats
        return "int8" if is_rounded else self.dtype

    @property
    def kv_bytes(self) -> int:
        """Bytes of all KV caches as allocated, at full capacity."""
        dims = self.dimensions
        row = 2 * dims.num_kv_heads * dims.head_size * DTYPE_BYTES[self.kv_dtype]
        return sum(graph.num_layers * rows * row for graph, rows in zip(self.ranges, self.kv_capacities))

    @property
    def device_weight_ratio(self) -> float:
        """Weights in all graphs over the model's weights: what the repeated probe layers and heads cost."""
        return sum(graph.weight_bytes for graph in self.graphs) / self.model_bytes

    @property
    def average_keep(self) -> float:
        """Mean over layers of the visual tokens processed, as a fraction of the image's before any reduction."""
        whole = self.cost.picture_tokens or self.cost.num_visual
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


def graph_files(manifest: Manifest) -> set[str]:
    """Return the ONNX files of all graphs and pieces."""
    return {
        file for graph in manifest.graphs for file in (graph.file, *(piece.file for piece in graph.pieces))
    }


def _check_relative(path: str) -> None:
    # A downloaded bundle must not name files of the machine that it is opened on.
    pure = PurePosixPath(path)
    is_odd = re.search(r"[\\:\x00-\x1f\x7f]", path) is not None or pure.as_posix() != path
    if pure.is_absolute() or ".." in pure.parts or is_odd or path in (".", MANIFEST_NAME):
        raise ManifestError(
            f"files: expected a path inside the bundle, got {path!r}; export the bundle again"
        )


def manifest_from_json(text: bytes, *, where: str) -> Manifest:
    """Return the manifest written in ``text``.

    Args:
        text: The bytes of ``trio.json``.
        where: Name for error messages.

    Raises:
        ManifestError: If it is not JSON, has unknown or missing keys, wrong types or another schema version.
    """
    try:
        head = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(
            f"{where}: expected JSON, got something else ({error}); export the bundle again"
        ) from None
    version = head.get("schema_version") if isinstance(head, dict) else None
    if version != SCHEMA_VERSION:
        raise ManifestError(
            f"{where}: manifest has schema_version {version!r}, this release reads {SCHEMA_VERSION};"
            " export the bundle again"
        )
    try:
        return typed(head, Manifest)
    except msgspec.ValidationError as error:
        raise ManifestError(f"{where}: {error}; export the bundle again") from None


def json_from_manifest(manifest: Manifest) -> bytes:
    """Return ``manifest`` as indented JSON; ``manifest_from_json`` reads it back to an equal value."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
