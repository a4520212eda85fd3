"""Features at points of an image, without enlarging all of them to its pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Features: TypeAlias = Mapping[str, Tensor]
Size: TypeAlias = tuple[int, int]


def at_points(features: Features, points: Tensor, size: Size) -> dict[str, Tensor]:
    """Features at points, bilinear between cells, the border's value beyond the outermost: id -> (N, C).

    At the centres of pixels it equals ``interpolate(..., mode="bilinear", align_corners=False)`` to their number.

    Args:
        features: id -> (C, h, w) of one image; a grid covers the whole image.
        points: (N, 2), (x, y) in pixels from the left and top edges; a pixel's centre is at half a pixel.
        size: (height, width) of the image in pixels.

    Returns:
        On the devices of the features, float32 or more.

    Raises:
        ValueError: there are no features, a tensor has another shape, or a point lies outside the image.
    """
    if not features:
        raise ValueError("there are no features")
    _check_points(points, size)
    found = {}
    for id, tensor in features.items():
        if tensor.ndim != 3 or 0 in tensor.shape:
            raise ValueError(f"{id} must have shape (C, h, w), not {tuple(tensor.shape)}: give those of one image")
        exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        places = 2 * points.to(exact) / exact.new_tensor([size[1], size[0]]) - 1
        sampled = F.grid_sample(
            exact[None], places[None, :, None], mode="bilinear", padding_mode="border", align_corners=False
        )
        found[id] = sampled[0, :, :, 0].T
    return found


def _check_points(points: Tensor, size: Size) -> None:
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"points must have shape (N, 2), (x, y) in pixels, not {tuple(points.shape)}")
    high = points.new_tensor([size[1], size[0]])
    outside = ((points < 0) | (points > high)).any(dim=1)
    if outside.any():
        x, y = points[outside][0].tolist()
        raise ValueError(f"the point ({x:g}, {y:g}) lies outside the image of {size[1]} x {size[0]} pixels")
