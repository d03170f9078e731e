"""The registry of selectors: one row holds all that export, cost and prediction need to know about one.

``STAGE_METHODS`` run inside the decoder (``--method``), ``TOKEN_METHODS`` before it (``--token-method``). Other packages add
rows through the entry points of ``GROUP``, which are read when a name that is none of ours is looked up, or when all are
listed. The table needs no torch: a row names its class as text, and ``load`` imports it. ``docs/adding-a-selector.md``
shows how to add one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import pkgutil
from dataclasses import dataclass
from operator import mul
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from trio_edge.runtime.bundle.errors import ScheduleError, message_line
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.cost import selections

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from trio_edge.runtime.bundle.manifest import Dimensions
    from trio_edge.runtime.bundle.schedule import Positions
    from trio_edge.trio.cost.selections import StageSizes, TokenCost, TokenSizes
    from trio_edge.trio.cost.work import Work

    Shape = Callable[[int, Sequence[int], int, bool], list[float] | None]
    """From rest, weights, N and whether these are the earliest layers: the wanted keeps; None to try earlier layers.

    ``rest`` is the budget after the first stage: the visual tokens that its layers may process, summed over these layers.
    ``weights`` are the numbers of layers that each stage's tokens pass through.
    """

GROUP = "trio_edge.selectors"
"""Entry-point group of other packages' rows; an entry point has the row's name."""
OURS = "trio-edge"
_TRIO_KEEPS = (460, 270, 110)
_LEAST_LAMBDA = 0.25
_TABLE_VISUAL = 576
_SPARSEVLM_TABLES = ((82, 32, 18), (249, 55, 27), (312, 117, 39), (309, 204, 113))
"""Rows after each stage, merged ones included. Their true averages are 82.2 to 206.5 of 576, not the published 64 to 192:
the scoring layer runs before its tokens are dropped."""


def total(weights: Iterable[float], keeps: Iterable[float]) -> Any:
    """Return the tokens processed by all layers: the sum of ``weights`` times ``keeps``."""
    return sum(map(mul, weights, keeps))


def trio_shape(rest: int, weights: Sequence[int], num_visual: int, _is_last: bool) -> list[float]:
    """Return keeps in the presets' proportions; for larger budgets, between their largest size and keeping all."""
    shape = [float(keep) for keep in _TRIO_KEEPS]
    if len(weights) != len(shape):  # geometric between the same ends
        first, last, steps = _TRIO_KEEPS[0], _TRIO_KEEPS[-1], max(len(weights) - 1, 1)
        shape = [first * (last / first) ** (index / steps) for index in range(len(weights))]
    unit = total(weights, shape)
    largest = [keep * num_visual / shape[0] for keep in shape]
    most = total(weights, largest)
    if rest <= most:
        return [keep * rest / unit for keep in shape]
    share = (rest - most) / (num_visual * sum(weights) - most)
    return [keep + share * (num_visual - keep) for keep in largest]


def equal_steps(rest: int, weights: Sequence[int], _num_visual: int, _is_last: bool) -> list[float]:
    """Return keeps that fall in equal steps; a single stage gets the whole budget."""
    shape = [float(len(weights) - index) for index in range(len(weights))]
    unit = total(weights, shape)
    return [share * rest / unit for share in shape]


def pyramid(rest: int, weights: Sequence[int], num_visual: int, is_last: bool) -> list[float] | None:
    """Return λ N, λ² N, λ³ N with the λ that spends the budget; the paper's 0.5 has an average keep of 46.9 %.

    Below λ = 1/4 it returns None if there are earlier layers: with 8, 16, 24 of 32 a quarter of the full cost is spent
    before the first stage.
    """

    def spent(share: float) -> float:
        return sum(weight * num_visual * share ** (stage + 1) for stage, weight in enumerate(weights))

    if spent(_LEAST_LAMBDA) > rest and not is_last:
        return None
    low, high = 0.0, 1.0
    for _ in range(60):  # halvings; float64 has 53 bits
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= rest else (low, middle)
    return [num_visual * low ** (stage + 1) for stage in range(len(weights))]


