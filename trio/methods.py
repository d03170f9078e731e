"""One row for every selector: all that exporting, counting and predicting know of it by name.

``STAGE_METHODS`` run inside the decoder (``--method``), ``TOKEN_METHODS`` before it (``--token-method``). The table needs
no torch: a row names its class as text, and ``load`` imports it. The class itself says which inputs it reads
(``needs_previous``, ``needs_features``, …). ``docs/adding-a-selector.md`` adds one.
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
    """A selector of the stages inside the decoder."""

    name: str
    """As ``--method`` and the manifest have it."""
    summary: str
    """A phrase for ``--help``."""
    selector: str
    """Module below ``trio_edge.trio.selectors`` and class; a ``StageSelector``."""
    positions: Positions
    """Position ids that the original gives to the rows behind a stage."""
    layers: tuple[tuple[int, ...], ...]
    """Layers with a stage in front, of 32; then earlier ones for budgets that the first ones cannot meet."""
    at_any_depth: bool = False
    """Whether ``layers`` are those of every decoder, and not in proportion to its depth."""
    shape: Shape = keeps.equal_steps
    """Proportions of the tokens that the stages keep."""
    has_presets: bool = False
    """Whether ``budgets.PRESETS`` are its schedules; behind another reduction it has one stage halfway down then."""
    has_probe: bool = False
    """Whether the options of probe rows and NMS are its own."""
    has_image_shares: bool = False
    """Whether each image can have a share of what a stage keeps."""
    repeats: Literal["queries and keys", "keys", "nothing"] = "queries and keys"
    """Weights that each stage's graph holds although other graphs have them; a probe's are ``cost.memory``'s to say."""
    flops: Callable[[Dimensions, Schedule, StageSizes], float]
    """FLOPs of one stage."""
    work: Callable[[Dimensions, Schedule, StageSizes], Work] | None = None
    """Its work product by product; None where only the FLOPs are known."""

    def load(self) -> Any:
        """Return the class."""
        return _load(self.selector)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenMethod:
    """A selector among an image's visual tokens before the decoder."""

    name: str
    """As ``--token-method`` and the manifest have it."""
    summary: str
    """A phrase for ``--help``."""
    selector: str
    """Module below ``trio_edge.trio.selectors`` and class; a ``TokenSelector``."""
    takes_clip: bool = False
    """Whether it reads the question and can do so in CLIP's space, with ``--clip``."""
    takes_grid: bool = False
    """Whether it uses rows and columns of images that are one full grid of tokens."""
    compares: Literal["visual_tokens", "features"] | None = "visual_tokens"
    """Rows whose similarities it holds in memory; None where it compares nothing."""
    cost: Callable[[TokenSizes], TokenCost]

    def load(self) -> Any:
        """Return the class."""
        return _load(self.selector)


def _load(selector: str) -> Any:
    module, _, name = selector.rpartition(".")
    return getattr(importlib.import_module(f"trio_edge.trio.selectors.{module}"), name)


_STAGE_ROWS = (
    StageMethod(
        name="trio",
        summary="gradient saliency, then feature-space NMS",
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
        summary="attention of the last row in the layer before",
        selector="stages.fastv.FastV",
        positions="preserved",
        layers=((2,), (1,)),
        at_any_depth=True,
        has_image_shares=True,
        flops=selections.one_row_flops,
    ),
    StageMethod(
        name="pyramiddrop",
        summary="attention of the last row in the next layer",
        selector="stages.pyramid_drop.PyramidDrop",
        positions="compact",
        layers=tuple((first, 2 * first, 3 * first) for first in range(8, 0, -1)),
        shape=keeps.pyramid,
        has_image_shares=True,
        flops=selections.one_row_flops,
    ),
    StageMethod(
        name="dart",
        summary="tokens unlike a few pivots",
        selector="stages.dart.Dart",
        positions="preserved",
        layers=((2,), (1,)),
        at_any_depth=True,
        repeats="keys",
        flops=selections.dart_flops,
    ),
    StageMethod(
        name="sparsevlm",
        summary="attention of the question's telling words; merges others",
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
        summary="attention of the class row; merges others",
        selector="tokens.visionzip.VisionZip",
        cost=selections.vision_zip_cost,
    ),
    TokenMethod(
        name="holov",
        summary="attention and variety, part by part",
        selector="tokens.holov.HoloV",
        cost=selections.holo_v_cost,
    ),
    TokenMethod(
        name="scope",
        summary="attention times newly covered similarity",
        selector="tokens.scope.Scope",
        compares="features",
        cost=selections.scope_cost,
    ),
    TokenMethod(
        name="divprune",
        summary="largest smallest distance",
        selector="tokens.divprune.DivPrune",
        cost=selections.div_prune_cost,
    ),
    TokenMethod(
        name="cdpruner",
        summary="relevance to the question and difference",
        selector="tokens.cdpruner.CdPruner",
        takes_clip=True,
        cost=selections.cd_pruner_cost,
    ),
    TokenMethod(
        name="eadp",
        summary="coverage, weighted by relevance to the question",
        selector="tokens.eadp.Eadp",
        takes_clip=True,
        takes_grid=True,
        cost=selections.eadp_cost,
    ),
    TokenMethod(
        name="evs",
        summary="largest change since the frames before, for videos",
        selector="tokens.evs.Evs",
        compares=None,
        cost=selections.no_cost,
    ),
    TokenMethod(
        name="uniform",
        summary="every n-th token",
        selector="tokens.uniform.Uniform",
        compares=None,
        cost=selections.no_cost,
    ),
)
STAGE_METHODS: dict[str, StageMethod] = {row.name: row for row in _STAGE_ROWS}
TOKEN_METHODS: dict[str, TokenMethod] = {row.name: row for row in _TOKEN_ROWS}
DEFAULT_METHOD = _STAGE_ROWS[0].name


def stage_method(name: str) -> StageMethod:
    """Return the row of a selector inside the decoder.

    Raises:
        ScheduleError: If there is none of that name.
    """
    if name not in STAGE_METHODS:
        raise ScheduleError(f"method: expected one of {', '.join(STAGE_METHODS)}, got {name!r}")
    return STAGE_METHODS[name]


def token_method(name: str) -> TokenMethod:
    """Return the row of a selector before the decoder.

    Raises:
        ScheduleError: If there is none of that name.
    """
    if name not in TOKEN_METHODS:
        raise ScheduleError(f"token_method: expected one of {', '.join(TOKEN_METHODS)}, got {name!r}")
    return TOKEN_METHODS[name]


def described(methods: dict[str, StageMethod] | dict[str, TokenMethod]) -> str:
    """Return all names with their summaries, for a help text."""
    return "; ".join(f"{row.name}: {row.summary}" for row in methods.values())
