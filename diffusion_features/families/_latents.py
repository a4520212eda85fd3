"""What the families share in calling a pipeline's VAE and text encoders."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def encode_images(pipe: Any, images: Tensor, draw: Callable[[Tensor], Tensor] | None, dtype: torch.dtype) -> Tensor:
    """(B, 3, H, W) in [-1, 1] → clean latents (B, c, h, w), shifted and scaled as the denoiser knows them.

    Args:
        draw: standard normal like its argument, to sample the VAE posterior; ``None`` takes its mean.
        dtype: of the latents.
    """
    config = pipe.vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    return ((posterior(pipe, images, draw) - shift) * config.scaling_factor).to(dtype)


def posterior(pipe: Any, images: Tensor, draw: Callable[[Tensor], Tensor] | None) -> Tensor:
    """What the VAE encodes (B, 3, H, W), or (B, 3, 1, H, W) for a video VAE, to: its posterior's mean, or a sample."""
    vae = pipe.vae
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    try:
        if upcast:  # SDXL's VAE overflows in float16
            vae.to(dtype=torch.float32)
        encoded = vae.encode(images.to(dtype=vae.dtype))
    finally:
        if upcast:
            vae.to(dtype=torch.float16)
    if hasattr(encoded, "latent_dist"):
        mean = encoded.latent_dist.mean
        return mean if draw is None else mean + encoded.latent_dist.std * draw(mean)
    return encoded[0]  # AutoencoderTiny and AutoencoderDC have no posterior


def context_length(pipe: Any) -> int:
    """Tokens that the pipeline's ``encode_prompt`` reads of a prompt."""
    return inspect.signature(pipe.encode_prompt).parameters["max_sequence_length"].default


def refuse_long(tokenizer: Any, prompt: str, limit: int, template: str = "{}") -> None:
    """Raises ValueError for a prompt that would be cut silently.

    Args:
        limit: tokens that are read, special ones among them.
        template: what the pipeline writes around a prompt; the message counts the prompt's own tokens.
    """
    around = len(tokenizer(template.replace("{}", ""), verbose=False).input_ids) if template != "{}" else 0
    tokens = len(tokenizer(template.replace("{}", prompt), verbose=False).input_ids) - around
    limit -= around
    if tokens > limit:
        raise ValueError(f"the prompt has {tokens} tokens and this model reads {limit}; shorten it: {prompt[:60]!r}...")


def timesteps(latents: Tensor, t: int) -> Tensor:
    """``t`` for each of a batch, on the latents' device."""
    return torch.full((len(latents),), t, device=latents.device)
