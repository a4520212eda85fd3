"""PixArt-α and PixArt-Σ: transformers whose blocks attend to the image, then to a T5 prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation, Layout
from ..embedded import MODELS
from . import _latents, _patches
from ._walk import block, named

DENOISERS = ("PixArtTransformer2DModel",)
BLOCKS = ("transformer_blocks",)
ADAPTIVE_NORM = True


def list_activations(transformer: Any) -> list[Activation]:
    """The ten ids a block that the released code emits, two of them text-side: 280 for the released models."""
    channels, stride = transformer.inner_dim, transformer.config.patch_size
    blocks = enumerate(transformer.transformer_blocks)
    return named(
        transformer,
        (f for i, b in blocks for f in block(f"vit-block{i}", b, channels, stride, transformer)),
    )


def layout(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
    """The grid is that of the latents, divided into patches."""
    latents = args[0] if args else kwargs["hidden_states"]
    return Layout(_patches.grid(latents, transformer.config.patch_size))


def preset_model(transformer: nn.Module, name: str) -> str | None:
    """``pixart``, or the name of a pipeline that ships with this package and has fewer blocks."""
    return name if name in MODELS else "pixart"


@dataclass(frozen=True)
class Conditions:
    """What one prompt tells the denoiser: ``text`` (tokens, C), and a ``mask`` (tokens,) of what is not padding."""

    text: Tensor
    mask: Tensor


pixels_per_cell = pixels_per_latent = _patches.pixels_per_latent
multiple = _patches.multiple


text_tokens = _latents.context_length


def encode_prompts(pipe: Any, prompts: list[str]) -> list[Conditions]:
    """Conditions of each prompt.

    Raises:
        ValueError: a prompt is longer than the T5 context.
    """
    encoded = []
    for prompt in prompts:
        _latents.refuse_long(pipe.tokenizer, prompt, _latents.context_length(pipe))
        text, mask, *_ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device=pipe._execution_device)
        encoded.append(Conditions(text[0], mask[0]))
    return encoded


def encode_images(pipe: Any, images: Tensor, draw: Callable[[Tensor], Tensor] | None) -> Tensor:
    return _latents.encode_images(pipe, images, draw, pipe.transformer.dtype)


decode_latents = _latents.decode_latents


def denoise(pipe: Any, latents: Tensor, t: int, conditions: list[Conditions], size: tuple[int, int]) -> Tensor:
    """One call of the denoiser; models of 1024 pixels are told the size and aspect ratio. Returns ε (B, c, h, w)."""
    height, width = size
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if pipe.transformer.use_additional_conditions:
        rows = len(latents)
        added["resolution"] = torch.tensor([[height, width]] * rows).to(latents)
        added["aspect_ratio"] = torch.tensor([[height / width]] * rows).to(latents)
    prediction = pipe.transformer(
        latents,
        encoder_hidden_states=torch.stack([c.text for c in conditions]).to(latents),
        encoder_attention_mask=torch.stack([c.mask for c in conditions]).to(latents.device),
        timestep=_latents.timesteps(latents, t),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return prediction[:, : latents.shape[1]]  # the rest is the predicted variance
