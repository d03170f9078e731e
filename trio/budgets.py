"""Schedules from presets, from text and from a wished average keep.

The *average keep* is the mean over all decoder layers of the visual tokens that a layer processes, as a
fraction of those that the picture has.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.schedule import Method, Positions, Schedule, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_TOPK = 3839
"""The most tokens that a stage can keep: TensorRT's TopK is documented to take K up to 3840, or less than it."""

_SHAPE_LAYERS = (1, 10, 15)
_SHAPE_KEEPS = (460, 270, 110)
_SHAPE_NUM_LAYERS = 32
PRINTED = 0.0005
"""Half of the last digit of a percentage printed with one decimal: 11.1 % means 64 of 576."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A schedule that is published for one model, or derived from one that is."""

    name: str
    """As wished on a command line: ``11.1%``."""
    stages: tuple[tuple[int, int], ...]
    """(layer, visual tokens kept)."""
    num_layers: int
    num_visual: int
    """Visual tokens of a picture before any reduction."""
    source: str
    """"reference", "reference benchmark script", "continued linearly" or "derived"."""
    encoder_keep: int | None = None
    """Visual tokens per tile that an encoder-side selector passes on; None without one."""

    def schedule(self, **settings: Any) -> Schedule:
        """Return the preset with ``Schedule``'s other fields set."""
        return _schedule(self.stages, settings)

    @property
    def average_keep(self) -> float:
        """Mean over layers of the visual tokens processed, as a fraction of ``num_visual``."""
        entering = self.num_visual if self.encoder_keep is None else self.encoder_keep
        schedule = self.schedule()
        return (
            schedule.average_keep(num_layers=self.num_layers, num_visual=entering)
            * entering
            / self.num_visual
        )


def _llava(
    name: str, *stages: tuple[int, int], num_visual: int, source: str, encoder_keep: int | None = None
) -> Preset:
    return Preset(
        name=name,
        stages=stages,
        num_layers=32,
        num_visual=num_visual,
        source=source,
        encoder_keep=encoder_keep,
    )


PRESETS: dict[str, tuple[Preset, ...]] = {
    "llava-1.5-7b": (
        _llava("11.1%", (1, 92), (10, 54), (15, 22), num_visual=576, source="reference"),
        _llava("22.2%", (1, 218), (10, 128), (15, 54), num_visual=576, source="reference"),
        _llava("33.3%", (1, 344), (10, 202), (15, 86), num_visual=576, source="continued linearly"),
    ),
    "llava-1.5-7b-encoder": (
        _llava("11.1%", (16, 32), num_visual=576, source="reference", encoder_keep=96),
        _llava("22.2%", (16, 64), num_visual=576, source="same pattern", encoder_keep=192),
        _llava("33.3%", (16, 96), num_visual=576, source="same pattern", encoder_keep=288),
    ),
    "llava-next-7b": (
        _llava("11.1%", (1, 460), (10, 270), (15, 110), num_visual=2880, source="derived"),
        _llava("12.0%", (1, 436), (10, 255), (15, 173), num_visual=2880, source="reference benchmark script"),
    ),
}
"""By model key, most reduced first. ``llava-1.5-7b-encoder`` goes with the encoder-side selector."""


def preset_schedule(model: str, keep: str, **settings: Any) -> Schedule:
    """Return the preset ``keep`` (for example ``11.1%``) of ``model``.

    Raises:
        ScheduleError: If there is no such model key or budget; the message names those that there are.
    """
    if model not in PRESETS:
        raise ScheduleError(
            f"preset: expected one of {', '.join(PRESETS)}, got {model!r}; or give a schedule"
        )
    for preset in PRESETS[model]:
        if abs(parse_keep(preset.name) - parse_keep(keep)) < PRINTED:
            return preset.schedule(**settings)
    names = ", ".join(preset.name for preset in PRESETS[model])
    raise ScheduleError(f"preset of {model}: expected one of {names}, got {keep!r}; or give a schedule")


