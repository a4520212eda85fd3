"""Composes backgrounds and objects into a captioned, labelled scene."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from .backgrounds import LOOKS, PAIRS, horizon, paint
from .captions import Place, Thing, caption
from .classes import (
    CLASSES,
    COLOURS,
    HELD_OUT_PAIRS,
    HELD_OUT_SEED,
    HELD_OUT_STYLES,
    OBJECTS,
    ORDINARY_STYLES,
    RGB,
    STYLES,
    label,
)
from .objects import DRAW, HEIGHT, PARTS, STRETCH
from .pen import Pen, mix
from .styles import STYLE
from .variants import HELD_OUT_DRAW

Random = np.random.Generator
Box = tuple[int, int, int, int]
_NIGHT: RGB = (40, 44, 92)
#: How often a scene has one, two, ... objects, and the half height of one as a share of the frame.
_COUNTS = (0.3, 0.3, 0.24, 0.1, 0.06)
_SCALES = (0.235, 0.2, 0.17, 0.155, 0.14)


_APART = [set(pair) for pair in HELD_OUT_PAIRS]
_PART_NUMBERS: dict[str, dict[str, int]] = {
    name: {part: i for i, (owner, part) in enumerate(PARTS, start=1) if owner == name} for name in OBJECTS
}


@dataclass(frozen=True)
class Keypoint:
    """A named place of an object, in pixels from the left and the top of the image, which may lie outside or hidden."""

    x: float
    y: float
    visible: bool


@dataclass(frozen=True)
class Placed:
    """An object of a scene.

    ``box`` is (left, top, right, bottom) of its visible pixels, ``instance`` its number in ``Scene.instances``: the
    higher, the nearer.
    """

    name: str
    colour: str
    box: Box
    instance: int
    keypoints: Mapping[str, Keypoint]


@dataclass(frozen=True, eq=False)
class Scene:
    """A rendering and everything known about it.

    ``semantic``, ``instances`` and ``parts`` are uint8 [height, width]. The value ``i`` of ``semantic`` stands for
    ``CLASSES[i]``. ``instances`` counts the objects from the farthest, 1, to the nearest; 0 is background. The value
    ``i`` of ``parts`` stands for ``PARTS[i - 1]``, a (class, part) pair; 0 is background.
    ``classes`` lists the classes with at least one pixel, backgrounds first; ``objects`` goes from far to near.
    """

    image: Image.Image
    caption: str
    semantic: NDArray[np.uint8]
    instances: NDArray[np.uint8]
    parts: NDArray[np.uint8]
    classes: tuple[str, ...]
    objects: tuple[Placed, ...]
    things: tuple[Thing, ...]
    places: tuple[Place, Place]
    style: str

    def describe(self, rng: Random) -> str:
        """Return another caption of this scene, in a style that ``rng`` picks."""
        return caption(self.things, *self.places, rng, self.style)


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
    base = min(width, height) * zoom * _SCALES[len(names) - 1]
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
    left, top = int(spot.x + light * spot.radius * 0.15) - rx, int(spot.y + spot.radius * 0.93) - ry
    canvas.paste((30, 28, 48), (left, top), _ellipse(rx, ry))


@lru_cache(maxsize=512)  # radii are whole pixels: few sizes come again and again
def _ellipse(rx: int, ry: int) -> Image.Image:
    """How dark the ground is, 2 rx x 2 ry pixels."""
    axis_x, axis_y = np.linspace(-1, 1, 2 * rx), np.linspace(-1, 1, 2 * ry)
    alpha = np.clip(1 - np.hypot(axis_x[None, :], axis_y[:, None]), 0, 1) * 150
    return Image.fromarray(alpha.astype(np.uint8))


@dataclass(frozen=True)
class _Canvas:
    """A scene while it is drawn, at the supersampled size."""

    image: Image.Image
    instances: Image.Image
    parts: Image.Image


@dataclass(frozen=True)
class _Drawn:
    """An object on the canvas; its keypoints in canvas pixels."""

    name: str
    colour: str
    points: Mapping[str, tuple[float, float]]


def _object(
    canvas: _Canvas,
    number: int,
    name: str,
    colour: str,
    spot: _Spot,
    rng: Random,
    light: float,
    night: bool,
    held_out: bool,
) -> _Drawn:
    """Draw object ``number`` with its shadow on ``canvas`` in place."""
    tint = COLOURS[colour]
    tint = mix(tint, (int(rng.integers(256)), int(rng.integers(256)), int(rng.integers(256))), 0.08)
    tilt = 0.06 if name in ("house", "tree") else {"air": 0.3, "sea": 0.2}.get(spot.where, 0.06)
    stretch = STRETCH.get(name, 1.0) * rng.uniform(0.88, 1.14)
    pen = Pen(spot.radius, stretch, rng.uniform(-tilt, tilt), bool(rng.random() < 0.5), _PART_NUMBERS[name])
    (HELD_OUT_DRAW.get(name, DRAW[name]) if held_out else DRAW[name])(pen, tint, rng)
    patch, mask, labels, (left, top) = pen.finish(light, rng.uniform(0.7, 1.1))
    if night:
        patch = Image.blend(patch, Image.new("RGB", patch.size, _NIGHT), 0.25)
    if spot.where != "air":
        _shadow(canvas.image, spot, light)
    corner = (int(spot.x) - pen.half, int(spot.y) - pen.half)
    place = (corner[0] + left, corner[1] + top)
    # Half a pixel of blur hides the stairs of the supersampled edge where LANCZOS would ring.
    canvas.image.paste(patch, place, mask.filter(ImageFilter.BoxBlur(0.5)))
    canvas.instances.paste(number, place, mask)
    canvas.parts.paste(labels, place, mask)
    return _Drawn(name, colour, {key: (x + corner[0], y + corner[1]) for key, (x, y) in pen.points.items()})


def _ground(
    rng: Random, pair: tuple[str, str], looks: tuple[str, str], size: tuple[int, int]
) -> tuple[Image.Image, NDArray[np.bool_], float]:
    """Return the empty scene, where it lies below the horizon (bool [height, width]) and the horizon's mean row."""
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
    return canvas, below, level


