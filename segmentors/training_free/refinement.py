"""Spatial refinement: class maps spread along the self-attention of the model, ``S^k M``, without making ``S``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_features import LazyMap

from .layers import nearest_cells


def refine(maps: Tensor, layers: Sequence[LazyMap], k: int) -> Tensor:
    """``S^k M`` with ``S = mean_l mean_h A_lh``, the self-attention of some layers (arXiv 2603.06178).

    ``mean_h A_h M`` is attention itself with ``M`` as the value, so no map is made. A layer with another grid than
    ``M`` counts as its map resized to that grid (keys bilinear, queries nearest, rows not renormalised).

    Args:
        maps: M, (B, n, h, w).
        layers: self-attention (image→image) of the B images; without any, ``maps`` are returned.
        k: how often; 0 returns ``maps``.

    Returns:
        (B, n, h, w), float32 or more.
    """
    for _ in range(k if layers else 0):
        maps = torch.stack([_spread(maps, lazy) for lazy in layers]).mean(dim=0)
    return maps


def _spread(maps: Tensor, lazy: LazyMap) -> Tensor:
    """``N S Uᵀ M``: U is the bilinear resize of keys to the grid of M, N the nearest resize of queries."""
    grid = (maps.shape[-2], maps.shape[-1])
    cells = maps if lazy.grid == grid else _bilinear_adjoint(maps, lazy.grid)
    spread = lazy.apply(cells.flatten(2).mT).mT
    if lazy.grid != grid:
        spread = spread[..., nearest_cells(lazy.grid, grid).to(spread.device)]
    return spread.unflatten(-1, grid)


def _bilinear_adjoint(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, n, h, w) → (B, n, *grid): not a resize of the maps, but the transpose of resizing ``grid`` to theirs."""
    with torch.enable_grad():
        small = torch.zeros(*maps.shape[:2], *grid, dtype=maps.dtype, device=maps.device, requires_grad=True)
        large = F.interpolate(small, maps.shape[-2:], mode="bilinear")
        return torch.autograd.grad(large, small, maps)[0]
