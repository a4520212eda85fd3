"""Segmentations as pictures."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

RGB = tuple[int, int, int]

PAPER, INK = (255, 255, 255), (32, 32, 36)
COLD, WARM, HOT = (16, 14, 40), (196, 62, 76), (255, 240, 190)
MARGIN, GAP, TEXT = 12, 8, 14
MOST_CLASSES = 256
TURN = 0.381966
"""Share of the colour circle from one class to the next: the golden angle, so that neighbours are far apart."""


def palette(classes: Sequence[str]) -> list[RGB]:
    """A colour for each class, the same for the same list; black for "background" in the first place."""
    colours = [
        colorsys.hsv_to_rgb(i * TURN % 1, (0.75, 0.5)[i % 2], (0.95, 0.7)[i // 2 % 2]) for i in range(len(classes))
    ]
    found = [(round(r * 255), round(g * 255), round(b * 255)) for r, g, b in colours]
    return [(0, 0, 0), *found[:-1]] if classes and classes[0] == "background" else found


def check_count(classes: int) -> None:
    """Raises ValueError for more classes than the palette of a label image holds."""
    if classes > MOST_CLASSES:
        raise ValueError(f"a label image holds {MOST_CLASSES} classes, not {classes}")


def label_image(labels: Tensor, colours: Sequence[RGB]) -> Image.Image:
    """Labels (H, W) as a palette image, whose pixel values are the labels.

    Raises:
        ValueError: there are more colours than the 256 that a palette holds.
    """
    check_count(len(colours))
    image = Image.fromarray(labels.cpu().numpy().astype(np.uint8)).convert("P")
    image.putpalette([value for colour in colours for value in colour])
    return image


def overlay(image: Image.Image, labels: Tensor, classes: Sequence[str], colours: Sequence[RGB]) -> Image.Image:
    """An image with its labels (H, W) laid over it, and below a legend of the classes that occur."""
    labelled = label_image(labels, colours).convert("RGB")
    blended = Image.blend(image.convert("RGB"), labelled, 0.55)
    there = labels.unique().tolist()
    key = legend([classes[i] for i in there], [colours[i] for i in there], blended.width)
    sheet = Image.new("RGB", (blended.width, blended.height + key.height), PAPER)
    sheet.paste(blended, (0, 0))
    sheet.paste(key, (0, blended.height))
    return sheet


def legend(names: Sequence[str], colours: Sequence[RGB], width: int) -> Image.Image:
    """Names with their colours, in as many lines as ``width`` pixels ask for."""
    font = ImageFont.load_default(TEXT)
    places, x, y = [], GAP, GAP
    for name in names:
        wide = TEXT + 4 + round(font.getlength(name))
        if x > GAP and x + wide > width:
            x, y = GAP, y + TEXT + GAP
        places.append((x, y))
        x += wide + GAP
    sheet = Image.new("RGB", (width, y + TEXT + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for name, colour, (left, top) in zip(names, colours, places, strict=True):
        draw.rectangle((left, top, left + TEXT - 1, top + TEXT - 1), fill=colour, outline=INK)
        draw.text((left + TEXT + 4, top + TEXT - 2), name, fill=INK, font=font, anchor="ls")
    return sheet


def heat(values: Tensor, size: tuple[int, int]) -> Image.Image:
    """A map (h, w) in [0, 1] as a picture of (width, height), dark for 0 and bright for 1."""
    grey = Image.fromarray((values.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy())
    return ImageOps.colorize(grey, black=COLD, mid=WARM, white=HOT).resize(size, Image.Resampling.NEAREST)


def step_sheet(
    image: Image.Image,
    found: Mapping[str, Tensor],
    labels: Tensor,
    classes: Sequence[str],
    colours: Sequence[RGB],
    tile: int = 160,
) -> Image.Image:
    """A row for each class and a column for each step, beside the image and its labels.

    Args:
        found: step → (K, h, w) in [0, 1], see ``steps``.
        labels: (H, W), indices into ``colours``.
        classes: the K names.
        tile: height of a picture in pixels.
    """
    size = (max(1, round(tile * image.width / image.height)), tile)
    head, left = TEXT + GAP, MARGIN + size[0] + GAP
    sheet = Image.new(
        "RGB",
        (left + len(found) * (size[0] + GAP) - GAP + MARGIN, 2 * MARGIN + max(2, len(classes)) * (head + tile + GAP)),
        PAPER,
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)

    def put(picture: Image.Image, title: str, x: int, row: int) -> None:
        top = MARGIN + row * (head + tile + GAP)
        draw.text((x, top + TEXT), title, fill=INK, font=font, anchor="ls")
        sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), (x, top + head))

    put(image.convert("RGB"), "image", MARGIN, 0)
    put(label_image(labels, colours).convert("RGB"), "labels", MARGIN, 1)
    for column, (step, maps) in enumerate(found.items()):
        for row, (name, values) in enumerate(zip(classes, maps, strict=True)):
            put(heat(values, size), f"{name}: {step}", left + column * (size[0] + GAP), row)
    return sheet
