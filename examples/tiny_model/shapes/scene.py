"""Deterministic images of coloured shapes and digits: ``make_scene`` chooses the objects, ``render`` paints them.

The seed decides everything. Objects keep their distance from each other, from the borders between thirds of the image (so that
every place word is certain) and from the lines at which LLaVA-NeXT cuts the image into tiles.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 40),
    "orange": (248, 140, 24),
    "yellow": (246, 230, 60),
    "green": (40, 176, 60),
    "cyan": (64, 222, 230),
    "blue": (48, 84, 240),
    "purple": (176, 60, 214),
    "white": (246, 246, 246),
}
COLOR_NAMES: tuple[str, ...] = tuple(COLORS)
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross", "star")
DIGITS: tuple[str, ...] = tuple("0123456789")
SIZES: tuple[str, ...] = ("small", "large")
PLACES: tuple[str, ...] = (
    "northwest", "north", "northeast", "west", "center", "east", "southwest", "south", "southeast",
)  # fmt: skip

SMALL_PIXELS = (9.0, 12.0)
LARGE_PIXELS = (17.0, 21.0)
DIGIT_ASPECT = 0.66
SUPERSAMPLE = 4


@dataclass(frozen=True)
class SceneCanvas:
    """One image size, in pixels, and its layout.

    ``scale`` is image pixels per layout pixel: after LLaVA-NeXT's tiling with 48-pixel tiles an object has its layout size
    again. ``cuts_x`` and ``cuts_y`` are the layout coordinates of the tile borders.
    """

    width: int
    height: int
    scale: float
    cuts_x: tuple[float, ...]
    cuts_y: tuple[float, ...]
    num_objects: tuple[int, int]
    weight: float

    @property
    def layout_width(self) -> float:
        """Width in layout pixels."""
        return self.width / self.scale

    @property
    def layout_height(self) -> float:
        """Height in layout pixels."""
        return self.height / self.scale


CANVASES: tuple[SceneCanvas, ...] = (
    SceneCanvas(96, 96, 1.0, (48,), (48,), (3, 7), 0.60),
    SceneCanvas(144, 48, 1.0, (48, 96), (), (3, 6), 0.08),
    SceneCanvas(48, 144, 1.0, (), (48, 96), (3, 6), 0.08),
    SceneCanvas(96, 48, 1.0, (48,), (), (2, 4), 0.05),
    SceneCanvas(48, 96, 1.0, (), (48,), (2, 4), 0.05),
    SceneCanvas(120, 90, 1.25, (48,), (36,), (3, 6), 0.05),
    SceneCanvas(200, 150, 200 / 96, (48,), (36,), (3, 6), 0.05),
    SceneCanvas(80, 110, 110 / 96, (35,), (48,), (3, 5), 0.04),
)


@dataclass(frozen=True)
class Thing:
    """One object: ``name`` is a shape or a digit; centre and half extents are in layout pixels."""

    name: str
    color: str
    size: str
    place: str
    x: float
    y: float
    half_width: float
    half_height: float

    @property
    def is_digit(self) -> bool:
        """Whether the object is a digit."""
        return self.name in DIGITS


@dataclass(frozen=True)
class Scene:
    """The objects of one image."""

    seed: int
    canvas: SceneCanvas
    things: tuple[Thing, ...]


def make_scene(seed: int, *, canvas: SceneCanvas | None = None) -> Scene:
    """Return the scene of a seed; ``canvas`` replaces the image size that the seed would choose."""
    rng = random.Random(f"scene {seed}")
    chosen = rng.choices(CANVASES, [c.weight for c in CANVASES])[0]
    canvas = canvas or chosen
    wanted = rng.randint(*canvas.num_objects)
    palette = rng.sample(COLOR_NAMES, rng.randint(3, len(COLOR_NAMES)))
    names = rng.sample(SHAPES, rng.randint(2, len(SHAPES)))
    things: list[Thing] = []
    for _ in range(wanted):
        thing = place_thing(rng, canvas, things, palette=palette, names=names)
        if thing is not None:
            things.append(thing)
    return Scene(seed, canvas, tuple(things))


def place_thing(
    rng: random.Random, canvas: SceneCanvas, others: list[Thing], *, palette: list[str], names: list[str]
) -> Thing | None:
    """Return a new object that overlaps none of ``others``, or None when no free spot was found."""
    name = rng.choice(DIGITS) if rng.random() < 0.42 else rng.choice(names)
    size = "small" if rng.random() < 0.6 else "large"
    side = rng.uniform(*(SMALL_PIXELS if size == "small" else LARGE_PIXELS))
    half_height = side / 2
    half_width = half_height * (DIGIT_ASPECT if name in DIGITS else 1.0)
    color = rng.choice(palette)
    look = Thing(name, color, size, PLACES[0], 0.0, 0.0, half_width, half_height)
    return moved_thing(look, canvas, others, rng)


def moved_thing(look: Thing, canvas: SceneCanvas, others: list[Thing], rng: random.Random) -> Thing | None:
    """Return an object that looks like ``look`` on a spot free of ``others``, or None when none was found."""
    width, height = canvas.layout_width, canvas.layout_height
    half_width, half_height = look.half_width, look.half_height
    for _ in range(60):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        column = _third(x, half_width, width, canvas.cuts_x)
        row = _third(y, half_height, height, canvas.cuts_y)
        if column < 0 or row < 0:
            continue
        if all(
            abs(x - o.x) > half_width + o.half_width + 2 or abs(y - o.y) > half_height + o.half_height + 2
            for o in others
        ):
            return replace(look, place=PLACES[3 * row + column], x=x, y=y)
    return None


def _third(center: float, half: float, length: float, cuts: tuple[float, ...]) -> int:
    """Return the third of an axis that holds an object; -1 if it leaves the image or is on a border."""
    if center - half < 1 or center + half > length - 1:
        return -1
    if any(abs(center - cut) < half + 0.5 for cut in cuts):
        return -1
    if min(abs(center - length / 3), abs(center - 2 * length / 3)) < 2.5:
        return -1
    return int(3 * center / length)


def render(scene: Scene) -> Image.Image:
    """Return the RGB image of a scene; the same scene gives the same bytes."""
    rng = random.Random(f"paint {scene.seed}")
    image = _background(scene, rng)
    for thing in scene.things:
        _paint(image, thing, scene.canvas.scale, rng)
    noise = np.random.Generator(np.random.PCG64(scene.seed)).integers(
        -7, 8, (image.height, image.width, 3), dtype=np.int16
    )
    pixels = np.asarray(image, dtype=np.int16) + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _background(scene: Scene, rng: random.Random) -> Image.Image:
    """Return a dim, low-frequency texture with thin lines and specks."""
    canvas = scene.canvas
    size = (canvas.width, canvas.height)
    base = rng.randint(24, 84)
    cells = rng.randint(3, 7)
    texture = np.array(
        [base + rng.randint(-22, 22) + rng.randint(-12, 12) for _ in range(cells * cells * 3)], dtype=np.int16
    )
    coarse = np.clip(texture, 0, 255).astype(np.uint8).reshape(cells, cells, 3)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(2, 6)):
        ends = [(rng.uniform(0, size[0]), rng.uniform(0, size[1])) for _ in range(2)]
        draw.line(ends, fill=_dim(rng, base), width=1)
    for _ in range(rng.randint(0, 8)):
        x, y = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        draw.rectangle((x, y, x + rng.uniform(0, 2), y + rng.uniform(0, 2)), fill=_dim(rng, base))
    return image


def _dim(rng: random.Random, base: int) -> tuple[int, int, int]:
    """Return a greyish colour near the background's brightness."""
    red, green, blue = (min(130, max(0, base + rng.randint(-30, 42))) for _ in range(3))
    return red, green, blue


