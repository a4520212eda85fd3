"""A pen that draws in an object's own unit square and keeps its parts and keypoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from .classes import RGB

Points = Sequence[tuple[float, float]]


def mix(a: RGB, b: RGB, t: float) -> RGB:
    """Return the colour a fraction ``t`` (0..1) of the way from ``a`` to ``b``."""
    return (round(a[0] + (b[0] - a[0]) * t), round(a[1] + (b[1] - a[1]) * t), round(a[2] + (b[2] - a[2]) * t))


def lighter(colour: RGB, t: float = 0.4) -> RGB:
    """Return ``colour`` moved a fraction ``t`` towards white."""
    return mix(colour, (255, 255, 255), t)


def darker(colour: RGB, t: float = 0.35) -> RGB:
    """Return ``colour`` moved a fraction ``t`` towards a bluish black."""
    return mix(colour, (24, 20, 40), t)


# A scene draws hundreds of curves of few kinds: what they share is computed once.
@cache
def _neighbours(count: int) -> tuple[NDArray[np.int64], ...]:
    """Indices of the point before each of ``count`` points of a ring, of the next, and of the one after that."""
    return tuple((np.arange(count) + step) % count for step in (-1, 1, 2))


@cache
def _powers(count: int) -> tuple[NDArray[np.float64], ...]:
    """t, t^2 and t^3 for ``count`` steps from 0 to before 1: each [1, count, 1]."""
    t = (np.arange(count) / count)[None, :, None]
    return t, t**2, t**3


@cache
def _arc(start: float, end: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cosine and sine of 28 angles between two, in degrees."""
    t = np.radians(np.linspace(start, end, 28))
    return np.cos(t), np.sin(t)


def smooth(points: Points, per_side: int = 6) -> NDArray[np.float64]:
    """Return a closed Catmull-Rom curve through ``points``: [len(points) * per_side, 2]."""
    p1 = np.asarray(points, dtype=np.float64)[:, None, :]
    p0, p2, p3 = (p1[around] for around in _neighbours(len(p1)))
    t, t2, t3 = _powers(per_side)
    curve = 2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t2 + (3 * p1 - p0 - 3 * p2 + p3) * t3
    return np.asarray(curve.reshape(-1, 2) / 2)


class Finished(NamedTuple):
    """A shaded object, cut out of its patch: its picture, its mask (255 inside), its parts, and where in the patch the
    left upper corner of these lies."""

    image: Image.Image
    mask: Image.Image
    labels: Image.Image
    corner: tuple[int, int]


class Pen:
    """Draws parts of one object on a square patch.

    The object lives in [-1, 1] x [-1, 1] with y pointing down and its foot at y = 1.
    ``radius`` is half its height in canvas pixels, ``stretch`` its width over its height. ``parts`` has the number of
    each part, 1 to 255; ``labels`` then holds the part that is seen at each pixel, and 0 outside the object.
    ``points`` holds the keypoints in patch pixels.
    """

    def __init__(
        self,
        radius: float,
        stretch: float = 1.0,
        angle: float = 0.0,
        flip: bool = False,
        parts: Mapping[str, int] | None = None,
    ) -> None:
        self.radius = radius
        self.numbers = parts or {}
        self.number = 255
        self.points: dict[str, tuple[float, float]] = {}
        self.half = int(radius * 1.5) + 3
        side = 2 * self.half
        self.rgb = Image.new("RGB", (side, side), (128, 128, 128))
        self.labels = Image.new("L", (side, side), 0)
        self._rgb = ImageDraw.Draw(self.rgb)
        self._labels = ImageDraw.Draw(self.labels)
        c, s = np.cos(angle) * radius, np.sin(angle) * radius
        sx = -stretch if flip else stretch
        self._matrix = np.array([[c * sx, s * sx], [-s, c]])

    def _pixels(self, points: Points | NDArray[np.float64]) -> list[float]:
        """Map [N, 2] unit coordinates to a flat list of patch pixels."""
        flat: list[float] = (np.asarray(points, dtype=np.float64) @ self._matrix + self.half).ravel().tolist()
        return flat

    def part(self, name: str) -> None:
        """Say what is drawn from here on."""
        self.number = self.numbers.get(name, 255)

    def point(self, name: str, x: float, y: float) -> None:
        """Note a keypoint."""
        u, v = self._pixels([(x, y)])
        self.points[name] = (u, v)

    def poly(self, points: Points | NDArray[np.float64], colour: RGB) -> None:
        """Fill a polygon."""
        flat = self._pixels(points)
        self._rgb.polygon(flat, fill=colour)
        self._labels.polygon(flat, fill=self.number)

    def blob(self, points: Points, colour: RGB) -> None:
        """Fill the smooth closed curve through ``points``."""
        self.poly(smooth(points), colour)

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, colour: RGB, start: float = 0.0, end: float = 360.0
    ) -> None:
        """Fill an ellipse, or its segment between two angles in degrees (0 right, 90 down)."""
        cos, sin = _arc(start, end)
        outline = np.empty((len(cos), 2))
        outline[:, 0], outline[:, 1] = x + rx * cos, y + ry * sin
        self.poly(outline, colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: RGB) -> None:
        """Fill a rectangle given by two corners."""
        self.poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def line(self, points: Points, width: float, colour: RGB) -> None:
        """Draw a polyline ``width`` units wide."""
        flat, pixels = self._pixels(points), max(1, round(width * self.radius))
        self._rgb.line(flat, fill=colour, width=pixels, joint="curve")
        self._labels.line(flat, fill=self.number, width=pixels, joint="curve")

    def eye(self, x: float, y: float, r: float, white: bool = True) -> None:
        """Draw a round eye with a glint."""
        if white:
            self.ellipse(x, y, r * 1.45, r * 1.45, (250, 250, 245))
        self.ellipse(x, y, r, r, (28, 24, 34))
        self.ellipse(x - r * 0.3, y - r * 0.35, r * 0.38, r * 0.38, (255, 255, 255))

    def finish(self, light: float, depth: float) -> Finished:
        """Shade the object.

        The blurred silhouette serves as a height map: its slope against the light (which comes from
        the left for ``light`` -1 and from the right for +1) gives the rim its highlight and its shade.
        """
        blur, step = max(1.0, self.radius * 0.11), max(1, int(self.radius * 0.07))
        box = self._around(int(blur) + 1 + step)
        labels = self.labels.crop(box)
        mask = labels.point([0] + [255] * 255)
        height = np.asarray(mask.filter(ImageFilter.BoxBlur(blur)), dtype=np.float32) / 255
        slope = np.roll(height, (-step, round(step * light)), (0, 1)) - np.roll(
            height, (step, round(-step * light)), (0, 1)
        )
        fall = np.linspace(0.1, -0.16, 2 * self.half, dtype=np.float32)[box[1] : box[3], None]
        shade = 1 + depth * (0.55 * slope + fall) - 0.22 * (1 - height)
        lit = np.clip(np.asarray(self.rgb.crop(box)) * np.dstack([shade] * 3), 0, 255)
        return Finished(Image.fromarray(lit.astype(np.uint8)), mask, labels, box[:2])

    def _around(self, margin: int) -> tuple[int, int, int, int]:
        """What was drawn and ``margin`` pixels around it, as far as the patch goes: left, top, right, bottom."""
        side = 2 * self.half
        left, top, right, bottom = self.labels.getbbox() or (0, 0, side, side)
        return max(0, left - margin), max(0, top - margin), min(side, right + margin), min(side, bottom + margin)
