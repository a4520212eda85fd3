"""Flux.1: joint attention of text and image tokens, the text first; double-stream, then single-stream blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation, Layout
from . import _latents, _patches
from ._walk import Found, found, inner, joint_maps, named

DENOISERS = ("FluxTransformer2DModel",)
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
ADAPTIVE_NORM = True


def list_activations(transformer: Any) -> list[Activation]:
    """437 published ids of Flux.1, and a ``text-map`` and two text-side ones a block."""
    return named(transformer, _walk(transformer))


def _walk(transformer: Any) -> Iterator[Found]:
    double = len(transformer.transformer_blocks)
    for i, block in enumerate(transformer.transformer_blocks):
        yield from _double(f"vit-block{i}", block, transformer)
    for i, block in enumerate(transformer.single_transformer_blocks):
        yield from _single(f"vit-block{double + i}", block, transformer)


def _double(prefix: str, block: Any, transformer: Any) -> Iterator[Found]:
    attn, channels = block.attn, transformer.inner_dim
    for name, layer in (("q", attn.to_q), ("k", attn.to_k), ("v", attn.to_v)):
        yield found(f"{prefix}-{name}", layer, layer.out_features, 1, layout=transformer)
    for name, layer in (("cross-k", attn.add_k_proj), ("cross-v", attn.add_v_proj)):
        yield found(f"{prefix}-{name}", layer, layer.out_features, None, "text")
    yield from joint_maps(prefix, attn, 1, transformer)
    yield found(f"{prefix}-attn-out", attn.to_out[0], channels, 1, layout=transformer)
    yield found(f"{prefix}-norm-out", block.ff, channels, 1, tap="input", layout=transformer)
    yield inner(prefix, block, 1, transformer)
    yield found(f"{prefix}-out", block, channels, 1, layout=transformer, index=1)


def _single(prefix: str, block: Any, transformer: Any) -> Iterator[Found]:
    attn, channels = block.attn, transformer.inner_dim
    for name, layer in (("q", attn.to_q), ("k", attn.to_k), ("v", attn.to_v)):
        yield found(f"{prefix}-{name}", layer, layer.out_features, 1, layout=transformer, joint=True)
    for name, layer in (("cross-k", attn.to_k), ("cross-v", attn.to_v)):
        yield found(f"{prefix}-{name}", layer, layer.out_features, None, "text", layout=transformer, joint=True)
    yield from joint_maps(prefix, attn, 1, transformer)
    yield found(f"{prefix}-attn-out", attn, channels, 1, layout=transformer, joint=True)
    yield found(f"{prefix}-out", block, channels, 1, layout=transformer, index=1)


def layout(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
    """The latents come as a sequence of patches; their rows and columns are in ``img_ids`` alone."""
    ids = args[4] if len(args) > 4 else kwargs["img_ids"]
    text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
    length = text.shape[1]
    return Layout(_patches.packed_grid(ids), image=slice(length, None), text=slice(0, length))


def preset_model(transformer: nn.Module, name: str) -> str | None:
    return "flux"


@dataclass(frozen=True)
class Conditions:
    """What one prompt tells the denoiser: ``text`` (512 T5 tokens, C) and ``pooled`` (C') of CLIP."""

    text: Tensor
    pooled: Tensor


pixels_per_cell = multiple = _patches.pixels_per_token
pixels_per_latent = _patches.pixels_per_latent


text_tokens = _latents.context_length


def encode_prompts(pipe: Any, prompts: list[str]) -> list[Conditions]:
    """Conditions of each prompt.

    Raises:
        ValueError: a prompt is longer than the T5 context. (CLIP reads its beginning, as in generation.)
    """
    encoded = []
    for prompt in prompts:
        _latents.refuse_long(pipe.tokenizer_2, prompt, _latents.context_length(pipe))
        text, pooled, _ = pipe.encode_prompt(prompt, device=pipe._execution_device)
        encoded.append(Conditions(text[0], pooled[0]))
    return encoded


def encode_images(pipe: Any, images: Tensor, draw: Callable[[Tensor], Tensor] | None) -> Tensor:
    return _latents.encode_images(pipe, images, draw, pipe.transformer.dtype)


decode_latents = _latents.decode_latents


def denoise(pipe: Any, latents: Tensor, t: int, conditions: list[Conditions], size: tuple[int, int]) -> Tensor:
    """One call of the denoiser at σ = t/1000, with a guidance of 1. Returns the velocity ε - x_0, (B, c, h, w)."""
    rows, channels, height, width = latents.shape
    text = torch.stack([c.text for c in conditions]).to(latents)
    guidance = torch.ones(rows, device=latents.device) if pipe.transformer.config.guidance_embeds else None
    prediction = pipe.transformer(
        hidden_states=pipe._pack_latents(latents, rows, channels, height, width),
        encoder_hidden_states=text,
        pooled_projections=torch.stack([c.pooled for c in conditions]).to(latents),
        timestep=(_latents.timesteps(latents, t) / 1000).to(latents.dtype),
        img_ids=pipe._prepare_latent_image_ids(rows, height // 2, width // 2, latents.device, latents.dtype),
        txt_ids=torch.zeros(text.shape[1], 3).to(latents),
        guidance=guidance,
        return_dict=False,
    )[0]
    factor = pipe.vae_scale_factor
    return pipe._unpack_latents(prediction, height * factor, width * factor, factor)