def _paint(image: Image.Image, thing: Thing, scale: float, rng: random.Random) -> None:
    """Paint one object onto the image, antialiased."""
    left, top = (thing.x - thing.half_width) * scale - 2, (thing.y - thing.half_height) * scale - 2
    corner = (math.floor(left), math.floor(top))
    width = math.ceil(2 * thing.half_width * scale) + 5
    height = math.ceil(2 * thing.half_height * scale) + 5
    mask = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE), 0)
    draw = ImageDraw.Draw(mask)
    center = ((thing.x * scale - corner[0]) * SUPERSAMPLE, (thing.y * scale - corner[1]) * SUPERSAMPLE)
    half = (thing.half_width * scale * SUPERSAMPLE, thing.half_height * scale * SUPERSAMPLE)
    if thing.is_digit:
        _draw_digit(draw, thing.name, center, half, rng)
    else:
        _draw_shape(draw, thing.name, center, half[0], rng)
    red, green, blue = (min(255, max(0, c + rng.randint(-14, 14))) for c in COLORS[thing.color])
    image.paste((red, green, blue), corner, mask.reduce(SUPERSAMPLE))


def _draw_shape(
    draw: ImageDraw.ImageDraw, name: str, center: tuple[float, float], radius: float, rng: random.Random
) -> None:
    """Draw a filled shape of the given half extent."""
    x, y = center
    tilt = rng.uniform(-0.14, 0.14)
    if name == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        return
    if name == "cross":
        arm = radius * rng.uniform(0.28, 0.36)
        for across, along in ((arm, radius), (radius, arm)):
            corners = [(-across, -along), (across, -along), (across, along), (-across, along)]
            draw.polygon([_turn(x, y, dx, dy, tilt) for dx, dy in corners], fill=255)
        return
    points = [(math.cos(a) * r * radius, math.sin(a) * r * radius) for a, r in _outline(name)]
    draw.polygon([_turn(x, y, dx, dy, tilt) for dx, dy in points], fill=255)


