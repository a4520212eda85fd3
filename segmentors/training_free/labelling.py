"""From the maps of tokens to maps of classes, and from those to labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .background import background_score
from .edges import to_edges
from .method import Method
from .prompts import Pass
from .rescaling import Rescale, entity_maps


@dataclass(frozen=True)
class Segmentation:
    """What the segmentor found in one image of H x W pixels.

    Attributes:
        labels: int64 (H, W), indices into ``classes``.
        scores: float32 (K, H, W) in [0, 1], one map a class; ``labels`` is where each is highest.
        classes: names; the first is "background" where a background was asked for.
        prompts: what the model was told, one prompt a pass.
        head_weights: cross-map id → (heads, h, w), summing to 1 over heads; of the first pass. Empty for averages.
        layer_weights: cross-map id → weight, summing to 1; of the first pass.
        seconds: step → time it took; a batch's divided by its images.
    """

    labels: Tensor
    scores: Tensor
    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    head_weights: Mapping[str, Tensor] = field(repr=False)
    layer_weights: Mapping[str, float] = field(repr=False)
    seconds: Mapping[str, float] = field(repr=False)


class Wanted(NamedTuple):
    """What is asked of images: classes, words of the background, whether there is a background, and the prompts."""

    names: list[str]
    behind: list[str]
    with_background: bool
    told: list[Pass]


def class_maps(tokens: Sequence[Tensor], wanted: Wanted, rescale: Rescale) -> tuple[Tensor, Tensor]:
    """The rescaled maps of the classes, and the highest of the background's: (K, h, w) and (h, w) in one image.

    The tokens of several passes count as those of one prompt, so that their shares can be compared.

    Args:
        tokens: what each pass gave: A, (T, h, w).
    """
    entities: dict[str, list[int]] = {}
    content: list[int] = []
    first = 0
    for found, one in zip(tokens, wanted.told, strict=True):
        entities |= {name: [first + column for column in columns] for name, columns in one.entities.items()}
        content += [first + column for column in one.content]
        first += len(found)
    every = [*wanted.names, *wanted.behind]
    maps = entity_maps(torch.cat([*tokens]), [entities[name] for name in every], content, rescale)
    classes, behind = maps[: len(wanted.names)], maps[len(wanted.names) :]
    return classes, behind.amax(dim=0) if len(behind) else torch.zeros_like(classes[0])


def labelled(
    maps: Tensor, size: tuple[int, int], with_background: bool, method: Method, image: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Labels int64 (H, W) and scores (K, H, W) in [0, 1] at the ``size`` of the image, from maps (K, h, w).

    Args:
        with_background: the last map is that of the background; its class comes first in the result.
        image: (3, h, w) in [-1, 1] as the model saw it, for methods that look for edges. They do so at this size, so
            that a large photograph takes no more memory than a small one.
    """
    if with_background:
        score = background_score(maps[-1], method.background, method.threshold)
        maps = torch.cat([score[None], maps[:-1]])
    if method.edges != "none":
        assert image is not None, "edges are those of an image"
        maps = to_edges(maps, image, method.edges)
    scores = F.interpolate(maps[None], size, mode="bilinear")[0].clamp_(0, 1)  # in place: they may be gigabytes
    return scores.argmax(dim=0), scores
