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
"""Affinities made at a time: 8 MiB in float32."""
KEPT_ELEMENTS = 2**24
"""Numbers in a matrix from cells to cells that may be kept: those of a grid of 64x64, 64 MiB in float32."""


class Affinity:
    """``A_p = softmax(F Fᵀ / √C)``: how much each cell of a feature resembles each other one.

    Made once for all layers where the grid is small; else a block of rows is made anew whenever it is needed.
    """

    def __init__(self, reference: Tensor) -> None:
        """
        Args:
            reference: F, (B, C, h, w).
        """
        self.batch, _, *grid = reference.shape
        self.grid = (grid[0], grid[1])
        self.cells = grid[0] * grid[1]
        self.kept = self.batch * self.cells**2 <= KEPT_ELEMENTS
        self._held = _affinity(reference, slice(None)) if self.kept else reference

    def rows(self, part: slice) -> Tensor:
        """Float32 (B, rows, h·w), each row summing to 1."""
        return self._held[:, part] if self.kept else _affinity(self._held, part)


def _affinity(reference: Tensor, part: slice) -> Tensor:
    cells = reference.float().flatten(2)
    return (cells[:, :, part].mT / cells.shape[1] ** 0.5 @ cells).softmax(dim=-1)


def layer_weight(lazy: LazyMap, affinity: Affinity, how: Layers = "dot", *, renormalise: bool = True) -> Tensor:
    """The weight of a layer, up to a factor that all layers share.

    With the affinity ``A_p`` of a reference feature, and ``S`` the layer's self-attention averaged over heads and
    brought to the grid of that feature (keys bilinear, queries nearest):

    - ``dot``: ``⟨A_p, S⟩ = Σ_ij A_p(i, j) S(i, j)``, which is positive
    - ``mse``: ``1 / Σ_i ‖A_p(i, ·) - S(i, ·)‖₂``
    - ``iou``: ``Σ min(A_p, S) / Σ max(A_p, S)``
    - ``equal``: 1

    Only blocks of rows of ``S`` are made.

    Args:
        lazy: the self-attention of the layer (image→image).
        affinity: ``A_p``. The released program takes that of the reference's first channel alone.
        renormalise: divide the rows of the resized ``S`` by their sums. Without, as the released program has it, coarse
            layers count up to 64 times more: a row of 8x8 keys that sums to 1 sums to 16 on 32x32.

    Returns:
        (B,), at least float32.

    Raises:
        ValueError: ``how`` is none of these.
    """
    if how not in ("dot", "mse", "iou", "equal"):
        raise ValueError(f"layer weights are {', '.join(Layers.__args__)}, not {how!r}")  # type: ignore[attr-defined]
    if how == "equal":
        return torch.ones(affinity.batch, device=lazy.query.device)
    pairs = _row_pairs(lazy, affinity, renormalise)
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


def _row_pairs(lazy: LazyMap, affinity: Affinity, renormalise: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of rows of ``A_p`` and of the resized ``S``, each (B, rows, h·w)."""
    step = max(1, BLOCK_ELEMENTS // (affinity.batch * affinity.cells))
    for start in range(0, affinity.cells, step):
        part = slice(start, start + step)
        rows = resized_rows(lazy, affinity.grid, part)
        yield affinity.rows(part), rows / rows.sum(-1, keepdim=True) if renormalise else rows


def resized_rows(lazy: LazyMap, grid: tuple[int, int], part: slice) -> Tensor:
    """Rows of ``mean_h A_h`` resized to a grid, keys bilinear and queries nearest: float32 or more (B, rows, h·w)."""
    if lazy.grid == grid:
        return _exact(lazy.rows(part, head_mean=True)[:, 0])
    found, place = nearest_cells(lazy.grid, grid)[part].to(lazy.query.device).unique(return_inverse=True)
    rows = _exact(lazy.rows(found.expand(len(lazy.query), -1), head_mean=True)[:, 0])
    return F.interpolate(rows.unflatten(-1, lazy.grid), grid, mode="bilinear").flatten(2)[:, place]


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def nearest_cells(grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """For each cell of the grid ``wanted``, row-major, which cell of ``grid`` is nearest: int64 (cells,)."""
    cells = torch.arange(grid[0] * grid[1], dtype=torch.float64).view(1, 1, *grid)
    return F.interpolate(cells, wanted, mode="nearest").flatten().long()
