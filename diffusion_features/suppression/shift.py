"""Content shift made visible: where features have edges, against where the things in the image have them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..visualize import pca_image
from .sheet import Tile, sheet

TILE = 160


def edge_agreement(feature: Tensor, labels: Tensor) -> float:
    """How well the edges of a feature tell the edges of the things in its image.

    The probability that a cell with an edge between labels has a stronger feature edge than a cell without one: the
    area under the ROC curve. 1 is perfect, 0.5 is chance; it has no threshold and does not depend on the feature's
    scale.

    Args:
        feature: (C, h, w).
        labels: (H, W), whole numbers; H and W are at least h and w.

    Raises:
        ValueError: other shapes, or no cell, or every cell, has an edge between labels.
    """
    if (
        feature.ndim != 3
        or labels.ndim != 2
        or any(a < b for a, b in zip(labels.shape, feature.shape[1:], strict=True))
    ):
        raise ValueError(
            f"a feature must be (C, h, w) and labels (H, W), not smaller; not {tuple(feature.shape)} and "
            f"{tuple(labels.shape)}"
        )
    strength = edges(feature).flatten()
    there = label_edges(labels, (feature.shape[1], feature.shape[2])).flatten().to(strength.device)
    if there.all() or not there.any():
        raise ValueError("either all cells have an edge between labels, or none has: there is nothing to tell apart")
    return roc_area(strength[there], strength[~there])


def roc_area(inside: Tensor, outside: Tensor) -> float:
    """The area under the ROC curve: the probability that one of ``inside`` is above one of ``outside``, (n,) each.

    A tie counts half.
    """
    from scipy.stats import mannwhitneyu  # type: ignore[import-untyped]  # slow to import

    above = mannwhitneyu(inside.double().cpu(), outside.double().cpu(), method="asymptotic").statistic
    return float(above / (len(inside) * len(outside)))


def edges(feature: Tensor) -> Tensor:
    """Strength of a feature's edges, (h, w): the length of its gradient over all channels.

    Args:
        feature: (C, h, w), at least two cells a side.
    """
    down, across = torch.gradient(feature.float(), dim=(1, 2))
    return (down.square() + across.square()).sum(0).sqrt()


def label_edges(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which cells of a grid have pixels on both sides of an edge between labels, or next to one; bool (h, w).

    Args:
        labels: (H, W).
        grid: (h, w).
    """
    there = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
    down, across = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    there[1:] |= down
    there[:-1] |= down
    there[:, 1:] |= across
    there[:, :-1] |= across
    return F.adaptive_max_pool2d(there[None].float(), grid)[0] > 0


def shift_sheet(image: Image.Image, rows: Mapping[str, Mapping[int, Tensor]], labels: Tensor) -> Image.Image:
    """A feature at rising timesteps, with and without techniques, and how well its edges agree with the labels'.

    Args:
        image: drawn at the left of each row.
        rows: name of the technique → t → the feature (C, h, w) of the image; all rows have the same t.
        labels: (H, W) of the image.

    Returns:
        One row a technique, one column a timestep; the colours of all tiles are principal components of all of them
        together, so they can be compared.
    """
    tiles = [feature for row in rows.values() for feature in row.values()]
    width = tiles[0].shape[2]
    colours = pca_image(torch.cat(tiles, dim=2))
    drawn, place = [], 0
    for name, row in rows.items():
        drawn.append([Tile(image, name)])
        for t, feature in row.items():
            tile = colours.crop((place * width, 0, (place + 1) * width, colours.height))
            drawn[-1].append(Tile(tile, f"t = {t}", f"edge agreement {edge_agreement(feature, labels):.3f}"))
            place += 1
    return sheet(drawn, TILE)
