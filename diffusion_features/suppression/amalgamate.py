"""Several variants of features into one: side by side, their mean, or a mixture whose weights are learnt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Features = Mapping[str, Tensor]


def concatenated(variants: Sequence[Features]) -> dict[str, Tensor]:
    """id → the variants of that feature side by side, (B, C1 + C2 + ..., h, w).

    Raises:
        ValueError: there are none, or they have other ids, or sizes.
    """
    return _merged(variants, lambda tensors: torch.cat(tensors, dim=1))


def averaged(variants: Sequence[Features]) -> dict[str, Tensor]:
    """id → the mean of the variants of that feature, (B, C, h, w).

    Raises:
        ValueError: there are none, or they have other ids, or shapes.
    """
    return _merged(variants, lambda tensors: torch.stack(tensors).mean(0))


def _merged(variants: Sequence[Features], merge: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
    if not variants:
        raise ValueError("there are no variants to amalgamate")
    first = variants[0]
    for other in variants[1:]:
        if other.keys() != first.keys():
            differing = ", ".join(sorted(first.keys() ^ other.keys())[:3])
            raise ValueError(f"the variants have different features: not all of them have {differing}")
    for id in first:
        shapes = {tuple(v[id].shape) for v in variants}
        if len(shapes) > 1:
            raise ValueError(f"the variants of {id} have different shapes: {sorted(shapes)}")
    return {id: merge([v[id] for v in variants]) for id in first}


class WeightAssigner(nn.Module):
    """Mixes variants of a feature by weights that are learnt with the task (arXiv 2410.06719, amalgamation).

    ``out = Concat_j Σ_i w_i^j r_i`` over assigners j, where ``w^j = softmax_i f_j(r_i)``, for each channel by itself.
    f_j is a 3x3 convolution to ``hidden`` channels, ReLU, batch norm, dropout, the mean over cells, and a linear layer
    back to C channels; ``per_cell`` leaves the mean away and uses 1x1 convolutions, so that each cell has weights of
    its own, as each pixel of a pixel classifier has.

    >>> assigner = WeightAssigner(channels=1280, assigners=2)
    >>> mixed, weights = assigner([base, prompt, canny])  # each (B, 1280, h, w); mixed is (B, 2560, h, w)
    >>> loss = task(head(mixed)) + assigner_loss(weights, sparsity=1e-3, diversity=1e-3)

    Args:
        channels: C of the variants.
        assigners: n, how many mixtures to put side by side; the paper's best is below 3.
        hidden: channels of the hidden layer.
        dropout: share of hidden channels left out in training.
        per_cell: weights of each cell by itself; features may then be (N, C) as well, one row a pixel.
    """

    def __init__(
        self, channels: int, assigners: int = 2, *, hidden: int = 128, dropout: float = 0.1, per_cell: bool = False
    ) -> None:
        super().__init__()
        if channels < 1 or assigners < 1:
            raise ValueError(f"channels and assigners must be at least 1, not {channels} and {assigners}")
        self.channels, self.per_cell = channels, per_cell
        kernel = 1 if per_cell else 3
        self.assigners = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, hidden, kernel, padding=kernel // 2),
                nn.ReLU(),
                nn.BatchNorm2d(hidden),
                nn.Dropout(dropout),
                nn.Identity() if per_cell else nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(hidden, channels, 1),  # the linear layer, at each cell that is left
            )
            for _ in range(assigners)
        )

    def weights(self, variants: Sequence[Tensor]) -> Tensor:
        """What each variant counts: (B, n, b, C, 1, 1), or (B, n, b, C, h, w) with ``per_cell``; sums to 1 over b.

        Args:
            variants: b tensors (B, C, h, w), or (N, C) with ``per_cell``.

        Raises:
            ValueError: they are none, or of another shape.
        """
        grids = self._grids(variants)
        together = torch.cat(grids)  # one batch, or the batch norm would hide from f_j how the variants differ
        logits = [torch.stack(assigner(together).chunk(len(grids)), dim=1) for assigner in self.assigners]
        return torch.stack(logits, dim=1).softmax(dim=2)

    def forward(self, variants: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The mixtures side by side, (B, n·C, h, w) or (N, n·C); and the ``weights``."""
        weights = self.weights(variants)
        mixed = (weights * torch.stack(self._grids(variants), dim=1)[:, None]).sum(dim=2).flatten(1, 2)
        return (mixed[..., 0, 0] if variants[0].ndim == 2 else mixed), weights

    def _grids(self, variants: Sequence[Tensor]) -> list[Tensor]:
        """The variants as (B, C, h, w); rows of pixels as grids of one cell."""
        shapes = {tuple(v.shape) for v in variants}
        allowed = (2, 4) if self.per_cell else (4,)
        if len(shapes) != 1 or len(shape := next(iter(shapes))) not in allowed or shape[1] != self.channels:
            wanted = f"(B, {self.channels}, h, w)" + (f" or (N, {self.channels})" if self.per_cell else "")
            raise ValueError(f"variants must all have the same shape {wanted}, not {sorted(shapes)}")
        return [v[..., None, None] if v.ndim == 2 else v for v in variants]


def assigner_loss(weights: Tensor, sparsity: float, diversity: float) -> Tensor:
    """What is added to the loss of the task (arXiv 2410.06719, amalgamation):

    ``- γ1 Σ_j ‖w^j‖₂ - (γ2 / 2) Σ_j Σ_{k≠j} ‖w^j - w^k‖₂``

    The norms run over the b variants and are averaged over images, channels and cells. A weight vector that sums to 1
    is longest when one variant has it all, hence sparsity; assigners that differ give diversity.

    Args:
        weights: of a ``WeightAssigner``, (B, n, b, C, ...).
        sparsity, diversity: γ1 and γ2.

    Returns:
        A scalar.
    """
    assigners = weights.unbind(dim=1)
    sparse = sum((_norm(w) for w in assigners), start=weights.new_zeros(()))
    apart = sum(
        (_norm(w - v) for j, w in enumerate(assigners) for k, v in enumerate(assigners) if j != k),
        start=weights.new_zeros(()),
    )
    return -sparsity * sparse - diversity / 2 * apart


def _norm(vectors: Tensor) -> Tensor:
    """Mean length of vectors along dimension 1; its gradient is zero, not undefined, where one is zero."""
    squares = vectors.square().sum(dim=1)
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0).mean()
