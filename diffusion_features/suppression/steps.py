"""Techniques that take steps: denoising to t from a little above it, and guidance of these steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from .technique import Call, Technique


@dataclass
class Denoise(Technique):
    """Noise is added a little above t and denoised to t, which lets other techniques act more than once.

    The paper uses it for attention features, from t=60 to 50, and finds that more brings the shift back
    (arXiv 2410.06719).

    Args:
        by: how many timesteps above t to start.
        steps: DDIM steps from there to t, at most; each is a call of the denoiser.
    """

    by: int = 10
    steps: int = 10
    alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.by < 1 or self.steps < 1:
            raise ValueError(f"Denoise goes up by at least 1 and takes at least 1 step, not {self.by} and {self.steps}")

    def asks(self, call: Call) -> Call:
        """The call with ``denoise_from`` = t + ``by``.

        Raises:
            ValueError: several t, from each of which it would start elsewhere; or the call starts above t by itself.
        """
        if not isinstance(call.t, (int, np.integer)):
            raise ValueError("Denoise starts a given distance above t: call with one t at a time")
        if call.denoise_from is not None:
            raise ValueError("give Denoise or denoise_from, not both")
        return replace(call, denoise_from=int(call.t) + self.by, solver_steps=self.steps)


@dataclass
class CFG(Technique):
    """Classifier-free guidance of the steps down to t; the paper finds that it has no effect, which can be tested so.

    The call that features are taken from is conditional: guidance mixes predictions, not activations. Without
    ``Denoise`` (or ``denoise_from``) there are no steps, and an error says so.

    Args:
        scale: s of ``ε_u + s (ε_c - ε_u)``.
        negative: the negative prompt.
    """

    scale: float = 7.5
    negative: str = ""
    alone: ClassVar[bool] = True

    def asks(self, call: Call) -> Call:
        return replace(call, guidance=self.scale, negative=self.negative)