def _visible(instances: NDArray[np.uint8], drawn: list[_Drawn], supersample: int) -> tuple[Placed, ...]:
    """Return the objects of which something can be seen."""
    found = []
    for number, thing in enumerate(drawn, start=1):
        inside = instances == number
        xs, ys = inside.any(axis=0).nonzero()[0], inside.any(axis=1).nonzero()[0]
        if len(xs):
            box = (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1)
            points = {k: _keypoint(x / supersample, y / supersample, instances, number)
                      for k, (x, y) in thing.points.items()}  # fmt: skip
            found.append(Placed(thing.name, thing.colour, box, number, points))
    return tuple(found)


def _keypoint(x: float, y: float, instances: NDArray[np.uint8], number: int) -> Keypoint:
    height, width = instances.shape
    inside = 0 <= x < width and 0 <= y < height
    return Keypoint(x, y, bool(inside and instances[int(y), int(x)] == number))


def _size_word(placed: Placed, size: tuple[int, int]) -> str:
    """Return "small", "large" or nothing, from the share of the frame that the box takes."""
    left, top, right, bottom = placed.box
    share = (right - left) * (bottom - top) / (size[0] * size[1])
    return "small" if share < 0.05 else "large" if share > 0.16 else ""


def _names(rng: Random, count: int, held_out: bool) -> list[str]:
    """Choose classes: held-out scenes have one of the pairs that ordinary scenes never have."""
    if held_out:
        first = list(HELD_OUT_PAIRS[int(rng.integers(len(HELD_OUT_PAIRS)))])
        others = [name for name in OBJECTS if name not in first]
        return [*first, *(others[i] for i in rng.permutation(len(others))[: max(0, count - 2)])]
    names: list[str] = []
    for i in rng.permutation(len(OBJECTS)).tolist():
        if len(names) < count and not any({OBJECTS[i], name} in _APART for name in names):
            names.append(OBJECTS[i])
    return names


