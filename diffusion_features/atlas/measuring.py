"""Measuring many activations of a model over images, one forward an image, keeping numbers and no activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from ..activations import Activation
from ..images import Picture
from ..visualize import pca_image
from .properties import Properties, properties

if TYPE_CHECKING:
    from ..extractor import FeatureExtractor

DRAWS = 4


@dataclass(frozen=True)
class Entry:
    """An activation, its properties (the mean over images), the principal components of its first image, and the side
    of its cells in image pixels."""

    activation: Activation
    properties: Properties
    picture: Image.Image
    stride: int


def measure(
    fx: FeatureExtractor,
    images: Sequence[Picture],
    activations: Sequence[Activation],
    prompts: Sequence[str],
    *,
    t: int = 50,
    seed: int = 0,
    draws: int = DRAWS,
    size: int | tuple[int, int] | None = None,
    done: Callable[[], None] = lambda: None,
) -> list[Entry]:
    """Measure activations on images, each under several draws of the noise in one batch.

    Args:
        fx: the model.
        images: to measure on.
        activations: spatial ones, such as ``candidates(fx.available)``.
        prompts: one an image.
        t: the timestep the denoiser is conditioned on.
        seed: of the first draw; image n has draws seed + n · draws and following.
        draws: of the noise, at least 2; the batch of one forward.
        size: (height, width) or side of a square to resize to, in pixels.
        done: called after each image.

    Returns:
        One entry an activation, in their order.

    Raises:
        ValueError: there is no image or activation, or the number of prompts differs.
    """
    if not images or not activations or len(prompts) != len(images):
        raise ValueError(
            f"measuring takes images, a prompt for each and activations, "
            f"not {len(images)}, {len(prompts)} and {len(activations)}"
        )
    ids = [a.id for a in activations]
    found: dict[str, list[Properties]] = {id: [] for id in ids}
    pictures: dict[str, Image.Image] = {}
    for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):

        def note(id: str, x: Tensor) -> None:
            found[id].append(properties(x, seed))
            if id not in pictures:
                pictures[id] = pca_image(x.float().mean(dim=0))

        seeds = range(seed + number * draws, seed + (number + 1) * draws)
        fx.stream([image] * draws, note, prompt, t=t, seed=seeds, activations=ids, size=size)
        done()
    return [Entry(a, _mean(found[a.id]), pictures[a.id], fx.info(a).stride or 1) for a in activations]


def _mean(found: Sequence[Properties]) -> Properties:
    return Properties(*(sum(column) / len(found) for column in zip(*found, strict=True)))
