"""Spatial refinement: class maps spread along the self-attention of the model, ``S^k M``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_features import LazyMap

from .layers import BLOCK_ELEMENTS, KEPT_ELEMENTS, nearest_cells, resized_rows

WORTH_IT = 3
"""Refinements from which on a matrix is made: making it takes as long as refining once or twice without."""


def refine(maps: Tensor, layers: Sequence[LazyMap], k: int) -> Tensor:
    """``S^k M`` with ``S = mean_l mean_h A_lh``, the self-attention of some layers (arXiv 2603.06178).

    A layer with another grid than ``M`` counts as its map resized to that grid (keys bilinear, queries nearest, rows
    not renormalised). ``mean_h A_h M`` is attention itself with ``M`` as the value, so that no map is made; only where
    ``S`` is small and of use often it is, for one image at a time, as one mean over layers and heads.

    Args:
        maps: M, (B, n, h, w).
        layers: self-attention (image→image) of the B images; without any, ``maps`` are returned.
        k: how often; 0 returns ``maps``.

    Returns:
        (B, n, h, w), float32 or more.
    """
    if not layers or k == 0:
        return maps
    if k >= WORTH_IT and _small(maps, layers):
        each = [_by_matrix(maps[i : i + 1], [lazy.of(i) for lazy in layers], k) for i in range(len(maps))]
        return torch.cat(each).to(torch.promote_types(maps.dtype, torch.float32))
    for _ in range(k):
        maps = torch.stack([_spread(maps, lazy) for lazy in layers]).mean(dim=0)
    return maps


def _small(maps: Tensor, layers: Sequence[LazyMap]) -> bool:
    """Whether the matrix, and each layer's map that it is made of, may be held."""
    cells = max(maps.shape[-2] * maps.shape[-1], *(lazy.grid[0] * lazy.grid[1] for lazy in layers))
    return cells**2 <= KEPT_ELEMENTS


def _by_matrix(maps: Tensor, layers: Sequence[LazyMap], k: int) -> Tensor:
    """Sums over all pixels come out nearly alike, so they are taken in float64 on devices sure to have it."""
    grid, cells = (maps.shape[-2], maps.shape[-1]), maps.shape[-2] * maps.shape[-1]
    exact = torch.float64 if maps.device.type in ("cpu", "cuda") else torch.float32
    matrix = torch.zeros(1, cells, cells, dtype=exact, device=maps.device)
    step = max(1, BLOCK_ELEMENTS // cells)
    for part in (slice(start, start + step) for start in range(0, cells, step)):
        for lazy in layers:
            matrix[:, part] += resized_rows(lazy, grid, part) / len(layers)
    spread = maps.flatten(2).to(exact)
    for _ in range(k):
        spread = spread @ matrix.mT
    return spread.unflatten(-1, grid)


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
    with torch.inference_mode(False), torch.enable_grad():
        maps = maps.clone() if maps.is_inference() else maps  # autograd keeps nothing that was made in inference mode
        small = torch.zeros(*maps.shape[:2], *grid, dtype=maps.dtype, device=maps.device, requires_grad=True)
        large = F.interpolate(small, maps.shape[-2:], mode="bilinear")
        return torch.autograd.grad(large, small, maps)[0]