def render(
    seed: int,
    size: tuple[int, int] | int = 128,
    *,
    style: str | None = None,
    held_out: bool | None = None,
    max_objects: int = 5,
    zoom: float = 1.0,
    supersample: int = 2,
) -> Scene:
    """Draw the scene of ``seed``; the same arguments give the same bytes.

    Args:
        seed: any integer from 0 on.
        size: (width, height) in pixels, or one number for a square.
        style: one of ``STYLES``; by default the scene's own.
        held_out: whether the scene has what no training sees: a pair of ``HELD_OUT_PAIRS``, one of
            ``HELD_OUT_STYLES``, and other shapes of some classes. By default, seeds from ``HELD_OUT_SEED`` on have.
        max_objects: 1 to 5 (at least 2 if held out); a scene has up to that many.
        zoom: enlarges the objects.
        supersample: how many times larger the scene is drawn.

    Raises:
        ValueError: an argument outside these.
    """
    held_out = seed >= HELD_OUT_SEED if held_out is None else held_out
    if not (1 + held_out) <= max_objects <= len(_COUNTS):
        raise ValueError(f"max_objects is {max_objects}; {1 + held_out} to {len(_COUNTS)} can be drawn")
    if style is not None and style not in STYLES:
        raise ValueError(f"there is no style {style!r}; there are {', '.join(STYLES)}")
    # A stream for each concern: a change in one leaves what the others draw.
    layout, ground, objects, words, finish = (
        np.random.Generator(np.random.PCG64(s)) for s in np.random.SeedSequence(seed).spawn(5)
    )
    out = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    big = (out[0] * supersample, out[1] * supersample)
    shares = np.array(_COUNTS[:max_objects])
    count = int(layout.choice(max_objects, p=shares / shares.sum())) + 1
    names = _names(layout, count, held_out)
    pair = _pair(layout, names)
    looks = tuple(LOOKS[name][int(layout.integers(len(LOOKS[name])))][0] for name in pair)
    light = -1.0 if layout.random() < 0.5 else 1.0
    own = _style(finish, held_out)
    style = own if style is None else style
    image, below, level = _ground(ground, pair, (looks[0], looks[1]), big)
    canvas = _Canvas(image, Image.new("L", big), Image.new("L", big))
    drawn: list[_Drawn] = []
    for name, spot in _place(layout, names, pair, level, big, zoom):
        colour = list(COLOURS)[int(objects.integers(len(COLOURS)))]
        drawn.append(_object(canvas, len(drawn) + 1, name, colour, spot, objects, light, "night" in looks, held_out))
    below, instances, parts = (
        np.asarray(layer)[supersample // 2 :: supersample, supersample // 2 :: supersample].copy()
        for layer in (below, canvas.instances, canvas.parts)
    )
    numbers = np.array([0, *(label(thing.name) for thing in drawn)], np.uint8)
    grounds = np.array([label(name) for name in pair], np.uint8)
    semantic = np.where(instances > 0, numbers.take(instances), grounds.take(below))
    visible = _visible(instances, drawn, supersample)
    things = tuple(Thing(o.name, o.colour, _size_word(o, out)) for o in visible)
    places = (Place(pair[0], looks[0]), Place(pair[1], looks[1]))
    present = tuple(CLASSES[i] for i in np.bincount(semantic.ravel()).nonzero()[0])
    image = STYLE[style](image.resize(out, Image.Resampling.LANCZOS), finish)
    text = caption(things, *places, words, style)
    return Scene(image, text, semantic, instances, parts, present, visible, things, places, style)


def _style(rng: Random, held_out: bool) -> str:
    names, shares = (HELD_OUT_STYLES, None) if held_out else (tuple(ORDINARY_STYLES), tuple(ORDINARY_STYLES.values()))
    return names[int(rng.choice(len(names), p=shares))]
