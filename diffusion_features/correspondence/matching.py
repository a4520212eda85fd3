"""Points of one image found in another by the cosine similarity of their features.

Points are (x, y) in pixels from the left and top edges; the pixel in column i and row j has its centre at
(i + 0.5, j + 0.5). Features are the activations of one image, id -> (C, h, w): they are matched as if all were
enlarged bilinearly to the pixels of the image and concatenated there, as in arXiv 2410.03558, appendix C. That tensor
is never made: at 512 x 512 pixels and 3,840 channels it would take 4 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sampling import Features, Size, at_points

Locate: TypeAlias = Callable[[Tensor], Tensor]

TILE = 2**24
"""Numbers in the largest tensor that matching makes, 64 MiB in float32; a single map of similarities may be larger."""
SMALLEST = 1e-12
"""Below this a norm counts as zero, and so does its similarity with everything."""


class Matches(NamedTuple):
    """points: (N, 2), (x, y) in pixels of the target. scores: (N,), cosine similarities in [-1, 1] at their best."""

    points: Tensor
    scores: Tensor


def nearest(similarities: Tensor) -> Tensor:
    """The centre of the most similar pixel.

    Args:
        similarities: (N, H, W).

    Returns:
        (N, 2), (x, y), in the dtype of the similarities.
    """
    width = similarities.shape[-1]
    best = similarities.flatten(1).argmax(dim=1)
    rows = torch.div(best, width, rounding_mode="floor")
    return torch.stack([best % width, rows], dim=1).to(similarities.dtype) + 0.5


def soft_argmax(similarities: Tensor, temperature: float = 0.02, window: int = 15) -> Tensor:
    """The mean place of the pixels around the most similar one, weighted by a softmax of their similarities.

    Finer than a pixel, and differentiable; the window keeps other places that look alike out of the mean (window
    soft-argmax, arXiv 2311.17034, section 4).

    Args:
        similarities: (N, H, W).
        temperature: the similarities are divided by it before the softmax; near zero it is ``nearest``.
        window: pixels on each side of the best that take part.

    Returns:
        (N, 2), (x, y).

    Raises:
        ValueError: the temperature is not positive, or the window is negative.
    """
    if temperature <= 0 or window < 0:
        raise ValueError(f"temperature must be above 0 and window at least 0, not {temperature} and {window}")
    best = nearest(similarities)
    height, width = similarities.shape[-2:]
    x = torch.arange(width, device=best.device, dtype=best.dtype) + 0.5
    y = torch.arange(height, device=best.device, dtype=best.dtype) + 0.5
    near_x, near_y = (x - best[:, :1]).abs() <= window, (y - best[:, 1:]).abs() <= window
    outside = ~(near_y[:, :, None] & near_x[:, None, :])
    logits = (similarities / temperature).masked_fill(outside, -torch.inf)
    weights = logits.flatten(1).softmax(dim=1).view_as(similarities)
    return torch.stack([(weights.sum(dim=1) * x).sum(dim=1), (weights.sum(dim=2) * y).sum(dim=1)], dim=1)


def match(
    source: Features,
    target: Features,
    points: Tensor,
    *,
    source_size: Size,
    target_size: Size,
    locate: Locate = nearest,
) -> Matches:
    """Find points of the source image in the target image.

    Args:
        source, target: the same activations of both images, id -> (C, h, w); a grid covers its whole image.
        points: (N, 2), (x, y) in pixels of the source image.
        source_size, target_size: (height, width) of the images in pixels.
        locate: similarities (N, H, W) -> (N, 2): ``nearest`` or ``soft_argmax``.

    Returns:
        Where they are in the target, on the device of its features, float32 or more.

    Raises:
        ValueError: the images have other activations, or a tensor has another shape; or a point lies outside.
    """
    descriptors = describe(source, points, source_size)
    scale = _inverse_norms(_checked(target, source), target_size)
    chunk = max(1, TILE // (target_size[0] * target_size[1]))
    found = []
    for part in torch.arange(len(points)).split(chunk):
        maps = _similarity({id: rows[part] for id, rows in descriptors.items()}, target, scale)
        found.append(Matches(locate(maps), maps.flatten(1).amax(dim=1)))
    return Matches(torch.cat([m.points for m in found]), torch.cat([m.scores for m in found]))


def returns(
    source: Features,
    target: Features,
    points: Tensor,
    matches: Matches,
    *,
    source_size: Size,
    target_size: Size,
    within: float,
) -> Tensor:
    """The mutual check: which matches, searched for in the source, come back to where they were from.

    Args:
        source, target, points, source_size, target_size: as given to ``match``.
        matches: its result.
        within: the largest distance from the point, in pixels of the source, that counts as back.

    Returns:
        bool (N,).
    """
    inside = torch.tensor([target_size[1], target_size[0]], device=matches.points.device)
    there = matches.points.clamp(min=0).minimum(inside.to(matches.points.dtype))
    back = match(target, source, there, source_size=target_size, target_size=source_size)
    return (back.points - points.to(back.points)).norm(dim=1) <= within


def similarity(source: Features, target: Features, points: Tensor, *, source_size: Size, target_size: Size) -> Tensor:
    """Cosine similarity of points of the source with every pixel of the target: (N, H, W). Arguments as ``match``."""
    descriptors = describe(source, points, source_size)
    return _similarity(descriptors, target, _inverse_norms(_checked(target, source), target_size))


def describe(features: Features, points: Tensor, size: Size) -> dict[str, Tensor]:
    """Features at points, bilinear between cells: id -> (N, C); over all ids together, each point has norm 1.

    Args:
        features: id -> (C, h, w).
        points: (N, 2), (x, y) in pixels.
        size: (height, width) of the image in pixels.

    Raises:
        ValueError: there are no features, a tensor has another shape, or a point lies outside the image.
    """
    found = at_points(features, points, size)
    squares = torch.stack([rows.square().sum(dim=1) for rows in found.values()]).sum(dim=0)
    scale = squares.sqrt().clamp(min=SMALLEST).reciprocal()
    return {id: rows * scale[:, None] for id, rows in found.items()}


def _similarity(descriptors: Mapping[str, Tensor], target: Features, scale: Tensor) -> Tensor:
    """Products with the enlarged features. Enlarging is linear: the few maps of products are enlarged, not the many
    channels."""
    size = (scale.shape[-2], scale.shape[-1])
    total: Tensor | None = None
    for id, rows in descriptors.items():
        tensor = _exact(target[id])
        products = torch.einsum("nc,chw->nhw", rows.to(tensor), tensor)
        enlarged = _enlarged(products, size)
        total = enlarged if total is None else total + enlarged
    assert total is not None
    return total * scale


def _inverse_norms(features: Features, size: Size) -> Tensor:
    """1 / norm of the enlarged, concatenated features of every pixel: (H, W). A few channels are enlarged at a time."""
    total: Tensor | None = None
    chunk = max(1, TILE // (size[0] * size[1]))
    for tensor in features.values():
        for part in tensor.split(chunk):
            squares = _enlarged(_exact(part), size).square().sum(dim=0)
            total = squares if total is None else total + squares
    assert total is not None
    return total.sqrt().clamp(min=SMALLEST).reciprocal()


def _enlarged(maps: Tensor, size: Size) -> Tensor:
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _checked(target: Features, source: Features) -> Features:
    """The target's features, of the activations that the source has."""
    if missing := [id for id in source if id not in target] + [id for id in target if id not in source]:
        raise ValueError(f"only one of the two images has {', '.join(missing)}: both must have the same activations")
    for id, tensor in target.items():
        if tensor.ndim != 3 or tensor.shape[0] != source[id].shape[0]:
            raise ValueError(f"{id} has shapes {tuple(source[id].shape)} and {tuple(tensor.shape)}; (C, h, w) is due")
    return {id: target[id] for id in source}
