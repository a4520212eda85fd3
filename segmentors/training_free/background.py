"""The score of the background class (arXiv 2603.06178, and the choices of its released code)."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Background: TypeAlias = Literal["offset", "exact", "max", "average", "threshold"]


def background_score(found: Tensor, how: Background, threshold: float) -> Tensor:
    """How much each pixel is background, from ``bg``, the map of what was named as background, and a threshold θ.

    - ``offset``: ``θ + bg``
    - ``exact``: ``bg``
    - ``max``: ``max(θ, bg)``
    - ``average``: ``(θ + bg) / 2``
    - ``threshold``: ``θ``

    Args:
        found: bg, (h, w) in [0, 1]; zero if nothing was named.

    Returns:
        (h, w), clamped to [0, 1].

    Raises:
        ValueError: ``how`` is none of these.
    """
    scores = {
        "offset": threshold + found,
        "exact": found,
        "max": found.clamp(min=threshold),
        "average": (threshold + found) / 2,
        "threshold": torch.full_like(found, threshold),
    }
    if how not in scores:
        raise ValueError(f"a background is {', '.join(scores)}, not {how!r}")
    return scores[how].clamp(0, 1)