def parse_schedule(text: str, **settings: Any) -> Schedule:
    """Return the schedule written as ``layer:kept`` pairs, for instance ``1:460,10:270,15:110``.

    ``settings`` are ``Schedule``'s other fields.

    Raises:
        ScheduleError: If the text is not of that form, the stages are not in order, or one keeps more than ``MAX_TOPK``.
    """
    stages = []
    for part in text.split(","):
        layer, colon, keep = part.strip().partition(":")
        if not (colon and re.fullmatch("[0-9]{1,9}", layer) and re.fullmatch("[0-9]{1,9}", keep)):
            raise ScheduleError(
                f"schedule {text!r}: expected LAYER:KEPT pairs, got {part.strip()!r}; write it as 1:460,10:270,15:110"
            )
        stages.append((int(layer), int(keep)))
    _check_topk(stages)
    return _schedule(stages, settings)


def parse_keep(text: str) -> float:
    """Return the fraction written as ``11.1%`` or ``0.111``.

    Raises:
        ScheduleError: If the text is no number, or not in (0, 1].
    """
    stripped = text.strip()
    try:
        value = float(stripped.removesuffix("%")) / (100 if stripped.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0.0 < value <= 1.0:
        raise ScheduleError(
            f"keep {text!r}: expected a fraction in (0, 1], got {text!r}; write it as 11.1% or 0.111"
        )
    return value


def default_stage_layers(num_layers: int) -> tuple[int, ...]:
    """Return the stage layers for a decoder of ``num_layers``: the preset's 1, 10, 15 of 32 in proportion.

    Each is rounded to the nearest layer, is at least 1 and lies behind the one before it; layers past the end
    are left out, so a decoder of 3 layers has two stages, one of 2 layers has one, and one of a single layer
    has none.
    """
    layers: list[int] = []
    for layer in _SHAPE_LAYERS:
        scaled = math.floor(layer * num_layers / _SHAPE_NUM_LAYERS + 0.5)
        layers.append(max(scaled, layers[-1] + 1 if layers else 1))
    return tuple(layer for layer in layers if layer < num_layers)


def schedule_for_keep(
    average: float, *, num_layers: int, num_visual: int, layers: Sequence[int] | None = None, **settings: Any
) -> Schedule:
    """Return a schedule whose average keep is as near to ``average`` as integers allow, never above.

    Where number of layers and of visual tokens are a preset's and ``average`` is its budget as printed (11.1
    % stands for 64 of 576), the preset itself is returned. Otherwise the stages keep tokens in the proportion
    460 : 270 : 110; where that would keep more than there are, later stages keep more instead, and a stage
    that would keep everything is left out. With too few tokens or layers for three stages there are two, or
    one.

    Args:
        average: Wished average keep, in (0, 1]; 1 gives a schedule without stages.
        num_layers: L, decoder layers.
        num_visual: N, visual tokens of the picture.
        layers: Stage layers, ascending; by default ``default_stage_layers``.
        settings: ``Schedule``'s other fields.

    Raises:
        ScheduleError: If the layers before the first stage alone exceed the wished average, or a stage would
            keep more than ``MAX_TOPK``.
    """
    if not 0.0 < average <= 1.0:
        raise ScheduleError(
            f"keep {average}: expected a fraction in (0, 1], got {average}; write it as 11.1% or 0.111"
        )
    if average == 1.0:
        return _schedule((), settings)
    if layers is None:
        for presets in PRESETS.values():
            for preset in presets:
                fits = (preset.num_layers, preset.num_visual, preset.encoder_keep) == (
                    num_layers,
                    num_visual,
                    None,
                )
                if fits and abs(preset.average_keep - average) < PRINTED:
                    return preset.schedule(**settings)
        layers = default_stage_layers(num_layers)
    if layers:
        _check_layers(layers, num_layers=num_layers)
    budget = math.floor(average * num_layers * num_visual + 1e-6)
    for count in range(len(layers), 0, -1):
        chosen = tuple(layers[:count])
        keeps = _keeps(budget, layers=chosen, num_layers=num_layers, num_visual=num_visual)
        if keeps is not None:
            stages = [(layer, keep) for layer, keep in zip(chosen, keeps) if keep < num_visual]
            _check_topk(stages)
            return _schedule(stages, settings)
    first = layers[0] if layers else num_layers
    least = (first * num_visual + num_layers - first) / (num_layers * num_visual)
    raise ScheduleError(
        f"keep {average:.1%}: expected an average of at least {math.ceil(least * 1000) / 10:.1f}% (layers 0..{first - 1} of"
        f" {num_layers} see all {num_visual} visual tokens), got {average:.1%}; keep more"
    )


def _schedule(stages: Sequence[tuple[int, int]], settings: dict[str, Any]) -> Schedule:
    return Schedule(stages=tuple(Stage(layer=layer, keep=keep) for layer, keep in stages), **settings)


def _check_layers(layers: Sequence[int], *, num_layers: int) -> None:
    ascending = all(earlier < later for earlier, later in zip(layers, layers[1:]))
    if not (layers and ascending and layers[0] >= 1 and layers[-1] < num_layers):
        raise ScheduleError(
            f"stage layers: expected ascending layers in 1..{num_layers - 1}, got {', '.join(map(str, layers)) or 'none'};"
            f" choose layers of the decoder"
        )


def _check_topk(stages: Sequence[tuple[int, int]]) -> None:
    for layer, keep in stages:
        if keep > MAX_TOPK:
            raise ScheduleError(
                f"stage at layer {layer}: expected to keep <= {MAX_TOPK} tokens (TensorRT's TopK), got {keep}; keep fewer"
            )


def _keeps(
    budget: int, *, layers: tuple[int, ...], num_layers: int, num_visual: int
) -> tuple[int, ...] | None:
    """Return strictly decreasing keeps that use the budget as fully as they can; None if there are none."""
    weights = [end - start for start, end in zip(layers, (*layers[1:], num_layers))]
    budget -= layers[0] * num_visual
    least = sum(weight * (len(weights) - index) for index, weight in enumerate(weights))
    if budget < least or num_visual < len(weights):
        return None
    return integer_keeps(
        _real_keeps(budget, weights=weights, num_visual=num_visual),
        budget=budget,
        weights=weights,
        num_visual=num_visual,
    )


def integer_keeps(
    real_keeps: Sequence[float], *, budget: int, weights: Sequence[int], num_visual: int
) -> tuple[int, ...] | None:
    """Return strictly decreasing keeps near ``real_keeps`` that leave the least of the budget; None if there are none.

    Args:
        real_keeps: Wished visual tokens of each stage.
        budget: Sum over the layers behind the first stage of the visual tokens that they may process.
        weights: Layers that each stage's tokens go through.
        num_visual: N.
    """
    keeps = [math.floor(keep) for keep in real_keeps]
    for index in range(len(keeps) - 1, -1, -1):  # strictly decreasing, at least 1
        keeps[index] = min(
            max(keeps[index], keeps[index + 1] + 1 if index + 1 < len(keeps) else 1), num_visual - index
        )
    for index in range(
        len(keeps)
    ):  # raising small keeps may have overdrawn the budget: take it from the largest
        floor = len(keeps) - index
        while sum(w * k for w, k in zip(weights, keeps)) > budget and keeps[index] > floor:
            if index + 1 < len(keeps) and keeps[index] == keeps[index + 1] + 1:
                break
            keeps[index] -= 1
    return _spend_rest(budget, weights=weights, keeps=keeps, num_visual=num_visual)


def _real_keeps(budget: int, *, weights: Sequence[int], num_visual: int) -> list[float]:
    """Return real-valued keeps of the preset's shape; past its largest size, between that and keeping all."""
    count = len(weights)
    if count == len(_SHAPE_KEEPS):
        shape: list[float] = [float(keep) for keep in _SHAPE_KEEPS]
    else:  # geometric between the same ends
        ratio = _SHAPE_KEEPS[-1] / _SHAPE_KEEPS[0]
        shape = [_SHAPE_KEEPS[0] * ratio ** (index / max(count - 1, 1)) for index in range(count)]
    unit = sum(weight * keep for weight, keep in zip(weights, shape))
    largest = [keep * num_visual / shape[0] for keep in shape]
    most = sum(weight * keep for weight, keep in zip(weights, largest))
    if budget <= most:
        return [keep * budget / unit for keep in shape]
    share = (budget - most) / (num_visual * sum(weights) - most)
    return [keep + share * (num_visual - keep) for keep in largest]


def _spend_rest(
    budget: int, *, weights: Sequence[int], keeps: list[int], num_visual: int
) -> tuple[int, ...] | None:
    """Return keeps near ``keeps`` that leave the least of the budget, and of those the nearest."""
    candidates: list[tuple[int, ...]] = [()]
    reach = [max(weights) if index < 2 else 0 for index in range(len(keeps) - 1)]
    for keep, distance in zip(keeps, reach):
        steps = range(-distance, distance + 1)
        candidates = [(*head, keep + step) for head in candidates for step in steps]
    best: tuple[tuple[int, int], tuple[int, ...]] | None = None
    for head in candidates:
        rest = budget - sum(weight * keep for weight, keep in zip(weights, head))
        last = min(rest // weights[-1], (head[-1] - 1) if head else num_visual)
        full = (*head, last)
        if last < 1 or full[0] > num_visual or any(a <= b for a, b in zip(full, full[1:])):
            continue
        cost = (rest - last * weights[-1], sum(abs(a - b) for a, b in zip(full, keeps)))
        if best is None or cost < best[0]:
            best = (cost, full)
    return None if best is None else best[1]


# Where each method reduces, and to how many tokens, for a wished average over all layers.
#
# Papers count differently: some name the tokens behind the only stage, some an average that counts the scoring layer at its
# reduced length. Here every method gets the same true budget: the mean over all decoder layers of the visual tokens that a
# layer processes. Published stage layers are kept in proportion to the depth where the budget allows; numbers of tokens are
# solved to spend the budget as fully as whole numbers can (``schedule.integer_keeps``), as for TRIO.
#
# | method      | stages in front of layers        | tokens of the stages                                                   |
# |-------------|----------------------------------|------------------------------------------------------------------------|
# | fastv       | 2, at any depth; 1 if 2 is too   | what is left of the budget                                             |
# | dart        | late for the budget              |                                                                        |
# | pyramiddrop | 8, 16, 24 of 32, or (q, 2q, 3q)  | λ N, λ² N, λ³ N with the λ that spends the budget (0.5 published, at   |
# |             | of 32 for the largest q <= 8     | 46.9 %). q goes down while λ would be below 1/4: at 8, 16, 24 alone    |
# |             | that leaves λ >= 1/4             | a quarter of the average is spent before the first stage               |
# | sparsevlm   | 3, 7, 16 of 32 (after 2, 6, 15); | on the straight line between the two published tables around the       |
# |             | 1 or 2 earlier if too late       | budget; below the smallest in its proportions, above towards all       |
#
# If even the earliest stages are too many for the budget's last few tokens, the last ones are left out.
#
# Behind a reduction in front of the decoder the average is still a share of all the picture's tokens (``combined_schedule``).
#
# The scoring layer of SparseVLM runs before its tokens are dropped, so the published "192, 128, 96, 64" process 206.5,
# 145.4, 114.1 and 82.2 of 576 on average.


_DEPTH = 32
_TABLE_VISUAL = 576
_SPARSEVLM_LAYERS = (3, 7, 16)
_SPARSEVLM_TABLES = ((82, 32, 18), (249, 55, 27), (312, 117, 39), (309, 204, 113))
"""Rows that go on, merged ones among them; by true average, 82.2 to 206.5 of 576."""
_PYRAMID_LAST = 8
_LEAST_LAMBDA = 0.25

_POSITIONS: dict[Method, Positions] = {
    "trio": "compact",
    "fastv": "preserved",
    "pyramiddrop": "compact",
    "dart": "preserved",
    "sparsevlm": "compact",
}


def default_positions(method: Method) -> Positions:
    """Return the position ids that the method's original gives to the rows behind a stage."""
    return _POSITIONS[method]


def method_schedule(
    method: Method,
    average: float,
    *,
    num_layers: int,
    num_visual: int,
    layers: Sequence[int] | None = None,
    **settings: Any,
) -> Schedule:
    """Return a method's schedule whose true average keep is as near to ``average`` as integers allow, never above.

    Args:
        method: "trio" goes to ``schedule_for_keep``.
        average: Wished average keep, in (0, 1]; 1 gives a schedule without stages.
        num_layers: L, decoder layers.
        num_visual: N, visual tokens of the picture.
        layers: Stage layers, ascending; by default the method's own.
        settings: ``Schedule``'s other fields; positions are the method's by default.

    Raises:
        ScheduleError: If the layers before the first stage alone exceed the wished average, or a stage would keep more
            than ``MAX_TOPK``.
    """
    settings = {"method": method, "positions": default_positions(method), **settings}
    if method == "trio" or not 0.0 < average < 1.0:
        return schedule_for_keep(
            average, num_layers=num_layers, num_visual=num_visual, layers=layers, **settings
        )
    budget = math.floor(average * num_layers * num_visual + 1e-6)
    candidates = [tuple(layers)] if layers is not None else default_layers(method, num_layers=num_layers)
    last = candidates[-1] if candidates else ()
    if layers is not None:
        _check_layers(last, num_layers=num_layers)
    for chosen in [*candidates, *(last[:count] for count in range(len(last) - 1, 0, -1))]:
        keeps = _SOLVERS[method](
            budget,
            layers=chosen,
            num_layers=num_layers,
            num_visual=num_visual,
            is_last=chosen[0] == last[0],
        )
        if keeps is not None:
            stages = [(layer, keep) for layer, keep in zip(chosen, keeps) if keep < num_visual]
            _check_topk(stages)
            return _schedule(stages, settings)
    first = last[0] if last else num_layers
    least = (first * num_visual + num_layers - first) / (num_layers * num_visual)
    raise ScheduleError(
        f"keep {average:.1%}: expected an average of at least {math.ceil(least * 1000) / 10:.1f}% for {method} (layers"
        f" 0..{first - 1} of {num_layers} see all {num_visual} visual tokens), got {average:.1%}; keep more"
    )


def combined_schedule(
    method: Method, average: float, *, num_layers: int, picture_tokens: int, entering: int, **settings: Any
) -> Schedule:
    """Return the schedule of a decoder that only some of the picture's tokens reach.

    TRIO then has one stage halfway down, as in the paper's mode with encoder reduction, where the budget allows it.

    Args:
        method: Of the stages.
        average: Wished mean over all layers, as a share of ``picture_tokens``; no stages if ``entering`` are no more.
        num_layers: L, decoder layers.
        picture_tokens: Visual tokens of the picture before any reduction.
        entering: Those that enter the decoder.
        settings: ``Schedule``'s other fields.

    Raises:
        ScheduleError: As ``method_schedule``.
    """
    share = min(average * picture_tokens / entering, 1.0)
    if entering < picture_tokens and (average + PRINTED) * picture_tokens >= entering:
        share = 1.0
    halfway = num_layers // 2
    if method != "trio" or entering == picture_tokens or share == 1.0 or halfway < 1:
        return method_schedule(method, share, num_layers=num_layers, num_visual=entering, **settings)
    for preset in PRESETS["llava-1.5-7b-encoder"]:
        sizes = (preset.num_layers, preset.num_visual, preset.encoder_keep)
        if sizes == (num_layers, picture_tokens, entering) and abs(preset.average_keep - average) < PRINTED:
            return preset.schedule(**settings)
    enough = share * num_layers * entering >= halfway * entering + num_layers - halfway
    layers = (halfway,) if enough else None
    return method_schedule(
        method, share, num_layers=num_layers, num_visual=entering, layers=layers, **settings
    )


def check_combined_keep(text: str, *, picture_tokens: int, entering: int) -> None:
    """Raise ScheduleError if the wished keep ``text`` is more than what enters the decoder: that has gone before.

    Args:
        text: As ``11.1%``.
        picture_tokens: Visual tokens of the picture before any reduction.
        entering: Those that enter the decoder.
    """
    if parse_keep(text) * picture_tokens >= entering + 1:
        raise ScheduleError(
            f"--keep: expected at most {entering / picture_tokens:.1%}, which is what enters the decoder of the picture's"
            f" {picture_tokens} visual tokens, got {text}; give 'all' for no reduction in the decoder"
        )


def default_layers(method: Method, *, num_layers: int) -> list[tuple[int, ...]]:
    """Return the method's stage layers, and then earlier ones for budgets that those cannot meet."""
    candidates: list[tuple[int, ...]]
    if method in ("fastv", "dart"):
        candidates = [(layer,) for layer in (2, 1)]
    elif method == "pyramiddrop":
        candidates = [_scaled((q, 2 * q, 3 * q), num_layers) for q in range(_PYRAMID_LAST, 0, -1)]
    else:
        shifted = ([layer - earlier for layer in _SPARSEVLM_LAYERS] for earlier in range(3))
        candidates = [_scaled(layers, num_layers) for layers in shifted]
    inside = (tuple(layer for layer in layers if layer < num_layers) for layers in candidates)
    return list(dict.fromkeys(layers for layers in inside if layers))


def _scaled(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return the layers in proportion to the depth, each at least 1 and behind the one before it."""
    result: list[int] = []
    for layer in layers:
        nearest = math.floor(layer * num_layers / _DEPTH + 0.5)
        result.append(max(nearest, result[-1] + 1 if result else 1))
    return tuple(result)


def _solve_rest(
    budget: int, *, layers: Sequence[int], num_layers: int, num_visual: int, is_last: bool
) -> tuple[int, ...] | None:
    """Return keeps in equal steps of what the budget leaves; one stage gets all of it."""
    del is_last
    weights, rest = _weights(layers, num_layers), budget - layers[0] * num_visual
    if rest < 1:
        return None
    shape = [float(len(weights) - index) for index in range(len(weights))]
    unit = sum(weight * share for weight, share in zip(weights, shape))
    return _integers([share * rest / unit for share in shape], rest, weights=weights, num_visual=num_visual)


def _solve_pyramid(
    budget: int, *, layers: Sequence[int], num_layers: int, num_visual: int, is_last: bool
) -> tuple[int, ...] | None:
    """Return λ N, λ² N, ...; None below the least λ, unless there are no earlier layers to try."""
    weights, rest = _weights(layers, num_layers), budget - layers[0] * num_visual

    def spent(share: float) -> float:
        return sum(weight * num_visual * share ** (stage + 1) for stage, weight in enumerate(weights))

    if rest < 1 or (spent(_LEAST_LAMBDA) > rest and not is_last):
        return None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= rest else (low, middle)
    keeps = [num_visual * low ** (stage + 1) for stage in range(len(weights))]
    return _integers(keeps, rest, weights=weights, num_visual=num_visual)


def _solve_tables(
    budget: int, *, layers: Sequence[int], num_layers: int, num_visual: int, is_last: bool
) -> tuple[int, ...] | None:
    """Return keeps on the line through the published tables, scaled to N."""
    del is_last
    weights, rest = _weights(layers, num_layers), budget - layers[0] * num_visual
    if rest < 1:
        return None
    scale = num_visual / _TABLE_VISUAL
    tables = [[scale * keep for keep in table[: len(weights)]] for table in _SPARSEVLM_TABLES]
    points = [[0.0] * len(weights), *tables, [float(num_visual)] * len(weights)]
    costs = [sum(weight * keep for weight, keep in zip(weights, point)) for point in points]
    place = next(place for place in range(len(points) - 1) if rest <= costs[place + 1])
    share = (rest - costs[place]) / (costs[place + 1] - costs[place])
    keeps = [low + share * (high - low) for low, high in zip(points[place], points[place + 1])]
    return _integers(keeps, rest, weights=weights, num_visual=num_visual)


_SOLVERS: dict[Method, Callable[..., tuple[int, ...] | None]] = {
    "fastv": _solve_rest,
    "dart": _solve_rest,
    "pyramiddrop": _solve_pyramid,
    "sparsevlm": _solve_tables,
}


def _weights(layers: Sequence[int], num_layers: int) -> list[int]:
    return [end - start for start, end in zip(layers, (*layers[1:], num_layers))]


def _integers(
    keeps: Sequence[float], rest: int, *, weights: Sequence[int], num_visual: int
) -> tuple[int, ...] | None:
    least = sum(weight * (len(weights) - index) for index, weight in enumerate(weights))
    if rest < least or num_visual < len(weights):
        return None
    return integer_keeps(keeps, budget=rest, weights=weights, num_visual=num_visual)
