"""Other shapes of some classes, which only held-out scenes have. Parts and keypoints are those of ``objects``."""

from __future__ import annotations

from typing import Final

import numpy as np

from .classes import RGB
from .objects import GLASS, WOOD, Draw, Random, wheel, window
from .pen import Pen, darker, lighter


def van(pen: Pen, colour: RGB, rng: Random) -> None:
    """A tall box on wheels with a short nose."""
    roof = rng.uniform(-0.75, -0.6)
    pen.part("body")
    pen.blob([(-0.98, roof + 0.1), (-0.9, roof), (0.45, roof), (0.95, 0.1), (1.0, 0.6), (-0.98, 0.62)], colour)
    pen.part("window")
    pen.poly([(0.3, roof + 0.14), (0.45, roof + 0.14), (0.78, 0.0), (0.3, 0.0)], GLASS)
    for x in (-0.8, -0.3):
        pen.box(x, roof + 0.16, x + 0.4, -0.1, GLASS)
    pen.part("body")
    pen.box(-0.95, 0.12, 0.9, 0.2, lighter(colour, 0.6))
    pen.line([(0.22, roof + 0.1), (0.22, 0.56)], 0.03, darker(colour))
    pen.part("lamp")
    pen.ellipse(0.92, 0.34, 0.07, 0.1, (255, 244, 190))
    pen.ellipse(-0.93, 0.3, 0.05, 0.1, (200, 40, 40))
    pen.part("wheel")
    for x in (-0.6, 0.55):
        wheel(pen, x, 0.74, 0.25)
    pen.point("front wheel", 0.55, 0.74)
    pen.point("rear wheel", -0.6, 0.74)
    pen.point("front lamp", 0.92, 0.34)
    pen.point("rear lamp", -0.93, 0.3)
    pen.point("roof", -0.2, roof + 0.06)


def tower(pen: Pen, colour: RGB, rng: Random) -> None:
    """A narrow house of several floors under a pointed roof."""
    pen.part("chimney")
    pen.box(0.26, -0.8, 0.4, -0.3, (150, 96, 82))
    pen.part("wall")
    pen.box(-0.5, -0.36, 0.5, 1.0, colour)
    pen.box(-0.5, 0.9, 0.5, 1.0, darker(colour, 0.4))
    pen.part("roof")
    pen.poly([(-0.64, -0.3), (0.0, -1.0), (0.64, -0.3)], (112, 78, 60))
    pen.part("door")
    pen.box(-0.14, 0.5, 0.14, 1.0, WOOD)
    pen.part("window")
    for x in (-0.26, 0.26):
        for y in (-0.1, 0.28):
            window(pen, x, y, 0.11)
    pen.point("door knob", 0.08, 0.76)
    pen.point("chimney top", 0.33, -0.74)
    pen.point("window by the chimney", 0.26, -0.1)
    pen.point("other window", -0.26, -0.1)
    pen.point("roof end by the chimney", 0.54, -0.33)
    pen.point("other roof end", -0.54, -0.33)


def palm(pen: Pen, colour: RGB, rng: Random) -> None:
    """A bent trunk under long leaves."""
    bend = rng.uniform(-0.2, 0.2)
    pen.part("trunk")
    pen.line([(0.0, 1.0), (bend * 0.4, 0.4), (bend, -0.4)], 0.16, WOOD)
    for y in (0.7, 0.4, 0.1):
        pen.line([(-0.07 + bend * (0.7 - y) * 0.6, y), (0.07 + bend * (0.7 - y) * 0.6, y)], 0.03, darker(WOOD))
    pen.part("crown")
    for i, angle in enumerate(np.radians((-160, -120, -90, -60, -20, 15, 165)).tolist()):
        x, y = float(np.cos(angle)), float(np.sin(angle))
        tip = (bend + 0.85 * x, -0.4 + 0.5 * y + 0.2)
        middle = (bend + 0.5 * x, -0.5 + 0.55 * y)
        leaf = [(bend, -0.34), (middle[0] - 0.08, middle[1] - 0.1), tip, (middle[0] + 0.08, middle[1] + 0.14)]
        pen.blob(leaf, darker(colour, 0.2) if i % 2 else colour)
    pen.ellipse(bend, -0.4, 0.16, 0.14, colour)
    pen.point("foot", 0.0, 0.9)
    pen.point("top", bend, -0.8)
    pen.point("middle of the crown", bend, -0.4)


def steamer(pen: Pen, colour: RGB, rng: Random) -> None:
    """A ship with a cabin, a funnel for a mast and a flag, and no sail but an awning."""
    pen.part("mast")
    pen.box(-0.1, -0.75, 0.16, 0.1, (60, 60, 70))
    pen.box(-0.1, -0.6, 0.16, -0.45, (214, 60, 50))
    pen.line([(0.0, -1.0), (0.0, -0.7)], 0.07, WOOD)
    pen.part("sail")
    pen.poly([(-0.75, 0.1), (-0.65, -0.2), (0.55, -0.2), (0.6, 0.1)], (250, 244, 226))
    pen.box(-0.6, 0.05, 0.5, 0.45, (236, 236, 230))
    pen.part("flag")
    pen.poly([(0.03, -1.0), (0.3, -0.93), (0.03, -0.84)], colour)
    pen.part("hull")
    pen.blob([(-0.98, 0.4), (0.6, 0.4), (1.0, 0.3), (0.75, 0.9), (0.6, 0.98), (-0.7, 0.98), (-0.9, 0.8)], colour)
    pen.poly([(-0.8, 0.82), (0.76, 0.82), (0.62, 0.96), (-0.68, 0.96)], darker(colour, 0.4))
    for x in (-0.5, -0.1, 0.3):
        pen.ellipse(x, 0.6, 0.08, 0.08, lighter(GLASS, 0.3))
    pen.point("bow", 0.86, 0.45)
    pen.point("stern", -0.9, 0.5)
    pen.point("mast top", 0.0, -0.96)
    pen.point("corner of the sail", -0.68, 0.06)
    pen.point("keel", 0.0, 0.9)


def teacup(pen: Pen, colour: RGB, rng: Random) -> None:
    """A wide, round cup on a foot."""
    pen.part("handle")
    pen.line([(0.7, -0.3), (0.98, -0.2), (0.98, 0.1), (0.6, 0.35)], 0.12, darker(colour, 0.12))
    pen.part("wall")
    pen.ellipse(0, 0.92, 0.4, 0.08, darker(colour, 0.3))
    pen.blob([(-0.86, -0.42), (0.86, -0.42), (0.66, 0.4), (0.28, 0.9), (-0.28, 0.9), (-0.66, 0.4)], colour)
    pen.ellipse(-0.1, 0.15, 0.18, 0.2, lighter(colour, 0.6))
    pen.part("rim")
    pen.ellipse(0, -0.42, 0.86, 0.2, lighter(colour, 0.35))
    pen.part("drink")
    pen.ellipse(0, -0.4, 0.72, 0.14, (176, 104, 40))
    pen.point("handle", 0.97, -0.05)
    pen.point("rim by the handle", 0.8, -0.42)
    pen.point("other end of the rim", -0.8, -0.42)
    pen.point("drink", 0.0, -0.4)
    pen.point("foot", 0.0, 0.84)


HELD_OUT_DRAW: Final[dict[str, Draw]] = {
    "car": van, "house": tower, "tree": palm, "boat": steamer, "cup": teacup,
}  # fmt: skip