def sparse_vlm_tables(rest: int, weights: Sequence[int], num_visual: int, _is_last: bool) -> list[float]:
    """Return keeps interpolated between the two published tables around the budget, scaled to N.

    Below the smallest table they have its proportions; above the largest they approach all tokens.
    """
    scale = num_visual / _TABLE_VISUAL
    tables = [[scale * keep for keep in table[: len(weights)]] for table in _SPARSEVLM_TABLES]
    points = [[0.0] * len(weights), *tables, [float(num_visual)] * len(weights)]
    costs = [total(weights, point) for point in points]
    place = next(place for place in range(len(points) - 1) if rest <= costs[place + 1])
    share = (rest - costs[place]) / (costs[place + 1] - costs[place])
    return [low + share * (high - low) for low, high in zip(points[place], points[place + 1])]


@dataclass(frozen=True, kw_only=True)
class _Method:
    """The fields that both kinds of rows have."""

    name: str
    """Value of the option and of the manifest."""
    summary: str
    selector: str
    """The selector's class as ``MODULE:CLASS``."""
    package: str = OURS
    """Distribution that the row comes from; set when an entry point is read."""

    def load(self) -> Any:
        """Return the selector's class; raise ScheduleError if another package's cannot be imported."""
        if self.package == OURS:
            return pkgutil.resolve_name(self.selector)
        return _loaded(self.name, self.package, lambda: pkgutil.resolve_name(self.selector))


@dataclass(frozen=True, kw_only=True)
class StageMethod(_Method):
    """A selector that runs at stages inside the decoder: a ``StageSelector``."""

    positions: Positions
    """Rule for position ids after a stage in the original code."""
    layers: tuple[tuple[int, ...], ...]
    """Layers that a stage precedes, of 32; then earlier alternatives for budgets that the first ones cannot meet."""
    at_any_depth: bool = False
    """Whether ``layers`` hold for decoders of any depth; otherwise they are scaled to it."""
    shape: Shape = equal_steps
    """Proportions of the stages' keeps."""
    has_presets: bool = False
    """Whether ``budgets.PRESETS`` are its schedules. After another reduction it then has one stage at half the depth."""
    has_probe: bool = False
    """Whether it reads the probe-row and NMS settings, and its class has a probe: ``saliency``, a ``ProxySaliency``."""
    has_image_shares: bool = False
    """Whether it supports an equal share for each image (``--budget image``)."""
    reads_previous: bool = False
    """Whether it reads the input of the layer before the stage."""
    reads_prompt: bool = False
    """Whether it reads the prompt as it entered layer 0."""
    repeats: Literal["queries and keys", "keys", "nothing"] = "queries and keys"
    """Layer weights that each stage's graph holds a second time; ``cost.memory`` counts those of a probe."""
    flops: Callable[[Dimensions, Schedule, StageSizes], float]
    work: Callable[[Dimensions, Schedule, StageSizes], Work] | None = None
    """Products of one stage; None if only the FLOPs are known."""


@dataclass(frozen=True, kw_only=True)
class TokenMethod(_Method):
    """A selector that runs on an image's visual tokens before the decoder: a ``TokenSelector``."""

    reads_features: bool = False
    """Whether it reads the vision encoder's features, keys and attention, which only CLIP towers have."""
    reads_text: bool = False
    """Whether it reads the embeddings of the text after the image; with ``--clip`` it reads CLIP's texts instead."""
    reads_previous: bool = False
    """Whether it reads the visual tokens of the pair of frames before."""
    takes_clip: bool = False
    """Whether it can compare the question in CLIP's space (``--clip``)."""
    takes_grid: bool = False
    """Whether it uses the rows and columns of images that are one full grid of tokens."""
    compares: Literal["visual_tokens", "features"] | None = "visual_tokens"
    """Rows whose similarity matrix it holds in memory; None if it has none."""
    cost: Callable[[TokenSizes], TokenCost]


