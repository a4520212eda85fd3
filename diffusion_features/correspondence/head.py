"""A light trained aggregation of several activations, for correspondence (arXiv 2410.03558, appendix C)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .matching import Features
from .pairs import Pair

TEMPERATURE = 0.07
"""Of the contrastive loss, fixed, as in the paper."""
LEARNING_RATE, WEIGHT_DECAY = 5e-4, 0.01


class AggregationHead(nn.Module):
    """One 3 x 3 convolution without bias over all activations, each enlarged bilinearly to one grid.

    >>> head = AggregationHead(channels=3520)
    >>> matches = match(head(source), head(target), points, ...)
    """

    def __init__(self, channels: int, width: int | None = None, grid: tuple[int, int] = (128, 128)) -> None:
        """
        Args:
            channels: of all activations together.
            width: channels of the result; by default as many, as the paper has it for one model. Half as many is what
                it uses for several models.
            grid: cells of the result, (height, width).
        """
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(channels, width or channels, 3, padding=1, bias=False)

    def forward(self, features: Features) -> dict[str, Tensor]:
        """id -> (C, h, w) of one image, always in the same order -> ``{"aggregated": (width, *grid)}``.

        Raises:
            ValueError: the activations have other channels together.
        """
        enlarged = [
            F.interpolate(tensor[None].to(self.conv.weight), self.grid, mode="bilinear", align_corners=False)
            for tensor in features.values()
        ]
        channels = sum(tensor.shape[1] for tensor in enlarged)
        if channels != self.conv.in_channels:
            raise ValueError(
                f"the activations have {channels} channels together; this head is for {self.conv.in_channels}"
            )
        return {"aggregated": self.conv(torch.cat(enlarged, dim=1))[0]}


def contrastive_loss(source: Tensor, target: Tensor, pair: Pair) -> Tensor:
    """Symmetric cross-entropy: each keypoint of an image must find its own cell among all cells of the other.

    The logits are cosine similarities / 0.07. The paper makes them for all pairs of cells, 16384 x 16384; only the
    rows of keypoints enter the loss, so only these are made.

    Args:
        source, target: (C, h, w) of the two images.
        pair: their keypoints.

    Returns:
        A scalar: the mean of both directions.
    """
    here = _cells(pair.source_points, pair.source_size, source)
    there = _cells(pair.target_points, pair.target_size, target)
    a, b = (F.normalize(tensor.flatten(1), dim=0) for tensor in (source, target))
    forth = F.cross_entropy(a[:, here].T @ b / TEMPERATURE, there)
    back = F.cross_entropy(b[:, there].T @ a / TEMPERATURE, here)
    return (forth + back) / 2


def _cells(points: Sequence[tuple[float, float]], size: tuple[int, int], tensor: Tensor) -> Tensor:
    """Row-major numbers of the cells that points lie in: int64 (N,)."""
    height, width = tensor.shape[-2:]
    cells = torch.tensor(points, dtype=torch.float64) / torch.tensor([size[1], size[0]]) * torch.tensor([width, height])
    columns, rows = cells.long().unbind(1)
    return (rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)).to(tensor.device)


def train_head(
    head: AggregationHead, pairs: Sequence[Pair], features: Callable[[Path], Features], steps: int, seed: int = 0
) -> list[float]:
    """Train a head in place, one random pair a step, by AdamW with the paper's settings.

    Args:
        head: on the device where it is to be trained.
        pairs: to train on; gone through in a new random order each time.
        features: the activations of an image, from its file.
        steps: how many; the paper takes 10,000.
        seed: of the order.

    Returns:
        The loss of each step.

    Raises:
        ValueError: there are no pairs.
    """
    if not pairs:
        raise ValueError("there are no pairs to train on")
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    losses = []
    for _, pair in zip(range(steps), _shuffled(pairs, seed), strict=False):
        source, target = (head(features(path))["aggregated"] for path in (pair.source, pair.target))
        loss = contrastive_loss(source, target, pair)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _shuffled(pairs: Sequence[Pair], seed: int) -> Iterator[Pair]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist())