def _outline(name: str) -> list[tuple[float, float]]:
    """Return the polar outline (angle, radius) of a polygonal shape in the unit circle."""
    if name == "square":
        return [(math.pi / 4 + k * math.pi / 2, 1.25) for k in range(4)]
    if name == "diamond":
        return [(k * math.pi / 2, 1.05 if k % 2 else 0.75) for k in range(4)]
    if name == "triangle":
        return [(-math.pi / 2, 1.05), (math.radians(40), 1.25), (math.radians(140), 1.25)]
    return [(-math.pi / 2 + k * math.pi / 5, 0.42 if k % 2 else 1.1) for k in range(10)]


def _turn(x: float, y: float, dx: float, dy: float, angle: float) -> tuple[float, float]:
    """Return the point (x + dx, y + dy) turned about (x, y)."""
    cosine, sine = math.cos(angle), math.sin(angle)
    return x + cosine * dx - sine * dy, y + sine * dx + cosine * dy


def _ring(x: float, y: float, rx: float, ry: float) -> list[tuple[float, float]]:
    """Return a closed polyline along an ellipse."""
    angles = [2 * math.pi * k / 16 for k in range(17)]
    return [(x + rx * math.sin(a), y - ry * math.cos(a)) for a in angles]


_SIX = [(0.82, 0.02), (0.38, 0.18), (0.08, 0.55), (0.08, 0.8), (0.3, 1.0), (0.7, 1.0), (0.95, 0.8), (0.88, 0.56),
        (0.55, 0.45), (0.12, 0.62)]  # fmt: skip
STROKES: dict[str, list[list[tuple[float, float]]]] = {
    "0": [_ring(0.5, 0.5, 0.48, 0.5)],
    "1": [[(0.2, 0.24), (0.58, 0.0), (0.58, 1.0)]],
    "2": [[(0.04, 0.26), (0.2, 0.06), (0.5, 0.0), (0.82, 0.08), (0.94, 0.28), (0.8, 0.5), (0.04, 1.0), (1.0, 1.0)]],
    "3": [[(0.06, 0.1), (0.45, 0.0), (0.86, 0.1), (0.9, 0.32), (0.45, 0.46), (0.94, 0.64), (0.92, 0.86), (0.5, 1.0),
           (0.04, 0.9)]],
    "4": [[(0.72, 1.0), (0.72, 0.0), (0.0, 0.68), (1.0, 0.68)]],
    "5": [[(0.92, 0.0), (0.14, 0.0), (0.1, 0.46), (0.55, 0.38), (0.94, 0.58), (0.92, 0.84), (0.5, 1.0), (0.04, 0.9)]],
    "6": [_SIX],
    "7": [[(0.0, 0.0), (1.0, 0.0), (0.4, 1.0)]],
    "8": [_ring(0.5, 0.24, 0.4, 0.24), _ring(0.5, 0.74, 0.48, 0.26)],
    "9": [[(1 - x, 1 - y) for x, y in _SIX]],
}  # fmt: skip


def _draw_digit(
    draw: ImageDraw.ImageDraw,
    name: str,
    center: tuple[float, float],
    half: tuple[float, float],
    rng: random.Random,
) -> None:
    """Draw a digit as polyline strokes of varying thickness and slant."""
    thickness = rng.uniform(0.14, 0.2) * 2 * half[1]
    slant = rng.uniform(-0.12, 0.2)
    inner = (half[0] - thickness / 2, half[1] - thickness / 2)
    for stroke in STROKES[name]:
        points = []
        for u, v in stroke:
            u, v = 2 * u - 1 + rng.uniform(-0.05, 0.05), 2 * v - 1 + rng.uniform(-0.03, 0.03)
            points.append((center[0] + inner[0] * (u - slant * v), center[1] + inner[1] * v))
        draw.line(points, fill=255, width=max(1, round(thickness)), joint="curve")
        for x, y in points:
            r = thickness / 2
            draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