_ROWS: tuple[StageMethod | TokenMethod, ...] = (
    StageMethod(
        name="trio",
        summary="gradient saliency, then NMS of similar tokens",
        selector="trio_edge.trio.selectors.stages.trio:Trio",
        positions="compact",
        layers=((1, 10, 15),),
        shape=trio_shape,
        has_presets=True,
        has_probe=True,
        has_image_shares=True,
        repeats="nothing",
        flops=selections.trio_flops,
        work=selections.trio_work,
    ),
    StageMethod(
        name="fastv",
        summary="attention of the last prompt token in the previous layer",
        selector="trio_edge.trio.selectors.stages.fastv:FastV",
        positions="preserved",
        layers=((2,), (1,)),
        at_any_depth=True,
        has_image_shares=True,
        reads_previous=True,
        flops=selections.one_row_flops,
    ),
    StageMethod(
        name="pyramiddrop",
        summary="attention of the last prompt token in the next layer",
        selector="trio_edge.trio.selectors.stages.pyramid_drop:PyramidDrop",
        positions="compact",
        layers=tuple((first, 2 * first, 3 * first) for first in range(8, 0, -1)),
        shape=pyramid,
        has_image_shares=True,
        flops=selections.one_row_flops,
    ),
    StageMethod(
        name="dart",
        summary="tokens least similar to a few pivot tokens",
        selector="trio_edge.trio.selectors.stages.dart:Dart",
        positions="preserved",
        layers=((2,), (1,)),
        at_any_depth=True,
        reads_previous=True,
        repeats="keys",
        flops=selections.dart_flops,
    ),
    StageMethod(
        name="sparsevlm",
        summary="attention of the question's most relevant words, with some others merged",
        selector="trio_edge.trio.selectors.stages.sparse_vlm:SparseVlm",
        positions="compact",
        layers=((3, 7, 16), (2, 6, 15), (1, 5, 14)),
        shape=sparse_vlm_tables,
        reads_previous=True,
        reads_prompt=True,
        flops=selections.sparse_vlm_flops,
    ),
    TokenMethod(
        name="visionzip",
        summary="class-token attention, with the others merged",
        selector="trio_edge.trio.selectors.tokens.visionzip:VisionZip",
        reads_features=True,
        cost=selections.vision_zip_cost,
    ),
    TokenMethod(
        name="holov",
        summary="class-token attention and variety in each part of the image",
        selector="trio_edge.trio.selectors.tokens.holov:HoloV",
        reads_features=True,
        cost=selections.holo_v_cost,
    ),
    TokenMethod(
        name="scope",
        summary="class-token attention times newly covered similarity",
        selector="trio_edge.trio.selectors.tokens.scope:Scope",
        reads_features=True,
        compares="features",
        cost=selections.scope_cost,
    ),
    TokenMethod(
        name="divprune",
        summary="tokens far from each other (max-min distance)",
        selector="trio_edge.trio.selectors.tokens.divprune:DivPrune",
        cost=selections.div_prune_cost,
    ),
    TokenMethod(
        name="cdpruner",
        summary="relevance to the question and diversity",
        selector="trio_edge.trio.selectors.tokens.cdpruner:CdPruner",
        reads_text=True,
        takes_clip=True,
        cost=selections.cd_pruner_cost,
    ),
    TokenMethod(
        name="eadp",
        summary="coverage of the image, weighted by relevance to the question",
        selector="trio_edge.trio.selectors.tokens.eadp:Eadp",
        reads_text=True,
        takes_clip=True,
        takes_grid=True,
        cost=selections.eadp_cost,
    ),
    TokenMethod(
        name="evs",
        summary="largest change since the previous frames of a video",
        selector="trio_edge.trio.selectors.tokens.evs:Evs",
        reads_previous=True,
        compares=None,
        cost=selections.no_cost,
    ),
    TokenMethod(
        name="uniform",
        summary="evenly spaced tokens",
        selector="trio_edge.trio.selectors.tokens.uniform:Uniform",
        compares=None,
        cost=selections.no_cost,
    ),
)
STAGE_METHODS: dict[str, StageMethod] = {row.name: row for row in _ROWS if isinstance(row, StageMethod)}
TOKEN_METHODS: dict[str, TokenMethod] = {row.name: row for row in _ROWS if isinstance(row, TokenMethod)}
DEFAULT_METHOD = "trio"
_Row = TypeVar("_Row", bound="StageMethod | TokenMethod")


def stage_method(name: str) -> StageMethod:
    """Return the selector ``name`` inside the decoder; raise ScheduleError if there is none, or it is broken."""
    return STAGE_METHODS[name] if name in STAGE_METHODS else _installed(name, StageMethod, "method")


