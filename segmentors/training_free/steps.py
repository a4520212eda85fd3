"""What each step of the method does to the maps of one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffusion_features.images import Picture

from .segmentor import TrainingFreeSegmentor


@torch.no_grad()
def steps(
    segmentor: TrainingFreeSegmentor,
    image: Picture,
    classes: Sequence[str] | Mapping[str, Sequence[str]],
    background: Sequence[str] | None = None,
    *,
    caption: str | None = None,
    size: int | tuple[int, int] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The maps of an image's classes after each step; the model runs once a prompt.

    Args:
        segmentor, image, classes, background, caption, size, seed: as in a call of the segmentor.

    Returns:
        Step → (K, h, w) in [0, 1], of which each begins with what the one before gave: ``raw`` (heads and layers
        averaged), ``aggregated`` (weighted), ``rescaled`` and, if the preset refines, ``refined``. Raw and aggregated
        maps are blurred and stretched as the rescaled ones are. Behind the classes' maps comes, if anything is named
        as background, the highest of its maps.
    """
    caption = segmentor.caption_of(image) if caption is None else caption
    wanted, method = segmentor.wanted(classes, background, caption), segmentor.method
    (working,) = segmentor.by_size([image], size)
    raw = replace(method, heads="average", layers="equal", refine=False)
    prompts = [one.prompt for one in wanted.told]
    averaged, weighted = segmentor.collect([image], prompts, working, seed, [raw, replace(method, refine=True)])
    found = {
        "raw": segmentor.maps(averaged, wanted, "none"),
        "aggregated": segmentor.maps(weighted, wanted, "none"),
        "rescaled": segmentor.maps(weighted, wanted, method.rescale),
    }
    if segmentor.preset.k:
        found["refined"] = segmentor.refined(found["rescaled"], weighted[0])
    shown = len(wanted.names) + bool(wanted.behind)
    return {step: maps[0, :shown] for step, maps in found.items()}
