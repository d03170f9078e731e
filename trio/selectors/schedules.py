"""Where each method reduces, and to how many tokens, for a wished average over all layers.

Papers count differently: some name the tokens behind the only stage, some an average that counts the scoring layer at its
reduced length. Here every method gets the same true budget: the mean over all decoder layers of the visual tokens that a
layer processes. Published stage layers are kept in proportion to the depth where the budget allows; numbers of tokens are
solved to spend the budget as fully as whole numbers can (``schedule.integer_keeps``), as for TRIO.

| method      | stages in front of layers        | tokens of the stages                                                   |
|-------------|----------------------------------|------------------------------------------------------------------------|
| fastv       | 2, at any depth; 1 if 2 is too   | what is left of the budget                                             |
| dart        | late for the budget              |                                                                        |
| pyramiddrop | 8, 16, 24 of 32, or (q, 2q, 3q)  | λ N, λ² N, λ³ N with the λ that spends the budget (0.5 published, at   |
|             | of 32 for the largest q <= 8     | 46.9 %). q goes down while λ would be below 1/4: at 8, 16, 24 alone    |
|             | that leaves λ >= 1/4             | a quarter of the average is spent before the first stage               |
| sparsevlm   | 3, 7, 16 of 32 (after 2, 6, 15); | on the straight line between the two published tables around the       |
|             | 1 or 2 earlier if too late       | budget; below the smallest in its proportions, above towards all       |

If even the earliest stages are too many for the budget's last few tokens, the last ones are left out.

Behind a reduction in front of the decoder the average is still a share of all the picture's tokens (``combined_schedule``).

The scoring layer of SparseVLM runs before its tokens are dropped, so the published "192, 128, 96, 64" process 206.5,
145.4, 114.1 and 82.2 of 576 on average.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from trio_edge.runtime.errors import ScheduleError
from trio_edge.runtime.schedule import Method, Positions, Schedule, Stage
from trio_edge.trio.schedule import MAX_TOPK, PRESETS, PRINTED, integer_keeps, parse_keep, schedule_for_keep

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
            return _schedule(chosen, keeps, num_visual=num_visual, settings=settings)
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


def _check_layers(layers: Sequence[int], *, num_layers: int) -> None:
    ascending = all(earlier < later for earlier, later in zip(layers, layers[1:]))
    if not (layers and ascending and layers[0] >= 1 and layers[-1] < num_layers):
        raise ScheduleError(
            f"stage layers: expected ascending layers in 1..{num_layers - 1}, got {', '.join(map(str, layers)) or 'none'};"
            f" choose layers of the decoder"
        )


def _schedule(
    layers: Sequence[int], keeps: Sequence[int], *, num_visual: int, settings: dict[str, Any]
) -> Schedule:
    stages = [Stage(layer=layer, keep=keep) for layer, keep in zip(layers, keeps) if keep < num_visual]
    for stage in stages:
        if stage.keep > MAX_TOPK:
            raise ScheduleError(
                f"stage at layer {stage.layer}: expected to keep <= {MAX_TOPK} tokens (TensorRT's TopK), got"
                f" {stage.keep}; keep fewer"
            )
    return Schedule(stages=tuple(stages), **settings)
