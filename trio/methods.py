"""The registry of selectors: one row holds all that export, cost and prediction need to know about one.

``STAGE_METHODS`` run inside the decoder (``--method``), ``TOKEN_METHODS`` before it (``--token-method``). The table needs
no torch: a row names its class as text, and ``load`` imports it. The class itself says which inputs it reads
(``needs_previous``, ``needs_features``, …). ``docs/adding-a-selector.md`` shows how to add one.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.trio import keeps
from trio_edge.trio.cost import selections

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio_edge.runtime.bundle.manifest import Dimensions
    from trio_edge.runtime.bundle.schedule import Positions, Schedule
    from trio_edge.trio.cost.selections import StageSizes, TokenCost, TokenSizes
    from trio_edge.trio.cost.work import Work
    from trio_edge.trio.keeps import Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMethod:
    """A selector that runs at stages inside the decoder."""

    name: str
    """Value of ``--method`` and of the manifest."""
    summary: str
    selector: str
    """Module under ``trio_edge.trio.selectors`` and class name of a ``StageSelector``."""
    positions: Positions
    """Rule for position ids after a stage in the original code."""
    layers: tuple[tuple[int, ...], ...]
    """Layers that a stage precedes, of 32; then earlier alternatives for budgets that the first ones cannot meet."""
    at_any_depth: bool = False
    """Whether ``layers`` hold for decoders of any depth; otherwise they are scaled to it."""
    shape: Shape = keeps.equal_steps
    """Proportions of the stages' keeps."""
    has_presets: bool = False
    """Whether ``budgets.PRESETS`` are its schedules. After another reduction it then has one stage at half the depth."""
    has_probe: bool = False
    """Whether it reads the probe-row and NMS settings."""
    has_image_shares: bool = False
    """Whether it supports an equal share for each image (``--budget image``)."""
    repeats: Literal["queries and keys", "keys", "nothing"] = "queries and keys"
    """Layer weights that each stage's graph holds a second time; ``cost.memory`` counts those of a probe."""
    flops: Callable[[Dimensions, Schedule, StageSizes], float]
    work: Callable[[Dimensions, Schedule, StageSizes], Work] | None = None
    """Products of one stage; None if only the FLOPs are known."""

    def load(self) -> Any:
        """Return the selector's class."""
        return _load(self.selector)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenMethod:
    """A selector that runs on an image's visual tokens before the decoder."""

    name: str
    """Value of ``--token-method`` and of the manifest."""
    summary: str
    selector: str
    """Module under ``trio_edge.trio.selectors`` and class name of a ``TokenSelector``."""
    takes_clip: bool = False
    """Whether it can compare the question in CLIP's space (``--clip``)."""
    takes_grid: bool = False
    """Whether it uses the rows and columns of images that are one full grid of tokens."""
    compares: Literal["visual_tokens", "features"] | None = "visual_tokens"
    """Rows whose similarity matrix it holds in memory; None if it has none."""
    cost: Callable[[TokenSizes], TokenCost]

    def load(self) -> Any:
        """Return the selector's class."""
        return _load(self.selector)


def _load(selector: str) -> Any:
    module, _, name = selector.rpartition(".")
    return getattr(importlib.import_module(f"trio_edge.trio.selectors.{module}"), name)


_STAGE_ROWS = (
    StageMethod(
        name="trio",
        summary="gradient saliency, then NMS of similar tokens",
        selector="stages.trio.Trio",
        positions="compact",
        layers=((1, 10, 15),),
        shape=keeps.trio_shape,
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
        selector="stages.fastv.FastV",
        positions="preserved",
        layers=((2,), (1,)),
        at_any_depth=True,
        has_image_shares=True,
        flops=selections.one_row_flops,
    ),
    StageMethod(
        name="pyramiddrop",
        summary="attention of the last prompt token in the next layer",
        selector="stages.pyramid_drop.PyramidDrop",
        positions="compact",
        layers=tuple((first, 2 * first, 3 * first) for first in range(8, 0, -1)),
        shape=keeps.pyramid,
        has_image_shares=True,
        flops=selections.one_row_flops,
    ),
    StageMethod(
        name="dart",
        summary="tokens least similar to a few pivot tokens",
        selector="stages.dart.Dart",
        positions="preserved",
        layers=((2,), (1,)),
        at_any_depth=True,
        repeats="keys",
        flops=selections.dart_flops,
    ),
    StageMethod(
        name="sparsevlm",
        summary="attention of the question's most relevant words, with some others merged",
        selector="stages.sparse_vlm.SparseVlm",
        positions="compact",
        layers=((3, 7, 16), (2, 6, 15), (1, 5, 14)),
        shape=keeps.sparse_vlm_tables,
        flops=selections.sparse_vlm_flops,
    ),
)
_TOKEN_ROWS = (
    TokenMethod(
        name="visionzip",
        summary="class-token attention, with the others merged",
        selector="tokens.visionzip.VisionZip",
        cost=selections.vision_zip_cost,
    ),
    TokenMethod(
        name="holov",
        summary="class-token attention and variety in each part of the image",
        selector="tokens.holov.HoloV",
        cost=selections.holo_v_cost,
    ),
    TokenMethod(
        name="scope",
        summary="class-token attention times newly covered similarity",
        selector="tokens.scope.Scope",
        compares="features",
        cost=selections.scope_cost,
    ),
    TokenMethod(
        name="divprune",
        summary="tokens far from each other (max-min distance)",
        selector="tokens.divprune.DivPrune",
        cost=selections.div_prune_cost,
    ),
    TokenMethod(
        name="cdpruner",
        summary="relevance to the question and diversity",
        selector="tokens.cdpruner.CdPruner",
        takes_clip=True,
        cost=selections.cd_pruner_cost,
    ),
    TokenMethod(
        name="eadp",
        summary="coverage of the image, weighted by relevance to the question",
        selector="tokens.eadp.Eadp",
        takes_clip=True,
        takes_grid=True,
        cost=selections.eadp_cost,
    ),
    TokenMethod(
        name="evs",
        summary="largest change since the previous frames of a video",
        selector="tokens.evs.Evs",
        compares=None,
        cost=selections.no_cost,
    ),
    TokenMethod(
        name="uniform",
        summary="evenly spaced tokens",
        selector="tokens.uniform.Uniform",
        compares=None,
        cost=selections.no_cost,
    ),
)
STAGE_METHODS: dict[str, StageMethod] = {row.name: row for row in _STAGE_ROWS}
TOKEN_METHODS: dict[str, TokenMethod] = {row.name: row for row in _TOKEN_ROWS}
DEFAULT_METHOD = _STAGE_ROWS[0].name


def stage_method(name: str) -> StageMethod:
    """Return the selector ``name`` inside the decoder; raise ScheduleError if there is none."""
    if name not in STAGE_METHODS:
        raise ScheduleError(f"method: expected one of {', '.join(STAGE_METHODS)}, got {name!r}")
    return STAGE_METHODS[name]


def token_method(name: str) -> TokenMethod:
    """Return the selector ``name`` before the decoder; raise ScheduleError if there is none."""
    if name not in TOKEN_METHODS:
        raise ScheduleError(f"token_method: expected one of {', '.join(TOKEN_METHODS)}, got {name!r}")
    return TOKEN_METHODS[name]


def described(methods: dict[str, StageMethod] | dict[str, TokenMethod]) -> str:
    """Return all names with their summaries, for ``--help``."""
    return "; ".join(f"{row.name}: {row.summary}" for row in methods.values())
