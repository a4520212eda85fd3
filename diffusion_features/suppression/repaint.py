"""Images repainted by the model: noise added up to a high timestep, and denoised all the way down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..extractor import FeatureExtractor
from ..images import Picture
from ..noising import Predict, add_noise, is_flow, travel
from .applying import applied, asked
from .spec import Spec, as_technique
from .steps import Denoise
from .technique import Call, guided


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
    scheduler = fx.pipe.scheduler
    start = round(strength * (1000 if is_flow(scheduler) else len(scheduler.alphas_cumprod) - 1))
    given = list(suppress) if isinstance(suppress, Sequence) else [suppress]
    acting = [one for one in map(as_technique, given) if not isinstance(one, Denoise)]
    call = asked(acting, Call(images, prompt, start, start, steps, guidance=guidance, size=size, multiple=fx.multiple))
    with fx._lock, torch.no_grad(), applied(fx, call):
        clean, pixels = fx._clean(images, size, None, None)

        def told(prompts: str | Sequence[str]) -> Predict:
            conditions = fx._conditions(prompts, len(clean))
            return lambda x, level: fx.family.denoise(fx.pipe, x, level, conditions, pixels)

        run = told(call.prompts)
        predict = run if call.guidance == 1 else guided(run, told(call.negative), call.guidance)
        noise = fx._draws(clean, seed, 1, None)[0]
        latents = travel(add_noise(clean, noise, start, scheduler), start, 0, steps, predict, scheduler)
        return decode(fx.pipe, latents).float().clamp(-1, 1)


def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Clean latents (B, c, h, w) as a family's ``encode_images`` gives them → images (B, 3, H, W), about in [-1, 1].

    Raises:
        ValueError: the VAE has no decoder, or latents that this cannot decode (Flux.2).
    """
    vae = getattr(pipe, "vae", None)
    if vae is None:  # a pixel-space model
        return latents
    if getattr(vae, "decoder", None) is None or isinstance(vae.decoder, torch.nn.Identity):
        raise ValueError("the VAE's decoder was not loaded; use whole_extractor, or from_pipe with a whole pipeline")
    if hasattr(vae, "bn"):
        raise ValueError(f"the latents of {type(pipe).__name__} are in patches, which are not decoded here")
    latents, config = latents.to(vae.dtype), vae.config
    if getattr(config, "latents_mean", None):  # Qwen-Image's, a video VAE
        mean, std = (torch.tensor(x).view(1, -1, 1, 1).to(latents) for x in (config.latents_mean, config.latents_std))
        return vae.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
    shift = getattr(config, "shift_factor", None) or 0.0
    return vae.decode(latents / config.scaling_factor + shift).sample
