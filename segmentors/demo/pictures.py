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

Box = tuple[int, int, int, int]
Annotated = tuple[Image.Image, list[tuple[np.ndarray | Box, str]]]


def annotated(picture: Image.Image, labels: Tensor, classes: Sequence[str], opacity: float) -> Annotated:
    """A picture with a mask for each class that occurs, in the form that Gradio's ``AnnotatedImage`` takes.

    Args:
        labels: (H, W) of the picture.
        opacity: of the masks, 0 to 1.
    """
    there = labels.unique().tolist()
    return picture, [((labels == i).numpy() * opacity, classes[i]) for i in there]


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
