"""Per-pixel rescaling: what a pixel gives to each word, as a share of what it gives to all content words.

Special tokens take an amount of attention that differs from pixel to pixel. Dividing it out is the third part of arXiv
2603.06178.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Rescale: TypeAlias = Literal["sum", "max", "none", "raw", "sum-raw", "sum-raw-again"]

BLUR, SIGMA = 5, 1.1


def entity_maps(tokens: Tensor, entities: Sequence[Sequence[int]], content: Sequence[int], how: Rescale) -> Tensor:
    """One map an entity (a class, or a part of the background), from the aggregated maps of all tokens.

    With ``M_e(p) = mean_{q in e} A(p, q)``, ``R(p) = Σ_{q in content} A(p, q)`` and ``N`` for ``normalised``:

    - ``sum``: ``N(M_e / R)``, the paper's
    - ``max``: ``N(M_e / max_{q in content} A(p, q))``
    - ``none``: ``N(M_e)``
    - ``raw``: ``M_e``
    - ``sum-raw``: ``N(M_e / R) · M_e``; ``sum-raw-again``: ``N`` of that

    A pixel that gives nothing to any content word has 0. If the tokens of one entity are all the content there is, the
    ratio is the same everywhere and says nothing; then nothing is divided.

    Args:
        tokens: A, (T, h, w).
        entities: token positions of each entity.
        content: token positions of all content words.

    Returns:
        (entities, h, w); in [0, 1] unless ``raw`` or ``sum-raw``.

    Raises:
        ValueError: ``how`` is none of these.
    """
    if how not in Rescale.__args__:  # type: ignore[attr-defined]
        raise ValueError(f"rescaling is {', '.join(Rescale.__args__)}, not {how!r}")  # type: ignore[attr-defined]
    maps = torch.stack([tokens[list(entity)].mean(dim=0) for entity in entities])
    if how == "raw":
        return maps
    shared = tokens[list(content)].amax(dim=0) if how == "max" else tokens[list(content)].sum(dim=0)
    alone = len(entities) == 1 and set(content) <= set(entities[0])
    if how == "none" or alone:
        return normalised(maps)
    scaled = normalised(torch.where(shared > 0, maps / torch.where(shared > 0, shared, 1), 0))
    if how.startswith("sum-raw"):
        return normalised(scaled * maps) if how == "sum-raw-again" else scaled * maps
    return scaled


def normalised(maps: Tensor) -> Tensor:
    """Each map (n, h, w) blurred (Gaussian of 5x5, σ = 1.1, reflected at the border) and stretched to [0, 1]."""
    return stretched(blurred(maps, BLUR, SIGMA))


def stretched(maps: Tensor) -> Tensor:
    """``(M - min M) / (max M - min M)`` of each map (n, h, w); a constant map says nothing and becomes 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    flat = high - low <= 1e-6 * high.abs()
    return torch.where(flat, 0, (maps - low) / torch.where(flat, 1, high - low))


def blurred(maps: Tensor, width: int, sigma: float) -> Tensor:
    """Maps (n, h, w) after a Gaussian of ``width`` x ``width`` cells, reflected at the border.

    The taps at offset x weigh ``exp(-x² / 2σ²)``, normalised.
    """
    taps = torch.arange(width, dtype=maps.dtype, device=maps.device) - width // 2
    taps = torch.exp(-(taps**2) / (2 * sigma**2))
    taps = taps / taps.sum()
    # reflection needs sides above its width; smaller grids repeat their border cells
    mode = "reflect" if min(maps.shape[-2:]) > width // 2 else "replicate"
    padded = F.pad(maps[:, None], (width // 2,) * 4, mode=mode)
    return F.conv2d(F.conv2d(padded, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))[:, 0]
