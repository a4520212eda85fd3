"""Layer-wise aggregation: how much each layer counts, by how well its self-attention agrees with a reference feature.

Equations: arXiv 2603.06178, and for the alternatives its released code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_features import LazyMap

Layers: TypeAlias = Literal["dot", "mse", "iou", "equal"]

BLOCK_ELEMENTS = 2**21
"""Affinities held at a time: 8 MiB in float32."""


def layer_weight(
    lazy: LazyMap, reference: Tensor, how: Layers = "dot", *, renormalise: bool = True, as_released: bool = False
) -> Tensor:
    """The weight of a layer, up to a factor that all layers share.

    With the reference affinity ``A_p = softmax(F Fᵀ / √C)`` over the cells of F, and ``S`` the layer's self-attention
    averaged over heads and brought to the grid of F (keys bilinear, queries nearest):

    - ``dot``: ``⟨A_p, S⟩ = Σ_ij A_p(i, j) S(i, j)``, which is positive
    - ``mse``: ``1 / Σ_i ‖A_p(i, ·) - S(i, ·)‖₂``
    - ``iou``: ``Σ min(A_p, S) / Σ max(A_p, S)``
    - ``equal``: 1

    Only blocks of rows of either are made.

    Args:
        lazy: the self-attention of the layer (image→image).
        reference: F, (B, C, h, w).
        renormalise: divide the rows of the resized ``S`` by their sums. Without, coarse layers count up to 64 times
            more: a row of 8x8 keys that sums to 1 sums to 16 on 32x32.
        as_released: what the released program computes: no renormalisation, and of F only its first channel.

    Returns:
        (B,), at least float32.

    Raises:
        ValueError: ``how`` is none of these.
    """
    if how not in ("dot", "mse", "iou", "equal"):
        raise ValueError(f"layer weights are {', '.join(Layers.__args__)}, not {how!r}")  # type: ignore[attr-defined]
    if how == "equal":
        return torch.ones(len(reference), device=reference.device)
    reference = reference[:, :1] if as_released else reference
    pairs = _row_pairs(lazy, reference.float(), renormalise and not as_released)
    if how == "dot":
        return _total((a * s).sum((1, 2)) for a, s in pairs)
    if how == "mse":
        return 1 / _total((a - s).norm(dim=-1).sum(1) for a, s in pairs).clamp(min=1e-12)
    both = _total(
        torch.stack([torch.minimum(a, s).sum((1, 2)), torch.maximum(a, s).sum((1, 2))], dim=-1) for a, s in pairs
    )
    return both[..., 0] / both[..., 1]


def _total(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def _row_pairs(lazy: LazyMap, reference: Tensor, renormalise: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of rows of ``A_p`` and of the resized ``S``, each (B, rows, h·w)."""
    batch, channels, *grid = reference.shape
    cells = reference.flatten(2)
    nearest = nearest_cells(lazy.grid, (grid[0], grid[1])).to(reference.device)
    step = max(1, BLOCK_ELEMENTS // (batch * cells.shape[-1]))
    for start in range(0, cells.shape[-1], step):
        queries = cells[:, :, start : start + step].transpose(1, 2)
        affinity = (queries @ cells / channels**0.5).softmax(dim=-1)
        found, place = nearest[start : start + step].unique(return_inverse=True)
        rows = lazy.rows(found.expand(batch, -1), head_mean=True)[:, 0].float()
        rows = F.interpolate(rows.unflatten(-1, lazy.grid), (grid[0], grid[1]), mode="bilinear").flatten(2)[:, place]
        yield affinity, rows / rows.sum(-1, keepdim=True) if renormalise else rows


def nearest_cells(grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """For each cell of the grid ``wanted``, row-major, which cell of ``grid`` is nearest: int64 (cells,)."""
    cells = torch.arange(grid[0] * grid[1], dtype=torch.float64).view(1, 1, *grid)
    return F.interpolate(cells, wanted, mode="nearest").flatten().long()
