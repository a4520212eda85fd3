"""What the page draws of a segmentation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from segmentors.training_free.pictures import RGB, heat, label_image

SMALLEST = 512
"""Smaller pictures are enlarged to this many pixels on the longer side, so that browsers do not blur labels."""
TILE = 256

Box = tuple[int, int, int, int]
Annotated = tuple[Image.Image, list[tuple[np.ndarray | Box, str]]]


def annotated(picture: Image.Image, labels: Tensor, classes: Sequence[str], opacity: float) -> Annotated:
    """A picture with a mask for each class that occurs, in the form that Gradio's ``AnnotatedImage`` takes.

    Args:
        labels: (H, W) of the picture.
        opacity: of the masks, 0 to 1.
    """
    shown = enlarged(picture)
    large = F.interpolate(labels[None, None].double(), (shown.height, shown.width), mode="nearest")[0, 0].long()
    there = labels.unique().tolist()
    return shown, [((large == i).numpy() * opacity, classes[i]) for i in there]


def colour_map(classes: Sequence[str], colours: Sequence[RGB]) -> dict[str, str]:
    return {name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in zip(classes, colours, strict=True)}


def covered(picture: Image.Image, labels: Tensor, colours: Sequence[RGB], opacity: float) -> Image.Image:
    """A picture under the colours of its labels (H, W)."""
    shown = enlarged(picture)
    over = label_image(labels, colours).convert("RGB").resize(shown.size, Image.Resampling.NEAREST)
    return Image.blend(shown, over, opacity)


def score_maps(scores: Tensor, classes: Sequence[str]) -> list[tuple[Image.Image, str]]:
    """A picture of the score of each class, (K, H, W) in [0, 1], dark for 0 and bright for 1, with its title."""
    height, width = scores.shape[-2:]
    scale = TILE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return [(heat(score, size), name) for score, name in zip(scores, classes, strict=True)]


def enlarged(picture: Image.Image) -> Image.Image:
    """A picture of at least ``SMALLEST`` pixels on its longer side."""
    scale = max(1.0, SMALLEST / max(picture.size))
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
