"""How each of the twelve objects is drawn, in its own unit square, with its parts and keypoints.

A symmetric object may be drawn mirrored, so its keypoints are named by what tells its sides apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from .classes import RGB
from .pen import Pen, darker, lighter, mix

Random = np.random.Generator
GLASS: Final[RGB] = (176, 216, 236)
WOOD: Final[RGB] = (122, 82, 50)
INK: Final[RGB] = (40, 36, 48)


def wheel(pen: Pen, x: float, y: float, r: float) -> None:
    """A tyre with a hub."""
    pen.ellipse(x, y, r, r, (44, 44, 52))
    pen.ellipse(x, y, r * 0.52, r * 0.52, (190, 194, 202))
    pen.ellipse(x, y, r * 0.2, r * 0.2, (90, 94, 102))


def car(pen: Pen, colour: RGB, rng: Random) -> None:
    """A side view: cabin, body, two wheels, lamps."""
    roof, back, nose = rng.uniform(-0.62, -0.42), rng.uniform(-0.75, -0.5), rng.uniform(0.25, 0.45)
    pen.part("body")
    pen.blob([(back, 0.05), (back + 0.18, roof), (nose - 0.3, roof), (nose + 0.15, 0.05)], colour)
    pen.blob([(-0.98, 0.1), (-0.9, -0.02), (0.2, -0.06), (0.85, 0.05), (1.0, 0.3), (0.95, 0.62), (-0.95, 0.62)], colour)
    top = roof + 0.12
    middle = (back + nose) / 2
    pen.part("window")
    pen.poly([(back + 0.1, 0.0), (back + 0.24, top), (middle - 0.06, top), (middle - 0.06, 0.0)], GLASS)
    pen.poly([(middle + 0.04, 0.0), (middle + 0.04, top), (nose - 0.3, top), (nose + 0.03, 0.0)], GLASS)
    pen.poly([(middle + 0.04, 0.0), (middle + 0.04, top), (middle + 0.16, top)], lighter(GLASS, 0.6))
    pen.part("body")
    pen.line([(middle, 0.05), (middle, 0.52)], 0.035, darker(colour))
    pen.box(-0.9, 0.46, 0.93, 0.54, darker(colour, 0.3))
    pen.box(middle - 0.26, 0.16, middle - 0.1, 0.21, darker(colour, 0.5))
    pen.part("lamp")
    pen.ellipse(0.9, 0.24, 0.08, 0.1, (255, 244, 190))
    pen.ellipse(-0.93, 0.22, 0.06, 0.09, (200, 40, 40))
    pen.part("wheel")
    for x in (-0.56, 0.56):
        pen.ellipse(x, 0.62, 0.31, 0.31, darker(colour, 0.55))
        wheel(pen, x, 0.72, 0.27)
    pen.point("front wheel", 0.56, 0.72)
    pen.point("rear wheel", -0.56, 0.72)
    pen.point("front lamp", 0.9, 0.24)
    pen.point("rear lamp", -0.92, 0.22)
    pen.point("roof", middle - 0.06, roof + 0.06)


def window(pen: Pen, x: float, y: float, r: float) -> None:
    """A square window with a cross of bars."""
    pen.box(x - r * 1.25, y - r * 1.25, x + r * 1.25, y + r * 1.25, (250, 246, 236))
    pen.box(x - r, y - r, x + r, y + r, (120, 172, 206))
    pen.poly([(x - r, y - r), (x + r * 0.4, y - r), (x - r, y + r * 0.4)], (190, 224, 240))
    pen.line([(x, y - r), (x, y + r)], 0.035, (250, 246, 236))
    pen.line([(x - r, y), (x + r, y)], 0.035, (250, 246, 236))


def house(pen: Pen, colour: RGB, rng: Random) -> None:
    """Coloured walls under a brown or slate roof, a door, windows, a chimney."""
    roof: RGB = [(136, 70, 54), (88, 92, 108), (112, 78, 60)][int(rng.integers(3))]
    eave, door = rng.uniform(-0.3, -0.1), rng.uniform(-0.1, 0.1)
    pen.part("chimney")
    pen.box(0.4, -0.95, 0.62, -0.3, (150, 96, 82))
    pen.box(0.36, -1.0, 0.66, -0.9, (116, 72, 62))
    pen.part("wall")
    pen.box(-0.82, eave, 0.82, 1.0, colour)
    pen.box(-0.82, 0.88, 0.82, 1.0, darker(colour, 0.4))
    pen.part("roof")
    pen.poly([(-1.02, eave + 0.06), (-0.3, -0.98), (0.3, -0.98), (1.02, eave + 0.06)], roof)
    pen.poly([(-1.02, eave + 0.06), (1.02, eave + 0.06), (0.98, eave - 0.02), (-0.98, eave - 0.02)], darker(roof, 0.35))
    for row in (0.33, 0.66):
        y = -0.98 + (eave + 1.04) * row
        half = 0.3 + 0.72 * row
        pen.line([(-half, y), (half, y)], 0.025, darker(roof, 0.2))
    pen.part("door")
    pen.box(door - 0.2, 0.3, door + 0.2, 1.0, lighter(WOOD, 0.75))
    pen.box(door - 0.15, 0.36, door + 0.15, 1.0, WOOD)
    pen.ellipse(door + 0.08, 0.7, 0.03, 0.03, (240, 210, 90))
    pen.part("window")
    for x in (-0.52, 0.52):
        window(pen, x, eave + 0.42, 0.15)
    pen.point("door knob", door + 0.08, 0.7)
    pen.point("chimney top", 0.51, -0.94)
    pen.point("window by the chimney", 0.52, eave + 0.42)
    pen.point("other window", -0.52, eave + 0.42)
    pen.point("roof end by the chimney", 0.92, eave + 0.01)
    pen.point("other roof end", -0.92, eave + 0.01)


def tree(pen: Pen, colour: RGB, rng: Random) -> None:
    """A trunk under a crown that is round (leafy) or pointed (fir)."""
    pen.part("trunk")
    pen.point("foot", 0.0, 0.92)
    pen.point("top", 0.0, -0.86)
    pen.point("middle of the crown", 0.0, -0.3)
    pen.blob([(-0.12, 0.0), (0.12, 0.0), (0.13, 0.75), (0.26, 1.0), (-0.26, 1.0), (-0.13, 0.75)], WOOD)
    pen.line([(0.02, 0.4), (0.04, 0.85)], 0.04, darker(WOOD))
    pen.part("crown")
    if rng.random() < 0.4:
        for y, r in ((0.45, 0.72), (0.05, 0.58), (-0.35, 0.43)):
            pen.blob([(-r, y), (-r * 0.5, y - 0.34), (0, y - 0.7), (r * 0.5, y - 0.34), (r, y), (0, y + 0.1)], colour)
            pen.blob([(-r, y), (0, y - 0.06), (r, y), (0, y + 0.1)], darker(colour, 0.25))
        return
    spots = [(-0.42, -0.1, 0.4), (0.42, -0.08, 0.4), (0.0, 0.02, 0.42), (-0.3, -0.5, 0.38), (0.32, -0.5, 0.38),
             (0.0, -0.66, 0.36), (0.0, -0.3, 0.45)]  # fmt: skip
    jitter = rng.uniform(-0.06, 0.06, (len(spots), 2))
    for (x, y, r), (dx, dy) in zip(spots, jitter, strict=True):
        pen.ellipse(x + dx, y + dy, r, r * 0.92, darker(colour, 0.16))
    for (x, y, r), (dx, dy) in zip(spots, jitter, strict=True):
        pen.ellipse(x + dx - 0.05, y + dy - 0.07, r * 0.8, r * 0.7, colour)
    for (x, y, r), (dx, dy) in zip(spots[2:], jitter[2:], strict=True):
        pen.ellipse(x + dx - 0.12, y + dy - 0.16, r * 0.33, r * 0.22, lighter(colour, 0.3))


def cat(pen: Pen, colour: RGB, rng: Random) -> None:
    """A sitting cat seen from the front, tail to one side."""
    tail = rng.uniform(-0.2, 0.2)
    pen.part("tail")
    pen.line([(0.3, 0.88), (0.66, 0.86), (0.82, 0.55), (0.74, 0.2 + tail)], 0.15, darker(colour, 0.15))
    pen.ellipse(0.74, 0.2 + tail, 0.08, 0.09, lighter(colour, 0.5))
    pen.part("body")
    pen.blob([(-0.3, 0.0), (0.3, 0.0), (0.5, 0.6), (0.46, 0.96), (0.0, 1.0), (-0.46, 0.96), (-0.5, 0.6)], colour)
    pen.blob([(-0.16, 0.2), (0.16, 0.2), (0.2, 0.65), (0.0, 0.85), (-0.2, 0.65)], lighter(colour, 0.55))
    for x in (-0.2, 0.2):
        pen.ellipse(x, 0.93, 0.16, 0.09, lighter(colour, 0.3))
    pen.part("ear")
    for side in (-1, 1):
        pen.poly([(side * 0.5, -0.42), (side * 0.46, -1.0), (side * 0.08, -0.72)], colour)
        pen.poly([(side * 0.42, -0.56), (side * 0.4, -0.86), (side * 0.2, -0.7)], (238, 160, 168))
    pen.part("head")
    pen.ellipse(0, -0.3, 0.56, 0.47, colour)
    for x in (-0.16, 0.0, 0.16):
        pen.line([(x, -0.74), (x * 0.8, -0.56)], 0.06, darker(colour, 0.35))
    pen.ellipse(0, -0.1, 0.24, 0.16, lighter(colour, 0.6))
    for side in (-1, 1):
        pen.eye(side * 0.24, -0.34, 0.1)
        for dy in (-0.04, 0.06):
            pen.line([(side * 0.2, -0.08 + dy * 0.5), (side * 0.52, -0.1 + dy * 2)], 0.018, darker(colour, 0.6))
    pen.poly([(-0.07, -0.2), (0.07, -0.2), (0, -0.12)], (216, 92, 110))
    pen.line([(-0.1, -0.03), (0, -0.08), (0.1, -0.03)], 0.03, INK)
    pen.point("tail tip", 0.74, 0.2 + tail)
    pen.point("nose", 0.0, -0.17)
    pen.point("eye on the tail's side", 0.24, -0.34)
    pen.point("other eye", -0.24, -0.34)
    pen.point("ear tip on the tail's side", 0.43, -0.9)
    pen.point("other ear tip", -0.43, -0.9)


def fish(pen: Pen, colour: RGB, rng: Random) -> None:
    """A side view: striped or plain body, fins, forked tail."""
    belly = rng.uniform(0.44, 0.6)
    fin = darker(colour, 0.2)
    pen.part("tail")
    pen.blob([(-0.5, 0.0), (-1.0, -0.5), (-0.86, 0.0), (-1.0, 0.5)], fin)
    pen.part("fin")
    pen.blob([(-0.3, -0.3), (-0.2, -belly - 0.28), (0.3, -belly - 0.12), (0.35, -0.3)], fin)
    pen.blob([(-0.2, 0.3), (-0.25, belly + 0.22), (0.15, belly + 0.08), (0.2, 0.3)], fin)
    pen.part("body")
    pen.blob(
        [(-0.72, 0.0), (-0.2, -belly), (0.45, -belly * 0.86), (0.95, 0.0), (0.45, belly * 0.86), (-0.2, belly)], colour
    )
    pen.blob([(-0.55, 0.06), (0.2, 0.16), (0.86, 0.1), (0.42, belly * 0.8), (-0.18, belly * 0.9)], lighter(colour, 0.4))
    if rng.random() < 0.6:
        for x in (-0.35, -0.05, 0.25):
            half = belly * (0.8 - abs(x) * 0.45)
            pen.blob([(x - 0.05, -half), (x + 0.08, -half), (x + 0.12, 0), (x + 0.05, half), (x - 0.05, half)],
                     lighter(colour, 0.65))  # fmt: skip
    pen.part("fin")
    pen.blob([(0.12, 0.05), (-0.2, 0.0), (-0.26, 0.25), (-0.06, 0.22)], fin)
    pen.part("body")
    pen.eye(0.58, -0.12, 0.09)
    pen.line([(0.93, 0.05), (0.8, 0.14), (0.72, 0.13)], 0.035, darker(colour, 0.55))
    pen.point("eye", 0.58, -0.12)
    pen.point("mouth", 0.88, 0.05)
    pen.point("upper tail tip", -0.95, -0.42)
    pen.point("lower tail tip", -0.95, 0.42)
    pen.point("back fin", 0.05, -belly - 0.08)


def bird(pen: Pen, colour: RGB, rng: Random) -> None:
    """A round songbird; its wing is folded, raised or lowered."""
    pen.part("leg")
    for x in (-0.02, 0.18):
        pen.line([(x, 0.55), (x + 0.02, 0.93), (x + 0.16, 0.97)], 0.05, (214, 130, 40))
    pen.part("tail")
    pen.poly([(-0.45, 0.05), (-1.02, -0.12), (-0.95, 0.2), (-0.4, 0.4)], darker(colour, 0.3))
    pen.part("body")
    pen.blob([(-0.6, 0.1), (-0.1, -0.36), (0.45, -0.2), (0.58, 0.2), (0.2, 0.62), (-0.3, 0.55)], colour)
    pen.part("beak")
    pen.poly([(0.72, -0.52), (1.05, -0.38), (0.72, -0.26)], (244, 166, 44))
    pen.part("head")
    pen.ellipse(0.46, -0.42, 0.38, 0.36, colour)
    pen.part("body")
    pen.blob([(0.46, 0.0), (0.5, 0.25), (0.18, 0.56), (-0.12, 0.5), (0.1, 0.2)], lighter(colour, 0.6))
    pen.part("wing")
    tip = rng.uniform(-0.95, 0.45)
    pen.blob(
        [(0.2, -0.05), (-0.1, -0.1 + tip * 0.4), (-0.62, tip), (-0.4, tip * 0.4 + 0.3), (0.0, 0.32)],
        darker(colour, 0.22),
    )
    pen.blob(
        [(0.1, 0.0), (-0.12, -0.02 + tip * 0.4), (-0.5, tip * 0.94), (-0.24, tip * 0.4 + 0.14)], lighter(colour, 0.15)
    )
    pen.part("head")
    pen.eye(0.56, -0.48, 0.085)
    pen.point("eye", 0.56, -0.48)
    pen.point("beak", 0.9, -0.39)
    pen.point("tail", -0.9, 0.03)
    pen.point("wing tip", -0.57, tip * 0.97)
    pen.point("breast", 0.4, 0.1)


def boat(pen: Pen, colour: RGB, rng: Random) -> None:
    """A sailing boat: coloured hull and one or two cream sails."""
    cloth = mix((250, 244, 226), colour, rng.uniform(0.0, 0.25))
    pen.part("mast")
    pen.line([(0.0, -1.0), (0.0, 0.5)], 0.07, WOOD)
    pen.part("sail")
    pen.blob([(-0.07, -0.92), (-0.12, 0.0), (-0.14, 0.36), (-0.78, 0.34), (-0.36, -0.3)], cloth)
    pen.line([(-0.12, 0.08), (-0.6, 0.1)], 0.03, darker(cloth, 0.2))
    if rng.random() < 0.75:
        pen.poly([(0.08, -0.8), (0.1, 0.34), (0.7, 0.34)], darker(cloth, 0.1))
    pen.part("flag")
    pen.poly([(0.03, -1.0), (0.32, -0.92), (0.03, -0.82)], colour)
    pen.part("hull")
    pen.blob([(-0.98, 0.44), (0.0, 0.5), (0.98, 0.4), (0.85, 0.7), (0.6, 0.98), (-0.6, 0.98), (-0.85, 0.72)], colour)
    pen.poly([(-0.94, 0.46), (0.96, 0.43), (0.9, 0.56), (-0.9, 0.58)], lighter(colour, 0.6))
    pen.poly([(-0.78, 0.82), (0.76, 0.82), (0.6, 0.97), (-0.6, 0.97)], darker(colour, 0.4))
    for x in (-0.4, 0.0, 0.4):
        pen.ellipse(x, 0.7, 0.07, 0.07, lighter(GLASS, 0.3))
    pen.point("bow", 0.9, 0.5)
    pen.point("stern", -0.9, 0.52)
    pen.point("mast top", 0.0, -0.96)
    pen.point("corner of the sail", -0.68, 0.31)
    pen.point("keel", 0.0, 0.9)


def apple(pen: Pen, colour: RGB, rng: Random) -> None:
    """A whole apple with a stalk and one leaf."""
    wide = rng.uniform(0.86, 0.98)
    pen.part("fruit")
    pen.blob([(0, -0.5), (0.5, -0.68), (wide, -0.15), (0.72, 0.6), (0.3, 0.96), (0, 0.88),
              (-0.3, 0.96), (-0.72, 0.6), (-wide, -0.15), (-0.5, -0.68)], colour)  # fmt: skip
    pen.blob([(0.5, 0.55), (0.8, 0.0), (0.6, 0.62), (0.2, 0.86)], darker(colour, 0.22))
    pen.ellipse(0, -0.54, 0.24, 0.09, darker(colour, 0.45))
    pen.part("stalk")
    pen.line([(0.0, -0.52), (0.04, -0.78), (0.14, -0.98)], 0.1, WOOD)
    pen.part("leaf")
    pen.blob([(0.06, -0.72), (0.3, -1.0), (0.72, -0.96), (0.46, -0.7)], (84, 150, 60))
    pen.line([(0.1, -0.74), (0.56, -0.9)], 0.025, (50, 104, 44))
    pen.part("fruit")
    pen.blob([(-0.6, -0.34), (-0.36, -0.5), (-0.38, -0.26), (-0.54, 0.06)], lighter(colour, 0.65))
    pen.point("stalk", 0.03, -0.7)
    pen.point("leaf tip", 0.66, -0.94)
    pen.point("foot", 0.0, 0.82)
    pen.point("side below the leaf", wide - 0.08, -0.1)
    pen.point("other side", 0.08 - wide, -0.1)


def mushroom(pen: Pen, colour: RGB, rng: Random) -> None:
    """A spotted cap on a pale stalk."""
    rim = rng.uniform(-0.02, 0.16)
    pen.part("stalk")
    pen.blob(
        [(-0.24, 0.0), (0.24, 0.0), (0.26, 0.6), (0.4, 0.96), (0, 1.0), (-0.4, 0.96), (-0.26, 0.6)], (240, 228, 204)
    )
    pen.blob([(0.08, 0.2), (0.24, 0.1), (0.26, 0.6), (0.36, 0.94), (0.12, 0.95)], (214, 198, 170))
    pen.part("gills")
    pen.ellipse(0, rim, 0.84, 0.2, (222, 200, 172))
    for x in (-0.5, -0.25, 0.0, 0.25, 0.5):
        pen.line([(x * 0.5, rim + 0.04), (x * 1.25, rim + 0.15)], 0.022, (184, 158, 130))
    pen.part("cap")
    pen.blob(
        [(-0.98, rim), (-0.8, -0.55), (0, -1.0), (0.8, -0.55), (0.98, rim), (0.5, rim + 0.05), (-0.5, rim + 0.05)],
        colour,
    )
    for x, y, r in (
        (-0.5, -0.3, 0.16),
        (0.1, -0.62, 0.18),
        (0.52, -0.22, 0.17),
        (-0.05, -0.12, 0.13),
        (-0.36, -0.68, 0.09),
    ):
        pen.ellipse(x, y + rng.uniform(-0.04, 0.04), r, r * 0.85, (252, 248, 238))
    pen.point("top", 0.0, -0.94)
    pen.point("foot", 0.0, 0.9)
    pen.point("middle of the stalk", 0.0, 0.45)


def cup(pen: Pen, colour: RGB, rng: Random) -> None:
    """A mug with a handle, a drink and sometimes a stripe."""
    base = rng.uniform(0.5, 0.66)
    pen.part("handle")
    pen.line([(0.55, -0.3), (0.92, -0.28), (1.0, 0.1), (0.86, 0.42), (0.5, 0.5)], 0.15, darker(colour, 0.12))
    pen.part("wall")
    pen.poly([(-0.74, -0.6), (0.74, -0.6), (base, 0.86), (-base, 0.86)], colour)
    pen.ellipse(0, 0.86, base, 0.13, colour)
    if rng.random() < 0.6:
        pen.poly([(-0.7, -0.1), (0.7, -0.1), (0.66, 0.28), (-0.66, 0.28)], lighter(colour, 0.65))
    pen.poly([(-0.6, -0.42), (-0.44, -0.42), (-0.36, 0.7), (-0.48, 0.7)], lighter(colour, 0.5))
    pen.part("rim")
    pen.ellipse(0, -0.6, 0.74, 0.2, lighter(colour, 0.35))
    pen.part("drink")
    pen.ellipse(0, -0.58, 0.64, 0.15, (92, 56, 36))
    pen.ellipse(-0.12, -0.55, 0.36, 0.07, (140, 94, 62))
    pen.point("handle", 0.98, 0.1)
    pen.point("rim by the handle", 0.7, -0.6)
    pen.point("other end of the rim", -0.7, -0.6)
    pen.point("drink", 0.0, -0.58)
    pen.point("foot", 0.0, 0.9)


def umbrella(pen: Pen, colour: RGB, rng: Random) -> None:
    """An open umbrella: panels in two tones and a hooked handle."""
    hook = 0.2 if rng.random() < 0.5 else -0.2
    pen.part("handle")
    pen.line([(0, -0.98), (0, 0.8), (hook * 0.2, 0.94), (hook * 0.8, 0.96), (hook, 0.8)], 0.085, (96, 66, 48))
    other = lighter(colour, 0.5 if rng.random() < 0.6 else 0.12)
    pen.part("canopy")
    pen.ellipse(0, -0.05, 1.0, 0.84, colour, 180, 360)
    for x in (-0.75, -0.25, 0.25, 0.75):
        pen.ellipse(x, -0.05, 0.26, 0.12, darker(colour, 0.3), 0, 180)
    pen.blob([(-0.99, -0.05), (-0.75, -0.6), (0, -0.89), (-0.38, -0.5), (-0.5, -0.05), (-0.75, -0.12)], other)
    pen.blob([(0.0, -0.05), (-0.02, -0.5), (0, -0.89), (0.36, -0.55), (0.5, -0.05), (0.25, -0.12)], other)
    pen.ellipse(0, -0.93, 0.05, 0.07, (96, 66, 48))
    pen.point("top", 0.0, -0.93)
    pen.point("middle of the handle", 0.0, 0.4)
    pen.point("hook", hook * 0.8, 0.96)


def balloon(pen: Pen, colour: RGB, rng: Random) -> None:
    """A balloon on a curling string."""
    sway = rng.uniform(-0.25, 0.25)
    pen.part("string")
    pen.line([(0, 0.42), (sway, 0.6), (-sway * 0.6, 0.8), (sway * 0.6, 1.0)], 0.035, (110, 104, 110))
    pen.part("skin")
    pen.poly([(0, 0.28), (0.13, 0.48), (-0.13, 0.48)], darker(colour, 0.25))
    pen.blob(
        [(0, -1.0), (0.46, -0.8), (0.62, -0.38), (0.4, 0.12), (0, 0.36), (-0.4, 0.12), (-0.62, -0.38), (-0.46, -0.8)],
        colour,
    )
    pen.blob([(0.48, -0.6), (0.56, -0.3), (0.3, 0.14), (0.02, 0.28), (0.36, -0.1)], darker(colour, 0.18))
    pen.blob([(-0.36, -0.66), (-0.2, -0.82), (-0.2, -0.54), (-0.34, -0.3), (-0.42, -0.44)], lighter(colour, 0.7))
    pen.point("top", 0.0, -0.94)
    pen.point("knot", 0.0, 0.4)
    pen.point("middle", 0.0, -0.3)


#: What ``Pen.part`` may be given; ``Scene.parts`` holds ``1 + PARTS.index((class, part))``.
PARTS: Final[tuple[tuple[str, str], ...]] = tuple(
    (name, part)
    for name, parts in {
        "car": ("body", "window", "wheel", "lamp"),
        "house": ("wall", "roof", "door", "window", "chimney"),
        "tree": ("crown", "trunk"),
        "cat": ("head", "ear", "body", "tail"),
        "fish": ("body", "fin", "tail"),
        "bird": ("head", "beak", "body", "wing", "tail", "leg"),
        "boat": ("hull", "sail", "mast", "flag"),
        "apple": ("fruit", "stalk", "leaf"),
        "mushroom": ("cap", "gills", "stalk"),
        "cup": ("wall", "rim", "drink", "handle"),
        "umbrella": ("canopy", "handle"),
        "balloon": ("skin", "string"),
    }.items()
    for part in parts
)
Draw = Callable[[Pen, RGB, Random], None]
DRAW: Final[dict[str, Draw]] = {
    "car": car, "house": house, "tree": tree, "cat": cat, "fish": fish, "bird": bird, "boat": boat, "apple": apple,
    "mushroom": mushroom, "cup": cup, "umbrella": umbrella, "balloon": balloon,
}  # fmt: skip
#: Half height of each object, relative to the others.
HEIGHT: Final[dict[str, float]] = {
    "car": 0.85, "house": 1.15, "tree": 1.25, "cat": 0.95, "fish": 0.8, "bird": 0.8, "boat": 1.05, "apple": 0.8,
    "mushroom": 0.85, "cup": 0.8, "umbrella": 1.0, "balloon": 1.1,
}  # fmt: skip
#: Width over height before random stretching.
STRETCH: Final[dict[str, float]] = {"car": 1.3, "fish": 1.15, "balloon": 1.15, "house": 1.0}
