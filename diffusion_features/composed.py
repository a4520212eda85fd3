"""What ``FeatureExtractor`` makes of several tensors of a call: aggregated attention, and the image one step later.

``attn`` and ``vae-out`` are ids of the released code of arXiv 2410.03558. There ``attn`` is enlarged by nearest
neighbours, which puts it up to half a coarse cell beside the image; here it is bilinear.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import Activation
from .attention_call import AttentionCall
from .noising import ddim_move

CATEGORIES = tuple(f"{stage}_{kind}" for stage in ("down", "mid", "up") for kind in ("cross", "self"))
"""Kinds of attention maps that ``attn`` is made of; all maps of a transformer count as ``up``."""
CELL = 8
"""Image pixels along a side of a cell of ``attn``."""
UNET_CELLS, TRANSFORMER_CELLS = (16, 32), (8, 32)
"""Smallest and largest side, in image pixels, of a query's cell in the maps that ``attn`` is made of."""


class Group(NamedTuple):
    """Maps that are averaged: those of one category, by its place among those asked for, and one size of cells."""

    category: int
    stride: int


def check_attention(attention: str | Sequence[str]) -> tuple[str, ...]:
    """The categories that ``attn`` is made of, each once.

    Raises:
        ValueError: there are none, or one is unknown.
    """
    categories = (attention,) if isinstance(attention, str) else tuple(dict.fromkeys(attention))
    for category in categories:
        if category not in CATEGORIES:
            near = difflib.get_close_matches(str(category), CATEGORIES, n=1, cutoff=0)
            raise ValueError(
                f"there is no attention {category!r}; did you mean {near[0]!r}? There are {', '.join(CATEGORIES)}"
            )
    if not categories:
        raise ValueError(f"attention is empty; it takes any of {', '.join(CATEGORIES)}")
    return categories


def attention_groups(available: Sequence[Activation], attention: Sequence[str], cell: int) -> dict[str, Group]:
    """The maps that ``attn`` is made of, in forward order: id → the group it is averaged in.

    Args:
        available: all that the denoiser has.
        attention: categories.
        cell: image pixels along a side of a denoiser cell.

    Raises:
        ValueError: the denoiser has no map of a category in the sizes that count.
    """
    kept = {a.id: (category, a.stride * cell) for a in available if (category := _category(a)) and a.stride}
    sizes = {id: TRANSFORMER_CELLS if id.startswith("vit-") else UNET_CELLS for id in kept}
    kept = {id: (category, side) for id, (category, side) in kept.items() if sizes[id][0] <= side <= sizes[id][1]}
    there = [c for c in CATEGORIES if c in {category for category, _ in kept.values()}]
    if missing := [category for category in attention if category not in there]:
        raise ValueError(
            f"attn cannot be made of {missing[0]}: this model has no such map of a fitting size; "
            f"it has {', '.join(there) or 'none at all'}"
        )
    return {
        id: Group(attention.index(category), side) for id, (category, side) in kept.items() if category in attention
    }


def _category(activation: Activation) -> str | None:
    kinds = {"cross-map": "cross", "self-map": "self"}
    if activation.role not in kinds:
        return None
    stage = activation.id.split("-")[0]
    return f"{'up' if stage == 'vit' else stage}_{kinds[activation.role]}"


def attention_channels(groups: Mapping[str, Group], attention: Sequence[str], text_tokens: int) -> int:
    """Channels of ``attn``; 0 where they depend on the image or on the prompt.

    Args:
        text_tokens: keys of a cross-attention map, 0 if nobody knows.
    """
    if any(category.endswith("_self") for category in attention):
        return 0
    return len(set(groups.values())) * text_tokens


class AttentionSum:
    """``attn`` as its maps come: mean over heads, then over the maps of a group; each group enlarged to cells of 8
    pixels, and all of them side by side as channels.

    Of the maps one sum a group is kept, (B, queries, keys).
    """

    def __init__(self, groups: Mapping[str, Group]) -> None:
        self.groups = groups
        self.sums: dict[Group, Tensor] = {}

    def add(self, id: str, call: AttentionCall) -> None:
        """Take the map of an activation."""
        mean = call.map.rows(head_mean=True)[:, 0].transpose(1, 2).unflatten(2, call.map.grid)
        exact = mean.to(torch.promote_types(mean.dtype, torch.float32))
        group = self.groups[id]
        self.sums[group] = self.sums[group] + exact if group in self.sums else exact

    def result(self, size: tuple[int, int]) -> Tensor:
        """(B, channels, H/8, W/8), float32 or more: categories as asked for, of each the coarsest cells first, of
        these a channel for each key.

        Args:
            size: (H, W) of the images in pixels.
        """
        counts = Counter(self.groups.values())
        grid = (-(-size[0] // CELL), -(-size[1] // CELL))
        ordered = sorted(counts, key=lambda group: (group.category, -group.stride))
        return torch.cat([_enlarged(self.sums[group] / counts[group], grid) for group in ordered], dim=1)


def _enlarged(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, grid, mode="bilinear", align_corners=False)


def next_image(noisy: Tensor, prediction: Tensor, t: int, scheduler: Any, decode: Callable[[Tensor], Tensor]) -> Tensor:
    """``vae-out``: the image that latents show after one step of a schedule of 1000, (B, 3, H, W).

    Args:
        noisy: x_t, (B, c, h, w).
        prediction: the denoiser's output at t.
        decode: latents → images.
    """
    return decode(ddim_move(noisy, prediction, t, max(t - 1, 0), scheduler))
