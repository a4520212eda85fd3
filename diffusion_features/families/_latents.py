"""What the families share in calling a pipeline's VAE and text encoders."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    with _without_overflow(pipe.vae) as vae:
        encoded = vae.encode(images.to(dtype=vae.dtype))
    if hasattr(encoded, "latent_dist"):
        mean = encoded.latent_dist.mean
        return mean if draw is None else mean + encoded.latent_dist.std * draw(mean)
    return encoded[0]  # AutoencoderTiny and AutoencoderDC have no posterior


def decode_latents(pipe: Any, latents: Tensor) -> Tensor:
    """The inverse of ``encode_images``: latents (B, c, h, w) → images (B, 3, H, W), about [-1, 1] and not clipped."""
    config = pipe.vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    return decoded(pipe, latents / config.scaling_factor + shift)


def decoded(pipe: Any, latents: Tensor) -> Tensor:
    """What the VAE makes of latents as it knows them, in their dtype."""
    with _without_overflow(pipe.vae) as vae:
        return vae.decode(latents.to(dtype=vae.dtype), return_dict=False)[0].to(latents.dtype)


@contextmanager
def _without_overflow(vae: Any) -> Iterator[Any]:
    """The VAE in float32 for the duration, where it is one that overflows in float16, as SDXL's does."""
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    try:
        yield vae.to(dtype=torch.float32) if upcast else vae
    finally:
        if upcast:
            vae.to(dtype=torch.float16)


def context_length(pipe: Any) -> int:
    """Tokens that the pipeline's ``encode_prompt`` reads of a prompt."""
    return inspect.signature(pipe.encode_prompt).parameters["max_sequence_length"].default


def own_length(pipe: Any) -> int:
    """``text_tokens`` where prompts are not padded to one length."""
    return 0


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
