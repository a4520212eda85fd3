"""What frozen features of the drawn world are worth: a linear probe, nearest neighbours, and matched keypoints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_features.correspondence import Pair, measure
from diffusion_features.embedded import CLASSES
from diffusion_features.suppression.amalgamate import WeightAssigner, assigner_loss

RIDGE, NEIGHBOURS, KNOWN, THRESHOLD = 1.0, 5, 8192, 0.1


def probe(train: Tensor, train_labels: Tensor, test: Tensor, labels: Tensor) -> Tensor:
    """Counts of labels that a ridge regression on the cells of the training scenes gives the test scenes.

    Args:
        train, test: features (B, C, h, w).
        train_labels, labels: (B, H, W).

    Returns:
        (B, 3, classes): pixels that are right, there, and predicted.
    """
    x, y = _cells(train), _label_of_cells(train_labels, train)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    gram = x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, x.T @ F.one_hot(y, len(CLASSES)).to(x))
    seen = _cells(test)
    return _counts(seen @ weights[:-1] + weights[-1], test, labels)


def neighbours(train: Tensor, train_labels: Tensor, test: Tensor, labels: Tensor) -> Tensor:
    """Counts as of ``probe``, of the vote of the nearest cells of the training scenes, by cosine.

    Of the training scenes' cells, so many are drawn, always the same ones: ``KNOWN``.
    """
    x, y = F.normalize(_cells(train)).float(), _label_of_cells(train_labels, train)
    drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:KNOWN]
    x, y = x[drawn], y[drawn]
    votes = [F.one_hot(y[(rows @ x.T).topk(NEIGHBOURS, dim=1).indices], len(CLASSES)).double().sum(1)
             for rows in F.normalize(_cells(test)).float().split(4096)]  # fmt: skip
    return _counts(torch.cat(votes), test, labels)


def keypoints(feature: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """Of each pair: how many keypoints were found within a tenth of the object's box, (pairs,).

    Args:
        feature: (B, C, h, w) of the scenes of a split from its first on, to which the files of the pairs belong.
    """
    measured = measure(pairs, lambda path: {"feature": feature[int(path.stem)]})
    return torch.tensor([int(m.correct(THRESHOLD, "bbox").sum()) for m in measured], dtype=torch.float64)


def mixture(
    train: Sequence[Tensor], labels: Tensor, test: Sequence[Tensor], steps: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The learned mixture of variants of a feature (arXiv 2410.06719), trained with a linear head on the cells.

    Args:
        train, test: the variants, each (B, C, h, w), of the training scenes and of others.
        labels: (B, H, W) of the training scenes.
        steps: of Adam, eight scenes each.

    Returns:
        The mixtures, (B, 2 C, h, w), of both.
    """
    channels = train[0].shape[1]
    targets = _label_of_cells(labels, train[0]).reshape(len(labels), *train[0].shape[-2:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        assigner = WeightAssigner(channels, assigners=2)
        head = nn.Sequential(nn.GroupNorm(1, 2 * channels), nn.Conv2d(2 * channels, len(CLASSES), 1))
        optimizer = torch.optim.Adam([*assigner.parameters(), *head.parameters()], 1e-3)
        for _ in range(steps):
            chosen = torch.randint(len(labels), (8,))
            mixed, weights = assigner([variant[chosen] for variant in train])
            loss = F.cross_entropy(head(mixed), targets[chosen]) + assigner_loss(weights, 1e-3, 1e-3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assigner.eval()
    with torch.no_grad():
        return assigner(train)[0], assigner(test)[0]


def _cells(feature: Tensor) -> Tensor:
    """float64 (cells, C), each with mean 0 and variance 1."""
    rows = feature.permute(0, 2, 3, 1).flatten(0, 2).double()
    return F.layer_norm(rows, rows.shape[1:])


def _label_of_cells(labels: Tensor, feature: Tensor) -> Tensor:
    """The most frequent label of each cell, (cells,)."""
    votes = F.one_hot(labels, len(CLASSES)).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(votes, feature.shape[-2:]).argmax(1).flatten()


def _counts(scores: Tensor, feature: Tensor, labels: Tensor) -> Tensor:
    grid = scores.reshape(len(feature), *feature.shape[-2:], -1).permute(0, 3, 1, 2)
    found = F.interpolate(grid, labels.shape[-2:], mode="bilinear", align_corners=False).argmax(1)
    of_scenes = [(a[a == b], b, a) for a, b in zip(found, labels, strict=True)]
    return torch.stack([
        torch.stack([torch.bincount(pixels.flatten(), minlength=len(CLASSES)) for pixels in one]) for one in of_scenes
    ]).double()  # fmt: skip
