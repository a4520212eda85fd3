"""Pixel-adaptive mask refinement (PAMR): scores spread to neighbouring pixels of like colour.

"Single-Stage Semantic Segmentation from Image Labels", Araslanov and Roth, CVPR 2020 (arXiv 2005.08104), section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

DILATIONS = (1, 2, 4, 8, 12, 24)
ITERATIONS = 10
SHARPNESS = 0.1
"""What σ is multiplied by in the program of the paper's authors. The paper writes σ², for which the scale of the
intensities would matter."""


def pamr(scores: Tensor, image: Tensor) -> Tensor:
    """``m_t(p) = Σ_{q in N(p)} α(p, q) m_{t-1}(q)``, ten times.

    ``N(p)`` are the 8 neighbours of p at each of the distances 1, 2, 4, 8, 12 and 24 (the border is repeated beyond the
    image), and with the standard deviation ``σ_c(p)`` of channel c over them and p itself,
    ``α(p, ·) = softmax_q(mean_c -|I_c(p) - I_c(q)| / (0.1 σ_c(p)))``.

    Args:
        scores: m_0, (K, H, W).
        image: I, (C, H, W) in any scale.

    Returns:
        (K, H, W), within the range of ``scores``.
    """
    affinity = _affinity(image.to(scores))
    for _ in range(ITERATIONS):
        spread = torch.zeros_like(scores)
        for weight, neighbour in zip(affinity, _neighbours(scores), strict=True):
            spread.addcmul_(weight[None], neighbour)
        scores = spread
    return scores


def _affinity(image: Tensor) -> Tensor:
    """α of each neighbour: (neighbours, H, W)."""
    count = 9 * len(DILATIONS)  # at each distance p itself is counted too
    total, squares = torch.zeros_like(image), torch.zeros_like(image)
    for neighbour in _neighbours(image):
        difference = neighbour - image
        total += difference
        squares += difference.square()
    deviation = ((squares - total.square() / count).clamp(min=0) / (count - 1)).sqrt()
    scale = SHARPNESS * deviation + 1e-8
    near = torch.stack([-((neighbour - image).abs() / scale).mean(0) for neighbour in _neighbours(image)])
    return near.softmax(dim=0)


def _neighbours(maps: Tensor) -> Iterator[Tensor]:
    """Maps (n, H, W) as each neighbour of a pixel has them, in a fixed order."""
    far = max(DILATIONS)
    height, width = maps.shape[-2:]
    padded = F.pad(maps[None], (far,) * 4, mode="replicate")[0]
    for d in DILATIONS:
        for y in (-d, 0, d):
            for x in (-d, 0, d):
                if x or y:
                    yield padded[:, far + y : far + y + height, far + x : far + x + width]
