"""What a technique against content shift is, and the call of an extractor that it acts on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from torch import Tensor

from ..images import Picture, as_tensor

Predict = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Call:
    """What is asked of an extractor; a technique may answer with another ``Call``.

    Attributes:
        techniques: those that the call is made under.
        images, size, multiple: the images as given, the size asked for, and what their sides must be multiples of.
        prompts: one for all images, or one an image.
        t: the timestep, or several.
        denoise_from, solver_steps: as in ``FeatureExtractor.forward``.
        guidance, negative: scale and negative prompt of the steps down from ``denoise_from``; 1 leaves them alone.
    """

    images: Picture | Sequence[Picture] | None
    prompts: str | Sequence[str] = ""
    t: int | Sequence[int] = 50
    denoise_from: int | None = None
    solver_steps: int = 10
    guidance: float = 1.0
    negative: str = ""
    size: int | tuple[int, int] | None = None
    multiple: int = 1
    techniques: tuple[Technique, ...] = ()

    @cached_property
    def pixels(self) -> Tensor:
        """The images as the model sees them, float32 (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: the call has none, only latents.
        """
        if self.images is None:
            raise ValueError("this technique looks at the images: give them, beside any latents")
        return as_tensor(self.images, size=self.size, multiple=self.multiple)

    @property
    def pictures(self) -> list[Image.Image]:
        """The images as the model sees them, as PIL images."""
        arrays = ((self.pixels.permute(0, 2, 3, 1) + 1) * 127.5).round().cpu().numpy().astype(np.uint8)
        return [Image.fromarray(array) for array in arrays]


class Technique:
    """An off-the-shelf generation technique that keeps features at their image (arXiv 2410.06719).

    One contract for all: ``asks`` changes what is asked of the model, ``applied`` changes the model for the duration
    of the call and leaves it as it was, bit for bit. What that takes from a disk is read by the first call and stays
    with the technique; what has to lie in the model itself stays there while inside ``loaded``. A technique that a
    model has no place for raises an error.

    Attributes:
        alone: at most one of this class goes into a call, because two would contradict each other.
    """

    alone: ClassVar[bool] = False

    def asks(self, call: Call) -> Call:
        """The call with this technique. Touches no model."""
        return call

    def applied(self, fx: Any, call: Call) -> AbstractContextManager[None]:
        """The model of an extractor under this technique, while inside."""
        return nullcontext()

    def loaded(self, fx: Any) -> AbstractContextManager[None]:
        """What ``applied`` would load into the model of an extractor lies there while inside, without effect."""
        return nullcontext()


def guided(conditional: Predict, unconditional: Predict, scale: float) -> Predict:
    """Classifier-free guidance: ``ε_u + s (ε_c - ε_u)`` (arXiv 2207.12598, eq. 6 with s = 1 + w).

    Args:
        conditional, unconditional: (x_t, t) → the denoiser's prediction with the prompt, and with the negative one.
        scale: s; 1 is no guidance, and costs nothing.
    """
    if scale == 1:
        return conditional

    def predict(latents: Tensor, t: int) -> Tensor:
        without = unconditional(latents, t)
        return without + scale * (conditional(latents, t) - without)

    return predict
