"""The similarity of every place with every other one, sent to the browser so that hovering asks no server."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from diffusion_features.correspondence import similarity

from .looking import SHOWN, Features, shown_size

MOST = 32
"""Cells on the longer side: a picture of 32 x 32 has 1,048,576 similarities, as many bytes before compression."""
Grid = tuple[int, int]


def grid_of(found: Features) -> Grid:
    """Height and width of the finest feature, reduced to ``MOST`` cells on its longer side if it has more."""
    height, width = max((tensor.shape[-2:] for tensor in found.values()), key=lambda size: size[0] * size[1])
    scale = min(1.0, MOST / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def cell_similarities(source: Features, target: Features, here: Grid, there: Grid) -> Tensor:
    """Cosine similarity of the centre of each cell of one picture with that of each of another: (h·w, h'·w').

    Args:
        source, target: the same activations of both, id → (C, h, w).
        here, there: height and width of the grids.
    """
    y, x = torch.meshgrid(torch.arange(here[0]) + 0.5, torch.arange(here[1]) + 0.5, indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], dim=1)
    return similarity(source, target, points, source_size=here, target_size=there).flatten(1)


def hover(
    found: Features,
    picture: Image.Image,
    other: tuple[Features, Image.Image] | None = None,
    sizes: Sequence[Grid] = (),
) -> str:
    """What ``hover.js`` draws from, as JSON.

    Args:
        sizes: width and height of the pictures in whose pixels places are told, where those given are reduced.

    Returns:
        A list with an object for the picture, and one for the second if there is one: ``picture``, a data URL; ``size``
        in pixels and ``grid``, each [width, height]; ``similar``, the data URL of a grey picture whose
        row i has the similarities of the first picture's cell i with the cells of this one, -1 as 0 and 1 as 255.
    """
    here = grid_of(found)
    shown = []
    both = [(found, picture), *([other] if other else [])]
    for (target, image), size in zip(both, sizes or [image.size for _, image in both], strict=True):
        there = grid_of(target)
        values = cell_similarities(found, target, here, there).float().cpu().clamp(-1, 1)
        grey = Image.fromarray(((values + 1) * 127.5).round().to(torch.uint8).numpy())
        shown.append(
            {
                "picture": _url(image.resize(shown_size(image.size, min(SHOWN, max(image.size))))),
                "size": size,
                "grid": there[::-1],
                "similar": _url(grey),
            }
        )
    return json.dumps(shown)


def _url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
