"""What the families share in the geometry of transformers: latents, the patches they are cut into, and pixels.

Most denoisers take latents and cut patches themselves: their cell is a latent. Flux and its kin take latents that are
packed two by two already: their cell is a token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

PACKED = 2
"""Latents along a side of a token that the pipeline, not the denoiser, makes of them."""


def grid(latents: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of the patches of latents (..., h, w)."""
    return latents.shape[-2] // patch, latents.shape[-1] // patch


def packed_grid(ids: Tensor) -> tuple[int, int]:
    """Rows and columns of tokens whose positions are given: (..., tokens, 3 or more), row in the second, column in the
    third."""
    h, w = (int(ids[..., axis].max() - ids[..., axis].min()) + 1 for axis in (1, 2))
    return h, w


def pixels_per_latent(pipe: Any) -> int:
    """Image pixels along a side of a cell of the VAE's latents."""
    return int(pipe.vae_scale_factor)


def multiple(pipe: Any) -> int:
    """Image sides are multiples of one patch of latents."""
    return pixels_per_latent(pipe) * int(pipe.transformer.config.patch_size)


def pixels_per_token(pipe: Any) -> int:
    """Image pixels along a side of a token of packed latents."""
    return pixels_per_latent(pipe) * PACKED
