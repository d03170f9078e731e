"""Turns scenes into training arrays: LLaVA-NeXT's tiles, labels per patch, tokenised questions.

Images of one layout (equal tiling and unpadding) form a group, because a batch needs one shape.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from multiprocessing import Pool

import numpy as np
from PIL import Image
from shapes.questions import KINDS, ask
from shapes.scene import (  # fmt: skip
    CANVASES,
    COLOR_NAMES,
    DIGITS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    SceneCanvas,
    make_scene,
    render,
)

TILE, PATCH = 48, 8
SIDE = TILE // PATCH
PINPOINTS = [[48, 96], [96, 48], [96, 96], [144, 48], [48, 144]]
NAMES = (*SHAPES, *DIGITS)


@dataclass(frozen=True)
class Layout:
    """The processor's cuts of an image: resized size, padded size, and the order of visual tokens.

    `order[i]` is the index of visual token i in the flattened tiles (base tile first); -1 is a newline token.
    """

    width: int
    height: int
    inner: tuple[int, int]
    outer: tuple[int, int]
    order: tuple[int, ...]

    @property
    def offset(self) -> tuple[int, int]:
        """Left and top padding in pixels."""
        return (self.outer[0] - self.inner[0]) // 2, (self.outer[1] - self.inner[1]) // 2


def _best_resolution(width: int, height: int) -> tuple[int, int]:
    """Returns the pinpoint (height, width) with the largest effective and the smallest wasted area."""
    best, key = (0, 0), (-1, 0)
    for h, w in PINPOINTS:
        scale = min(w / width, h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        if (effective, effective - h * w) > key:
            best, key = (h, w), (effective, effective - h * w)
    return best


@cache
def layout_of(width: int, height: int) -> Layout:
    """Returns the layout of a picture size, by the rules of LlavaNextProcessor and LlavaNextModel."""
    high, wide = _best_resolution(width, height)
    if wide / width < high / height:
        inner = (wide, min(math.ceil(height * wide / width), high))
    else:
        inner = (min(math.ceil(width * high / height), wide), high)
    rows, cols = high // PATCH, wide // PATCH
    if width / height > cols / rows:
        top, left = (rows - int(round(height * (cols / width), 7))) // 2, 0
    else:
        top, left = 0, (cols - int(round(width * (rows / height), 7))) // 2
    order = list(range(SIDE * SIDE))
    for y in range(top, rows - top):
        for x in range(left, cols - left):
            tile = 1 + (y // SIDE) * (cols // SIDE) + x // SIDE
            order.append((tile * SIDE + y % SIDE) * SIDE + x % SIDE)
        order.append(-1)
    return Layout(width, height, inner, (wide, high), tuple(order))


def tiles_of(picture: Image.Image) -> np.ndarray:
    """Returns the tiles `[T, 48, 48, 3]` uint8 of a picture, base tile first."""
    layout = layout_of(*picture.size)
    base = np.asarray(picture.resize((TILE, TILE), Image.Resampling.BICUBIC))
    inner = (
        picture if picture.size == layout.inner else picture.resize(layout.inner, Image.Resampling.BICUBIC)
    )
    wide, high = layout.outer
    canvas = np.zeros((high, wide, 3), np.uint8)
    left, top = layout.offset
    canvas[top : top + layout.inner[1], left : left + layout.inner[0]] = np.asarray(inner)
    cut = canvas.reshape(high // TILE, TILE, wide // TILE, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)
    return np.concatenate([base[None], cut])


def labels_of(scene: Scene) -> np.ndarray:
    """Returns int8 labels `[T * 36, 6]`: name (0 is nothing), colour, size, place, centre flag, number of the object from 1."""
    layout = layout_of(scene.canvas.width, scene.canvas.height)
    (wide, high), (left, top) = layout.outer, layout.offset
    tiles = (wide // TILE) * (high // TILE)
    base = _grid_labels(
        scene, TILE / scene.canvas.layout_width, TILE / scene.canvas.layout_height, (0, 0), (SIDE, SIDE)
    )
    x_scale = layout.inner[0] / scene.canvas.layout_width
    y_scale = layout.inner[1] / scene.canvas.layout_height
    fine = _grid_labels(scene, x_scale, y_scale, (left, top), (high // PATCH, wide // PATCH))
    fine = (
        fine.reshape(high // TILE, SIDE, wide // TILE, SIDE, 6).swapaxes(1, 2).reshape(tiles * SIDE * SIDE, 6)
    )
    return np.concatenate([base.reshape(-1, 6), fine])


def _grid_labels(
    scene: Scene, x_scale: float, y_scale: float, offset: tuple[int, int], shape: tuple[int, int]
) -> np.ndarray:
    """Returns labels `[rows, cols, 6]`; a patch belongs to the object that covers most of it."""
    rows, cols = shape
    labels = np.zeros((rows, cols, 6), np.int8)
    best = np.zeros((rows, cols))
    left, top = np.arange(cols) * PATCH, np.arange(rows) * PATCH
    for number, thing in enumerate(scene.things):
        x, y = thing.x * x_scale + offset[0], thing.y * y_scale + offset[1]
        w, h = thing.half_width * x_scale, thing.half_height * y_scale
        across = np.clip(np.minimum(left + PATCH, x + w) - np.maximum(left, x - w), 0, None)
        down = np.clip(np.minimum(top + PATCH, y + h) - np.maximum(top, y - h), 0, None)
        cover = down[:, None] * across[None]
        row, col = min(rows - 1, int(y / PATCH)), min(cols - 1, int(x / PATCH))
        cover[row, col] += 10
        take = (cover > best) & (cover >= min(12.0, 4 * w * h * 0.3))
        best = np.where(take, cover, best)
        labels[take, :4] = (
            1 + NAMES.index(thing.name), COLOR_NAMES.index(thing.color), SIZES.index(thing.size),
            PLACES.index(thing.place),
        )  # fmt: skip
        labels[take, 4] = 0
        labels[take, 5] = 1 + number
        if take[row, col]:
            labels[row, col, 4] = 1
    return labels


def questions_of(
    scene: Scene, seed: str, *, count: int, kinds: tuple[str, ...] = KINDS, weights: list[float] | None = None
) -> list[tuple[str, str, str]]:
    """Returns up to `count` different (kind, question, answer) triples of a scene."""
    rng = random.Random(seed)
    found: dict[str, tuple[str, str, str]] = {}
    for kind in rng.choices(kinds, weights, k=count * 3):
        pair = ask(scene, kind, rng)
        if pair and pair[0] not in found:
            found[pair[0]] = (kind, *pair)
            if len(found) == count:
                break
    return list(found.values())


def _draw(task: tuple[int, SceneCanvas]) -> tuple[np.ndarray, np.ndarray]:
    """Returns tiles and labels of one seed."""
    seed, canvas = task
    scene = make_scene(seed, canvas=canvas)
    return tiles_of(render(scene)), labels_of(scene)


@dataclass
class Group:
    """Pictures of one layout: tiles `[n, T, 48, 48, 3]`, labels `[n, T * 36, 6]`, their seeds and canvas numbers."""

    layout: Layout
    tiles: np.ndarray
    labels: np.ndarray
    seeds: list[int]
    canvases: list[int]


def make_groups(first_seed: int, count: int, *, workers: int = 2) -> list[Group]:
    """Returns `count` pictures grouped by layout, shares as in `CANVASES`."""
    by_order: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    seed = first_seed
    for number, canvas in enumerate(CANVASES):
        members = by_order.setdefault(layout_of(canvas.width, canvas.height).order, [])
        for _ in range(round(count * canvas.weight)):
            members.append((seed, number))
            seed += 1
    groups = []
    with Pool(workers) as pool:
        for members in by_order.values():
            random.Random(first_seed).shuffle(members)
            drawn = pool.map(_draw, [(s, CANVASES[c]) for s, c in members], chunksize=64)
            canvas = CANVASES[members[0][1]]
            groups.append(
                Group(
                    layout_of(canvas.width, canvas.height),
                    np.stack([tiles for tiles, _ in drawn]),
                    np.stack([labels for _, labels in drawn]),
                    [s for s, _ in members],
                    [c for _, c in members],
                )
            )
    return groups
