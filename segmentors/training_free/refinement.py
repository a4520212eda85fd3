"""Spatial refinement: class maps spread along the self-attention of the model, ``S^k M``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_features import LazyMap

from .layers import KEPT_ELEMENTS, nearest_cells, resized_rows

WORTH_IT = 3
"""Refinements from which on a matrix is made: making it takes a little longer than refining once without."""


def refine(maps: Tensor, layers: Sequence[LazyMap], k: int) -> Tensor:
    """``S^k M`` with ``S = mean_l mean_h A_lh``, the self-attention of some layers (arXiv 2603.06178).

    A layer with another grid than ``M`` counts as its map resized to that grid (keys bilinear, queries nearest, rows
    not renormalised). ``mean_h A_h M`` is attention itself with ``M`` as the value, so that no map is made; only where
    ``S`` is small and of use often it is, as one mean over layers and heads.

    Args:
        maps: M, (B, n, h, w).
        layers: self-attention (image→image) of the B images; without any, ``maps`` are returned.
        k: how often; 0 returns ``maps``.

    Returns:
        (B, n, h, w), float32 or more.
    """
    if not layers or k == 0:
        return maps
    step = _by_matrix(maps, layers) if k >= WORTH_IT and _fits(maps) else _by_attention(layers)
    refined = maps
    for _ in range(k):
        refined = step(refined)
    return refined.to(torch.promote_types(maps.dtype, torch.float32))


def _fits(maps: Tensor) -> bool:
    return len(maps) * (maps.shape[-2] * maps.shape[-1]) ** 2 <= KEPT_ELEMENTS


def _by_matrix(maps: Tensor, layers: Sequence[LazyMap]) -> Callable[[Tensor], Tensor]:
    """Sums over all pixels come out nearly alike, so they are taken in float64; where there is none, on MPS, in 32."""
    grid, exact = (maps.shape[-2], maps.shape[-1]), torch.float32 if maps.device.type == "mps" else torch.float64
    matrix = resized_rows(layers[0], grid, slice(None))
    for lazy in layers[1:]:
        matrix += resized_rows(lazy, grid, slice(None))
    matrix = matrix.to(exact) / len(layers)
    return lambda maps: (maps.flatten(2).to(exact) @ matrix.mT).unflatten(-1, grid)


def _by_attention(layers: Sequence[LazyMap]) -> Callable[[Tensor], Tensor]:
    return lambda maps: torch.stack([_spread(maps, lazy) for lazy in layers]).mean(dim=0)


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
