"""A picture of matches: two images side by side and a line for each pair of points."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

from PIL import Image, ImageDraw

GAP, FINER = 16, 2
"""Pixels between the images; and how many times larger everything is drawn, so that lines are smooth."""

Point = tuple[float, float]


def draw_matches(
    source: Image.Image, target: Image.Image, points: Sequence[Point], found: Sequence[Point], height: int = 384
) -> Image.Image:
    """Two images side by side, each point ringed and joined to the place where it was found.

    Args:
        source, target: of any size; both are drawn at ``height``, each with its own aspect.
        points, found: (x, y) in pixels of the source and of the target, in the same order.
        height: of the picture, in pixels.

    Returns:
        RGB.
    """
    tall = height * FINER
    scales = [tall / image.height for image in (source, target)]
    widths = [max(1, round(image.width * scale)) for image, scale in zip((source, target), scales, strict=True)]
    sheet = Image.new("RGB", (sum(widths) + GAP * FINER, tall), "white")
    second = widths[0] + GAP * FINER
    for image, width, left in zip((source, target), widths, (0, second), strict=True):
        sheet.paste(image.convert("RGB").resize((width, tall), Image.Resampling.LANCZOS), (left, 0))
    draw = ImageDraw.Draw(sheet)
    for number, (here, there) in enumerate(zip(points, found, strict=True)):
        colour = _colour(number, len(points))
        a = (here[0] * scales[0], here[1] * scales[0])
        b = (there[0] * scales[1] + second, there[1] * scales[1])
        draw.line((*a, *b), fill=colour, width=FINER)
        for point in (a, b):
            draw.circle(point, 4 * FINER, fill=colour, outline="white", width=FINER)
    return sheet.resize((sheet.width // FINER, height), Image.Resampling.LANCZOS)


def _colour(number: int, count: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(number / max(count, 1), 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)
