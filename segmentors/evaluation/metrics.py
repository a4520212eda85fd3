"""Intersection over union of classes, accuracy and boundary IoU, with intervals over images."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BAND = 0.02
"""Width of the boundary band as a share of the image's diagonal (arXiv 2103.16562)."""
DRAWS = 1000


def count(predicted: Tensor, truth: Tensor, classes: int, ignore: int | None = None) -> Tensor:
    """What one image adds to the figures.

    The boundary of a class is those of its pixels that are within ``d`` of another class or of the border of the image
    (in the larger of both axes), with ``d`` 2% of the image's diagonal and at least 1: "Boundary IoU" (arXiv
    2103.16562), equation 2.

    Args:
        predicted, truth: labels (H, W) of any integer dtype.
        ignore: a value of ``truth`` whose pixels do not count.

    Returns:
        int64 (5, classes): pixels that are right, that are of the class in truth, that are predicted as it; and of the
        boundaries, pixels of both and of either.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"labels {tuple(predicted.shape)} were predicted for a truth of {tuple(truth.shape)}")
    predicted, truth = predicted.long(), truth.long()
    counted = torch.ones_like(truth, dtype=torch.bool) if ignore is None else truth != ignore
    if ((truth < 0) | (truth >= classes))[counted].any():
        raise ValueError(f"the truth has labels beyond its {classes} classes")
    if ((predicted < 0) | (predicted >= classes))[counted].any():
        raise ValueError(f"labels beyond the {classes} classes were predicted")
    right = (predicted == truth) & counted
    found = torch.zeros(5, classes, dtype=torch.int64)
    for row, pixels in enumerate((truth[right], truth[counted], predicted[counted])):
        found[row] = torch.bincount(pixels.flatten().cpu(), minlength=classes)
    there = ((found[1] + found[2]) > 0).nonzero()[:, 0]
    if len(there):
        names = there.to(truth.device)[:, None, None]
        mine = _boundary((predicted == names) & counted)
        theirs = _boundary((truth == names) & counted)
        found[3, there] = (mine & theirs).sum((1, 2)).cpu()
        found[4, there] = (mine | theirs).sum((1, 2)).cpu()
    return found


def _boundary(masks: Tensor) -> Tensor:
    """Pixels of masks (n, H, W) within ``d`` of what is outside of them."""
    d = max(1, round(BAND * math.hypot(*masks.shape[-2:])))
    outside = F.pad((~masks).float()[:, None], (d, d, d, d), value=1.0)
    near = F.max_pool2d(F.max_pool2d(outside, (2 * d + 1, 1), 1), (1, 2 * d + 1), 1)[:, 0]
    return masks & (near > 0)


def scores(counts: Tensor, *, absent_is_zero: bool = False, seed: int = 0) -> dict[str, Any]:
    """The figures of a data set.

    Args:
        counts: (N, 5, K), of each image, see ``count``.
        absent_is_zero: whether a class that neither truth nor prediction has counts as an IoU of 0. Otherwise it is
            left out of the means.
        seed: of the resampling.

    Returns:
        ``miou``, and ``miou_interval``, its 95% interval when images are drawn anew with replacement (percentile
        bootstrap, 1000 draws); ``accuracy``, the share of pixels that are right; ``boundary_iou``, mean over classes;
        ``iou``, of each class, NaN where it is undefined. All of pixels added up over the images.
    """
    total = counts.double().sum(0)
    each = _iou(total[:3])
    boundary = torch.where(total[4] > 0, total[3] / total[4], torch.nan)
    drawn = resampled(counts, absent_is_zero=absent_is_zero, seed=seed)
    low, high = drawn.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {
        "miou": _mean(each, absent_is_zero).item(),
        "miou_interval": [low, high],
        "accuracy": (total[0].sum() / total[1].sum()).item(),
        "boundary_iou": _mean(boundary, absent_is_zero).item(),
        "iou": each.tolist(),
    }


def resampled(counts: Tensor, *, absent_is_zero: bool = False, seed: int = 0) -> Tensor:
    """The mean IoU when images are drawn anew with replacement, 1000 times: float64 (1000,).

    The draws depend on the seed and the number of images alone, so those of two methods on the same images are paired.
    """
    # scipy's bootstrap would gather a copy of the counts for each draw; here their sums are one product of matrices.
    images = len(counts)
    drawn = torch.randint(images, (DRAWS, images), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(DRAWS, images, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    totals = (weights @ counts[:, :3].double().flatten(1)).unflatten(1, (3, -1))
    return _mean(_iou(totals), absent_is_zero)


def _iou(total: Tensor) -> Tensor:
    """(..., 3, K) → (..., K)."""
    right, truth, predicted = total.unbind(-2)
    union = truth + predicted - right
    return torch.where(union > 0, right / union, torch.nan)


def _mean(each: Tensor, absent_is_zero: bool) -> Tensor:
    return each.nan_to_num().mean(-1) if absent_is_zero else each.nanmean(-1)
