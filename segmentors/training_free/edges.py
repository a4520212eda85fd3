"""Labels that end where things in the image end, by the colours of its pixels."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from .crf import dense_crf
from .pamr import pamr

Edges: TypeAlias = Literal["none", "pamr", "crf"]

WAYS = {"pamr": pamr, "crf": dense_crf}


def to_edges(scores: Tensor, image: Tensor, how: Edges) -> Tensor:
    """Scores at the size of an image, after ``pamr`` or ``dense_crf``; with ``none`` as they are.

    Args:
        scores: (K, h, w) in [0, 1], of all classes, the background among them.
        image: (3, H, W) in [-1, 1].

    Returns:
        (K, H, W) in [0, 1]; with ``none`` (K, h, w).

    Raises:
        ValueError: ``how`` is none of these.
        ImportError: a CRF, and pydensecrf is not installed.
    """
    if how == "none":
        return scores
    if how not in WAYS:
        raise ValueError(f"edges are none, {', '.join(WAYS)}, not {how!r}")
    large = F.interpolate(scores[None], image.shape[-2:], mode="bilinear")[0]
    return WAYS[how](large, image.to(large))
