"""What the page draws of a segmentation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from segmentors.training_free.pictures import RGB, heat, label_image

TILE = 256
"""Larger score maps are reduced to this many pixels on the longer side. Nothing is enlarged: encoding is what takes the
time, and browsers enlarge by themselves, see ``style.CSS``."""


def masks(
    labels: Tensor, classes: Sequence[str], colours: Sequence[RGB], opacity: float
) -> list[tuple[Image.Image, str]]:
    """A picture for each class that occurs, in its colour where it is and transparent elsewhere, and its name.

    Args:
        labels: (H, W), indices into ``classes``.
        opacity: of the colour, 0 to 1.
    """
    found = []
    for i in labels.unique().tolist():
        mask = Image.fromarray((labels == i).numpy().astype(np.uint8))
        mask.putpalette([0, 0, 0, *colours[i]])
        mask.info["transparency"] = bytes([0, round(255 * opacity)])
        found.append((mask, classes[i]))
    return found


def colour_map(classes: Sequence[str], colours: Sequence[RGB]) -> dict[str, str]:
    return {name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in zip(classes, colours, strict=True)}


def covered(picture: Image.Image, labels: Tensor, colours: Sequence[RGB], opacity: float) -> Image.Image:
    """A picture under the colours of its labels (H, W)."""
    return Image.blend(picture, label_image(labels, colours).convert("RGB"), opacity)


def score_maps(scores: Tensor, classes: Sequence[str]) -> list[tuple[Image.Image, str]]:
    """A picture of the score of each class, (K, H, W) in [0, 1], dark for 0 and bright for 1, with its title."""
    height, width = scores.shape[-2:]
    scale = min(1.0, TILE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return [(heat(score, size), name) for score, name in zip(scores, classes, strict=True)]
