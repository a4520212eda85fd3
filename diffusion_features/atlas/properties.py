"""Three numbers about one activation of one image, for the three properties of arXiv 2410.03558, section 4.

The paper shows the properties in pictures and filters by eye. The definitions here are this project's: each is 0 or 1
at a known extreme.

An activation is measured on one image under S draws of the noise, x (S, C, h, w). What all draws share is signal, what
they differ in is noise: with the mean over draws m and the variance over draws (divisor S - 1) averaged over channels
and cells v, the mean square of anything linear in the signal, L, is estimated without bias by mean((L m)²) - v_L / S.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

CELLS = 256
"""Cells whose similarities are compared, drawn at random where there are more."""


class Properties(NamedTuple):
    """What one activation is like.

    noise: the share of its variance that comes from the drawn noise and not from the image, 0 to 1 (property 1).
    frequency: the root mean square spatial frequency of its signal, in cycles per cell of its own grid, 0 to about 0.7;
        white noise has 0.35 (property 2). A direction that a grid of one row or column does not have counts nothing.
    locality: how much of the variance of the cosine similarity of two cells is explained by their distance alone, 0 to
        1; near 0, and possibly below, where distance says nothing (property 3).
    """

    noise: float
    frequency: float
    locality: float


def properties(x: Tensor, seed: int = 0) -> Properties:
    """Measure one activation of one image.

    Args:
        x: (S, C, h, w), the same image under S >= 2 draws of the noise, of any float dtype.
        seed: of the choice of cells where there are many.

    Raises:
        ValueError: another shape, a single draw or cell, or values that are not finite.
    """
    if x.ndim != 4 or len(x) < 2 or x.shape[-2] * x.shape[-1] < 2:
        raise ValueError(f"an activation must have shape (S, C, h, w), S >= 2, not {tuple(x.shape)}")
    exact = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if not torch.isfinite(exact).all():
        raise ValueError("the activation has values that are not finite")
    centred = exact - exact.mean(dim=(-2, -1), keepdim=True)
    mean = centred.mean(dim=0)
    signal, within = _signal(centred), _within(centred)
    noise = within / (signal + within) if signal + within > 0 else 0.0
    cells = _some_cells(mean.flatten(1).T, seed)
    return Properties(noise, _frequency(centred, signal), _locality(mean, cells))


def _within(x: Tensor) -> float:
    """Mean variance over draws."""
    return x.var(dim=0).mean().item()


def _signal(x: Tensor) -> float:
    """Mean square of what the draws share, without the noise's part in their mean; not below zero."""
    return max(0.0, x.mean(dim=0).square().mean().item() - _within(x) / len(x))


def _frequency(x: Tensor, signal: float) -> float:
    """From the mean square d² of the differences of neighbours: a wave of f cycles a cell has d² / variance =
    4 sin²(πf), so f = asin(d / 2σ) / π along each axis, and both together √(f_x² + f_y²)."""
    squares = 0.0
    for axis in (-2, -1):
        if x.shape[axis] > 1 and signal > 0:
            ratio = _signal(x.diff(dim=axis)) / signal
            squares += (math.asin(min(1.0, math.sqrt(ratio) / 2)) / math.pi) ** 2
    return math.sqrt(squares)


def _some_cells(cells: Tensor, seed: int) -> Tensor:
    """Numbers of the cells to compare, in order: int64, at most ``CELLS``."""
    if len(cells) <= CELLS:
        return torch.arange(len(cells))
    return torch.randperm(len(cells), generator=torch.Generator().manual_seed(seed))[:CELLS].sort().values


def _locality(mean: Tensor, cells: Tensor) -> float:
    """Epsilon squared of an analysis of variance of similarities, grouped by distance rounded to whole cells:
    (SSB - (k - 1) MSW) / SST, which is free of the bias that k groups would give it."""
    width = mean.shape[-1]
    vectors = torch.nn.functional.normalize(mean.flatten(1).T[cells.to(mean.device)].cpu().double(), dim=1)
    first, second = torch.triu_indices(len(cells), len(cells), offset=1).unbind(0)
    similarities = (vectors @ vectors.T)[first, second]
    rows, columns = (cells // width).double(), (cells % width).double()
    distance = torch.hypot(rows[first] - rows[second], columns[first] - columns[second]).round().long()
    groups, counts = distance.unique(return_inverse=True, return_counts=True)[1:]
    total = (similarities - similarities.mean()).square().sum()
    means = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, groups, similarities) / counts
    inside = (similarities - means[groups]).square().sum()
    free = len(similarities) - len(counts)
    if total <= 0 or free < 1:
        return 0.0
    return ((total - inside - (len(counts) - 1) * inside / free) / total).item()
