"""Images repainted by the model: noise added up to a high timestep, and denoised all the way down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..extractor import FeatureExtractor
from ..images import Picture
from ..loading import has_decoder
from ..noising import is_flow
from .applying import applied, asked
from .spec import Spec, as_techniques
from .steps import Denoise
from .technique import Call


def repaint(
    fx: FeatureExtractor,
    images: Picture | Sequence[Picture],
    prompt: str | Sequence[str] = "",
    *,
    suppress: Spec | Sequence[Spec] = (),
    strength: float = 0.8,
    steps: int = 20,
    guidance: float = 1.0,
    seed: int | Sequence[int] = 0,
    size: int | tuple[int, int] | None = None,
) -> Tensor:
    """Img2Img: what the model makes of images of which noise has left little.

    Deterministic DDIM steps from the same noise for every technique, so that two results differ by it alone.

    Args:
        suppress: techniques, as in a call of the extractor. ``Denoise`` has no part in it: all of this is denoising.
            ``CFG`` takes the place of ``guidance``.
        strength: how far up the noise goes, from 0 to 1, the timestep nearest to this share of the highest.
        steps: at most so many calls of the denoiser (twice as many with guidance).
        guidance: scale of classifier-free guidance against an empty prompt; 1 is none.

    Returns:
        (B, 3, H, W) in [-1, 1], float32, on the model's device.

    Raises:
        ValueError: the pipeline has no VAE decoder, or the settings do not fit.
    """
    if not 0 < strength <= 1 or steps < 1:
        raise ValueError(f"strength must be above 0 and at most 1, and steps at least 1, not {strength} and {steps}")
    if not has_decoder(fx.pipe):
        raise ValueError(
            "the VAE's decoder was not loaded: name vae-out among the activations of from_pretrained, or use from_pipe "
            "with a whole pipeline"
        )
    scheduler = fx.pipe.scheduler
    start = round(strength * (1000 if is_flow(scheduler) else len(scheduler.alphas_cumprod) - 1))
    acting = [one for one in as_techniques(suppress) if not isinstance(one, Denoise)]
    call = asked(acting, Call(images, prompt, start, start, steps, guidance=guidance, size=size, multiple=fx.multiple))
    with fx._lock, torch.no_grad(), applied(fx, call):
        clean, pixels = fx._clean(images, size, None, None)
        _, step = fx._predictors(call, len(clean), pixels)
        noise = fx._draws(clean, seed, 1, None)[0]
        latents = fx._noisy(clean, noise, 0, call, step)
        return fx.family.decode_latents(fx.pipe, latents).float().clamp(-1, 1)
