"""Rows of small pictures with words below them, on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT = "#ffffff", "#16181d", "#6b7280"
MARGIN, LINE, SIZE = 12, 16, 12


class Tile(NamedTuple):
    picture: Image.Image
    title: str
    line: str = ""


def sheet(rows: Sequence[Sequence[Tile]], width: int = 192) -> Image.Image:
    """Pictures row by row, each with its title and line below.

    Args:
        width: of each picture, in pixels; its height follows from its aspect. Words that are wider are cut.
    """
    heights = [max(round(width * t.picture.height / t.picture.width) for t in row) for row in rows]
    columns = max(len(row) for row in rows)
    foot = 2 * LINE + MARGIN
    made = Image.new("RGB", (MARGIN + columns * (width + MARGIN), MARGIN + sum(heights) + len(rows) * foot), PAPER)
    draw, font, top = ImageDraw.Draw(made), ImageFont.load_default(SIZE), MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            left = MARGIN + column * (width + MARGIN)
            size = (width, round(width * tile.picture.height / tile.picture.width))
            smooth = Image.Resampling.LANCZOS if tile.picture.width > width else Image.Resampling.NEAREST
            made.paste(tile.picture.convert("RGB").resize(size, smooth), (left, top))
            draw.text((left, top + height + LINE - 3), _cut(tile.title, width, font), fill=INK, font=font, anchor="ls")
            draw.text((left, top + height + 2 * LINE - 3), _cut(tile.line, width, font), FAINT, font, "ls")
        top += height + foot
    return made


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
