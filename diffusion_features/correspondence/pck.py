"""The percentage of correct keypoints (PCK), in each of the ways that the field reports it.

A keypoint is correct at threshold a if it is found within a · max(height, width) pixels of its place: of the target
*image* (img), or of the box around the object there (bbox). The mean is taken over all keypoints (point), as in arXiv
2410.03558 and in Diffusion Hyperfeatures, or first within each pair and then over pairs (image), as in SPair-71k's own
evaluation. Each is a different number; the four are never mixed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .matching import Features, Locate, match, nearest
from .pairs import Pair

THRESHOLDS = (0.1, 0.05, 0.01)


@dataclass(frozen=True, eq=False)
class Measured:
    """A pair, and how far from its place each of its keypoints was found: float (N,), pixels of the target image."""

    pair: Pair
    errors: Tensor

    def correct(self, threshold: float, relative_to: str) -> Tensor:
        """Which keypoints are correct: bool (N,).

        Args:
            threshold: a share, such as 0.1.
            relative_to: ``img`` for the target image's larger side, ``bbox`` for that of the object's box there.

        Raises:
            ValueError: ``relative_to`` is neither.
        """
        if relative_to not in ("img", "bbox"):
            raise ValueError(f"PCK is relative to 'img' or 'bbox', not {relative_to!r}")
        left, top, right, bottom = self.pair.target_box
        side = max(self.pair.target_size) if relative_to == "img" else max(right - left, bottom - top)
        return self.errors <= threshold * side


def measure(pairs: Iterable[Pair], features: Callable[[Path], Features], locate: Locate = nearest) -> list[Measured]:
    """Match the keypoints of every pair.

    Args:
        pairs: what to match.
        features: the activations of an image, id -> (C, h, w), from its file. It is called twice a pair; wrap it in
            ``functools.lru_cache`` if it is slow.
        locate: ``nearest`` or ``soft_argmax``.
    """
    return [_measured(pair, features, locate) for pair in pairs]


@torch.no_grad()
def _measured(pair: Pair, features: Callable[[Path], Features], locate: Locate) -> Measured:
    found = match(
        features(pair.source), features(pair.target), torch.tensor(pair.source_points),
        source_size=pair.source_size, target_size=pair.target_size, locate=locate,
    )  # fmt: skip
    truth = torch.tensor(pair.target_points).to(found.points)
    return Measured(pair, (found.points - truth).norm(dim=1).cpu())


def summary(measured: Sequence[Measured], thresholds: Sequence[float] = THRESHOLDS) -> dict[str, dict[str, float]]:
    """PCK of all pairs, in [0, 1].

    Returns:
        ``img per point``, ``img per image``, ``bbox per point`` and ``bbox per image`` -> threshold -> PCK.

    Raises:
        ValueError: there is no pair.
    """
    if not measured:
        raise ValueError("there are no pairs to summarise")
    table: dict[str, dict[str, float]] = {}
    for relative_to in ("img", "bbox"):
        each = {a: [m.correct(a, relative_to).double() for m in measured] for a in thresholds}
        table[f"{relative_to} per point"] = {f"{a:g}": torch.cat(hits).mean().item() for a, hits in each.items()}
        table[f"{relative_to} per image"] = {
            f"{a:g}": torch.stack([hit.mean() for hit in hits]).mean().item() for a, hits in each.items()
        }
    return table
