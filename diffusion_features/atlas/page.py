"""One page of pictures: the principal components of every measured activation, depth downwards, kinds across."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence

from PIL import Image, ImageDraw, ImageFont

from .measuring import Entry

TILE, GAP, LINE, MARGIN, LABEL = 72, 8, 11, 20, 210
PAPER, INK, FAINT, CHOSEN = "#ffffff", "#16181d", "#6b7280", "#12805c"
FADED = 0.75
"""How far the picture of a dropped activation is faded to paper."""


def page(entries: Sequence[Entry], dropped: Container[str], preset: Container[str]) -> Image.Image:
    """Draw the page. Below each picture stand its noise and locality; what is dropped is faded, the preset framed.

    Args:
        entries: in forward order.
        dropped, preset: ids.

    Returns:
        RGB.
    """
    places = list(dict.fromkeys(place_and_kind(e.activation.id)[0] for e in entries))
    kinds = list(dict.fromkeys(place_and_kind(e.activation.id)[1] for e in entries))
    step, row = TILE + GAP, TILE + GAP + LINE
    size = (2 * MARGIN + LABEL + len(kinds) * step, 2 * MARGIN + LINE + GAP + len(places) * row)
    sheet = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE)
    for column, kind in enumerate(kinds):
        draw.text((MARGIN + LABEL + column * step, MARGIN), kind, fill=INK, font=font)
    top = MARGIN + LINE + GAP
    for number, place in enumerate(places):
        draw.text((MARGIN, top + number * row + TILE // 2), place, fill=INK, font=font)
    for entry in entries:
        id, found = entry.activation.id, entry.properties
        place, kind = place_and_kind(id)
        left, upper = MARGIN + LABEL + kinds.index(kind) * step, top + places.index(place) * row
        picture = _tile(entry.picture, faded=id in dropped)
        sheet.paste(picture, (left, upper))
        if id in preset:
            draw.rectangle((left - 3, upper - 3, left + TILE + 2, upper + TILE + 2), outline=CHOSEN, width=3)
        draw.text((left, upper + TILE), f"{found.noise:.2f}  {found.locality:.2f}", fill=FAINT, font=font)
    return sheet


def place_and_kind(id: str) -> tuple[str, str]:
    """``up-level1-repeat0-vit-block3-cross-q`` -> ``up-level1-repeat0-vit-block3``, ``cross-q``."""
    if re.search(r"block\d+-out$", id):
        return id.removesuffix("-out"), "block-out"
    parts = id.split("-")
    return "-".join(parts[:-2]) or id, "-".join(parts[-2:])


def _tile(picture: Image.Image, faded: bool) -> Image.Image:
    tile = picture.resize((TILE, TILE), Image.Resampling.NEAREST)
    return Image.blend(tile, Image.new("RGB", tile.size, PAPER), FADED) if faded else tile