def token_method(name: str) -> TokenMethod:
    """Return the selector ``name`` before the decoder; raise ScheduleError if there is none, or it is broken."""
    return TOKEN_METHODS[name] if name in TOKEN_METHODS else _installed(name, TokenMethod, "token_method")


def all_methods(kind: type[_Row]) -> list[_Row]:
    """Return the rows of one kind, ours first; those of other packages that are broken are left out."""
    rows = (*STAGE_METHODS.values(), *TOKEN_METHODS.values(), *installed_methods())
    return [row for row in rows if isinstance(row, kind)]


def installed_methods() -> Iterator[StageMethod | TokenMethod | ScheduleError]:
    """Yield the rows of other packages; for each broken one, the error that asking for it raises."""
    for name in sorted(importlib.metadata.entry_points(group=GROUP).names):
        try:
            yield _row_of(name)
        except ScheduleError as error:
            yield error


def _installed(name: str, kind: type[_Row], field: str) -> _Row:
    if name not in importlib.metadata.entry_points(group=GROUP).names:
        known = ", ".join(row.name for row in all_methods(kind))
        raise ScheduleError(f"{field}: expected one of {known}, got {name!r}")
    row = _row_of(name)
    if not isinstance(row, kind):
        option = "--token-method" if isinstance(row, TokenMethod) else "--method"
        raise ScheduleError(f"{field}: {name} of the package {row.package} is for {option}; give it there")
    return row


@functools.cache
def _row_of(name: str) -> StageMethod | TokenMethod:
    """Return the checked row of the entry point ``name``."""
    entries = importlib.metadata.entry_points(group=GROUP, name=name)
    packages = [entry.dist.name if entry.dist is not None else entry.module for entry in entries]
    if name in STAGE_METHODS or name in TOKEN_METHODS:
        packages.insert(0, OURS)
    if len(packages) > 1:
        raise _broken(name, packages[-1], f"a name that {packages[0]} has, too")
    row = _loaded(name, packages[0], next(iter(entries)).load)
    if not isinstance(row, (StageMethod, TokenMethod)):
        raise _broken(
            name, packages[0], f"a value of type {type(row).__name__}, no StageMethod or TokenMethod"
        )
    _loaded(name, packages[0], lambda: _check(name, row))
    return dataclasses.replace(row, package=packages[0])


def _check(name: str, row: StageMethod | TokenMethod) -> None:
    """Raise ValueError or ScheduleError if a field of a row is not as export and cost expect it."""
    right = {
        "name": row.name == name,
        "summary": isinstance(row.summary, str) and row.summary.isprintable(),
        "selector": isinstance(row.selector, str) and ":" in row.selector,
    }
    Schedule(
        method=row.name, positions=getattr(row, "positions", "compact")
    )  # raises for what no manifest can hold
    if isinstance(row, TokenMethod):
        right["compares"] = row.compares in ("visual_tokens", "features", None)
        right["cost"] = callable(row.cost)
    else:
        ascending = (list(layers) == sorted({*layers}) and layers[0] >= 1 for layers in row.layers)
        are_numbers = all(isinstance(layer, int) for layers in row.layers for layer in layers)
        right["layers"] = bool(row.layers) and are_numbers and all(ascending)
        right["repeats"] = row.repeats in ("queries and keys", "keys", "nothing")
        right["flops"] = callable(row.flops) and callable(row.shape)
        right["work"] = row.work is None or callable(row.work)
    if wrong := [field for field, is_right in right.items() if not is_right]:
        raise ValueError(f"other values of {', '.join(wrong)} than docs/adding-a-selector.md allows")


def _loaded(name: str, package: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (Exception, SystemExit) as error:  # another package may raise anything
        raise _broken(name, package, f"{type(error).__name__}: {error}") from error


def _broken(name: str, package: str, got: str) -> ScheduleError:
    return ScheduleError(
        message_line(
            f"method: expected a selector {name} from the package {package}, got {got}; repair or remove {package}"
        )
    )


def described(kind: type[StageMethod | TokenMethod]) -> str:
    """Return all names with their summaries, for ``--help``."""
    return "; ".join(f"{row.name}: {row.summary}" for row in all_methods(kind))
