"""Composes backgrounds and objects into a captioned, labelled scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from .backgrounds import LOOKS, PAIRS, horizon, paint
from .captions import Place, Thing, caption
from .classes import CLASSES, COLOURS, OBJECTS, RGB, label
from .objects import DRAW, HEIGHT, STRETCH
from .pen import Pen, mix

Random = np.random.Generator
Box = tuple[int, int, int, int]
_NIGHT: RGB = (40, 44, 92)


@dataclass(frozen=True)
class Placed:
    """An object of a scene: class, colour word, and box (left, top, right, bottom) of its visible pixels."""

    name: str
    colour: str
    box: Box


@dataclass(frozen=True, eq=False)
class Scene:
    """A rendering and everything known about it.

    ``semantic`` is uint8 [height, width]; its value ``i`` stands for ``CLASSES[i]``.
    ``classes`` lists the classes with at least one pixel, backgrounds first.
    """

    image: Image.Image
    caption: str
    semantic: NDArray[np.uint8]
    classes: tuple[str, ...]
    objects: tuple[Placed, ...]
    things: tuple[Thing, ...]
    places: tuple[Place, Place]

    def describe(self, rng: Random) -> str:
        """Return another caption of this scene, in a style that ``rng`` picks."""
        return caption(self.things, *self.places, rng)


@dataclass(frozen=True)
class _Spot:
    """Where an object goes: centre and half height in canvas pixels, and what carries it."""

    x: float
    y: float
    radius: float
    where: str


def _pair(rng: Random, names: list[str]) -> tuple[str, str]:
    """Choose the backgrounds; boats and fish ask for a sea, balloons for a sky."""
    weights = np.ones(len(PAIRS))
    for i, pair in enumerate(PAIRS):
        weights[i] *= 5.0 if "sea" in pair and {"boat", "fish"} & set(names) else 1.0
        weights[i] *= 1.6 if pair[0] == "sky" else 0.8
    return PAIRS[int(rng.choice(len(PAIRS), p=weights / weights.sum()))]


def _spot(rng: Random, name: str, pair: tuple[str, str], level: float, width: int, height: int, radius: float) -> _Spot:
    """Propose a place: ``level`` is the mean row of the horizon."""
    margin = min(radius * 0.75, width * 0.4)
    x = rng.uniform(margin, width - margin)
    flies = {"balloon": 0.8, "bird": 0.6, "fish": 0.15, "umbrella": 0.15}.get(name, 0.0)
    if pair[0] == "sea" and name in ("boat", "fish") and rng.random() < 0.7:
        return _Spot(x, level - rng.uniform(0.0, 0.6) * radius, radius, "sea")
    if pair[0] == "sky" and rng.random() < flies:
        return _Spot(x, rng.uniform(min(radius * 0.8, level), max(radius, level - radius * 0.4)), radius, "air")
    foot = rng.uniform(max(level + 0.1 * height, radius * 1.2), 0.98 * height)
    return _Spot(x, foot - radius * 0.95, radius, pair[1])


def _free(spot: _Spot, taken: list[_Spot]) -> bool:
    """True where ``spot`` covers little of what is already placed (a partial overlap is welcome)."""
    return all(
        max(abs(spot.x - other.x), abs(spot.y - other.y)) > 0.72 * (spot.radius + other.radius) for other in taken
    )


def _place(
    rng: Random, names: list[str], pair: tuple[str, str], level: float, size: tuple[int, int], zoom: float
) -> list[tuple[str, _Spot]]:
    """Find a spot for each of ``names``; one that fits nowhere is left out. Far objects come first."""
    width, height = size
    base = min(width, height) * zoom * (0.235, 0.2, 0.17)[len(names) - 1]
    placed: list[tuple[str, _Spot]] = []
    for name in names:
        for _ in range(12):
            radius = base * HEIGHT[name] * rng.uniform(0.75, 1.25)
            spot = _spot(rng, name, pair, level, width, height, radius)
            if _free(spot, [other for _, other in placed]):
                placed.append((name, spot))
                break
    return sorted(placed, key=lambda item: item[1].y + item[1].radius)


def _shadow(canvas: Image.Image, spot: _Spot, light: float) -> None:
    """Darken the ground under an object with a soft ellipse."""
    rx, ry = int(spot.radius * 1.25) + 2, int(spot.radius * 0.3) + 2
    axis_x, axis_y = np.linspace(-1, 1, 2 * rx), np.linspace(-1, 1, 2 * ry)
    alpha = np.clip(1 - np.hypot(axis_x[None, :], axis_y[:, None]), 0, 1) * 150
    left, top = int(spot.x + light * spot.radius * 0.15) - rx, int(spot.y + spot.radius * 0.93) - ry
    canvas.paste((30, 28, 48), (left, top), Image.fromarray(alpha.astype(np.uint8)))


def _object(
    canvas: Image.Image,
    labels: Image.Image,
    name: str,
    colour: str,
    spot: _Spot,
    rng: Random,
    light: float,
    night: bool,
) -> None:
    """Draw one object with its shadow on ``canvas`` and its number on ``labels``, both in place."""
    tint = COLOURS[colour]
    tint = mix(tint, (int(rng.integers(256)), int(rng.integers(256)), int(rng.integers(256))), 0.08)
    tilt = 0.06 if name in ("house", "tree") else {"air": 0.3, "sea": 0.2}.get(spot.where, 0.06)
    stretch = STRETCH.get(name, 1.0) * rng.uniform(0.88, 1.14)
    pen = Pen(spot.radius, stretch, rng.uniform(-tilt, tilt), bool(rng.random() < 0.5))
    DRAW[name](pen, tint, rng)
    patch, mask = pen.finish(light, rng.uniform(0.7, 1.1))
    if night:
        patch = Image.blend(patch, Image.new("RGB", patch.size, _NIGHT), 0.25)
    if spot.where != "air":
        _shadow(canvas, spot, light)
    corner = (int(spot.x) - pen.half, int(spot.y) - pen.half)
    # Half a pixel of blur hides the stairs of the supersampled edge where LANCZOS would ring.
    canvas.paste(patch, corner, mask.filter(ImageFilter.BoxBlur(0.5)))
    labels.paste(label(name), corner, mask)


def _ground(
    rng: Random, pair: tuple[str, str], looks: tuple[str, str], size: tuple[int, int]
) -> tuple[Image.Image, Image.Image, float]:
    """Return the empty scene, its label image and the mean row of the horizon."""
    width, height = size
    line = horizon(rng, *pair, width, height)
    level = float(line.mean())
    below = np.arange(height, dtype=np.float32)[:, None] >= line[None, :]
    top, bottom = int(line.max()) + 1, max(0, int(line.min()))
    canvas = Image.new("RGB", size)
    canvas.paste(paint(pair[0], looks[0], rng, width, top), (0, 0))
    mask = Image.fromarray((below * 255).astype(np.uint8))
    near = Image.new("RGB", size)
    near.paste(paint(pair[1], looks[1], rng, width, height - bottom), (0, bottom))
    canvas.paste(near, (0, 0), mask)
    labels = np.where(below, label(pair[1]), label(pair[0])).astype(np.uint8)
    return canvas, Image.fromarray(labels), level


def _visible(semantic: NDArray[np.uint8], drawn: list[tuple[str, str]]) -> tuple[Placed, ...]:
    """Return the drawn (class, colour) pairs that can be seen, with their boxes."""
    found = []
    for name, colour in drawn:
        ys, xs = np.nonzero(semantic == label(name))
        if len(xs):
            found.append(Placed(name, colour, (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)))
    return tuple(found)


def _size_word(placed: Placed, size: tuple[int, int]) -> str:
    """Return "small", "large" or nothing, from the share of the frame that the box takes."""
    left, top, right, bottom = placed.box
    share = (right - left) * (bottom - top) / (size[0] * size[1])
    return "small" if share < 0.05 else "large" if share > 0.16 else ""


def render(
    seed: int, size: tuple[int, int] | int = 128, *, max_objects: int = 3, zoom: float = 1.0, supersample: int = 2
) -> Scene:
    """Draw the scene of ``seed``; the same arguments give the same bytes.

    ``size`` is (width, height) in pixels, or one number for a square. ``max_objects`` (1..3) bounds the
    objects, ``zoom`` enlarges them, ``supersample`` is how many times larger the scene is drawn.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    out = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    big = (out[0] * supersample, out[1] * supersample)
    count = int(rng.integers(1, max_objects + 1))
    names = [OBJECTS[i] for i in rng.permutation(len(OBJECTS))[:count]]
    pair = _pair(rng, names)
    looks = tuple(LOOKS[name][int(rng.integers(len(LOOKS[name])))][0] for name in pair)
    light = -1.0 if rng.random() < 0.5 else 1.0
    canvas, labels, level = _ground(rng, pair, (looks[0], looks[1]), big)
    drawn = []
    for name, spot in _place(rng, names, pair, level, big, zoom):
        colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
        _object(canvas, labels, name, colour, spot, rng, light, "night" in looks)
        drawn.append((name, colour))
    semantic = np.asarray(labels)[supersample // 2 :: supersample, supersample // 2 :: supersample].copy()
    objects = _visible(semantic, drawn)
    things = tuple(Thing(o.name, o.colour, _size_word(o, out)) for o in objects)
    places = (Place(pair[0], looks[0]), Place(pair[1], looks[1]))
    present = tuple(CLASSES[i] for i in np.unique(semantic))
    image = canvas.resize(out, Image.Resampling.LANCZOS)
    return Scene(image, caption(things, *places, rng), semantic, present, objects, things, places)
