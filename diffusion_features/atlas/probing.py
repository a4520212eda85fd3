"""A quick linear probe of many activations at once: ridge regression from streamed sums, closed form, no epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import Picture

if TYPE_CHECKING:
    from ..extractor import FeatureExtractor

RIDGE = 0.01
"""Added to the diagonal of the correlation matrix of the channels."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """An image, its prompt, and its label map: uint8 (H, W); 255 counts nowhere."""

    image: Picture
    labels: np.ndarray
    prompt: str = ""


class Ridge:
    """Regression of the share that each class has of a cell on the cell's channels.

    Only sums are kept: Σ x xᵀ, Σ x yᵀ, Σ x and Σ y, so that any number of images may be added.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.xx, self.xy, self.x, self.y = (torch.zeros(()) for _ in range(4))

    def add(self, cells: Tensor, shares: Tensor) -> None:
        """Rows of channels (n, C) and of class shares (n, K); cells without any labelled pixel are left out."""
        known = shares.sum(dim=1) > 0
        x, y = cells[known].double(), shares[known].double()
        self.count += len(x)
        self.xx, self.xy = self.xx + x.T @ x, self.xy + x.T @ y
        self.x, self.y = self.x + x.sum(dim=0), self.y + y.sum(dim=0)

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weights (C, K) and bias (K,) for channels as they come; ridge is on channels of variance 1."""
        if self.count == 0:
            raise ValueError("nothing was added: no cell of the training images has a label")
        x, y = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - torch.outer(x, x)
        scale = covariance.diagonal().clamp(min=0).sqrt()
        scale = torch.where(scale > scale.amax() * 1e-6, scale.clamp(min=1e-30).reciprocal(), 0.0)
        correlation = covariance * scale[:, None] * scale
        cross = (self.xy / self.count - torch.outer(x, y)) * scale[:, None]
        regular = correlation + RIDGE * torch.eye(len(x), dtype=x.dtype, device=x.device)
        weights = scale[:, None] * torch.linalg.solve(regular, cross)
        return weights, y - x @ weights


def probe(
    fx: FeatureExtractor,
    train: Sequence[Labelled],
    test: Sequence[Labelled],
    ids: Sequence[str],
    *,
    t: int = 50,
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
    done: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """How well a linear classifier of single cells labels other images, for each activation; one forward an image.

    Returns:
        id -> mean intersection over union, over the classes that truth or prediction has, of all test pixels together.
        Class scores are enlarged bilinearly to the pixels before the highest is taken.

    Raises:
        ValueError: there is nothing to train or to test on.
    """
    if not train or not test:
        raise ValueError(f"a probe needs images to train and to test on, not {len(train)} and {len(test)}")
    classes = 1 + max(int(found.labels[found.labels != 255].max(initial=0)) for found in [*train, *test])
    fits = {id: Ridge() for id in ids}

    def learn(found: Labelled, number: int) -> None:
        shares = _one_hot(found.labels, classes)

        def add(id: str, x: Tensor) -> None:
            pooled = F.adaptive_avg_pool2d(shares.to(x.device), (x.shape[-2], x.shape[-1]))
            fits[id].add(x[0].flatten(1).T, pooled.flatten(1).T)

        fx.stream(found.image, add, found.prompt, t=t, seed=seed + number, activations=list(ids), size=size)
        done()

    for number, found in enumerate(train):
        learn(found, number)
    solved = {id: fit.solve() for id, fit in fits.items()}
    confusions = {id: np.zeros((classes, classes), np.int64) for id in ids}

    def judge(found: Labelled, number: int) -> None:
        def label(id: str, x: Tensor) -> None:
            weights, bias = (value.to(x.device) for value in solved[id])
            scores = torch.einsum("chw,ck->khw", x[0].double(), weights) + bias[:, None, None]
            large = F.interpolate(scores[None], found.labels.shape, mode="bilinear", align_corners=False)[0]
            confusions[id] += confusion_matrix(found.labels, large.argmax(dim=0).cpu().numpy(), classes)

        fx.stream(found.image, label, found.prompt, t=t, seed=seed + number, activations=list(ids), size=size)
        done()

    for number, found in enumerate(test, start=len(train)):
        judge(found, number)
    return {id: mean_iou(confusion) for id, confusion in confusions.items()}


def mean_iou(confusion: np.ndarray) -> float:
    """Mean intersection over union of a confusion matrix (truth, prediction), over classes that either has."""
    hit = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hit
    return float((hit[union > 0] / union[union > 0]).mean())


def _one_hot(labels: np.ndarray, classes: int) -> Tensor:
    """float32 (K, H, W), all zero where there is no label."""
    return torch.from_numpy((labels[None] == np.arange(classes)[:, None, None]).astype(np.float32))


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Pixels by truth and prediction, int64 (classes, classes); those whose truth is 255 are left out."""
    known = truth != 255
    pairs = truth[known].astype(np.int64) * classes + predicted[known]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
