"""Stable Diffusion 3 and 3.5: joint attention of image and text tokens, the image first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation, Layout
from . import _latents, _patches
from ._walk import Found, attention, found, inner, joint_maps, named

DENOISERS = ("SD3Transformer2DModel",)
BLOCKS = ("transformer_blocks",)
ADAPTIVE_NORM = True


def list_activations(transformer: Any) -> list[Activation]:
    """Flux's grammar; the second attention of SD3.5-medium, over the image alone, has ids ``second-…``."""
    return named(transformer, _walk(transformer))


def _walk(transformer: Any) -> Iterator[Found]:
    channels, stride = transformer.inner_dim, transformer.config.patch_size
    for i, block in enumerate(transformer.transformer_blocks):
        prefix, attn = f"vit-block{i}", block.attn
        for name, layer in (("q", attn.to_q), ("k", attn.to_k), ("v", attn.to_v)):
            yield found(f"{prefix}-{name}", layer, layer.out_features, stride, layout=transformer)
        for name, layer in (("cross-k", attn.add_k_proj), ("cross-v", attn.add_v_proj)):
            yield found(f"{prefix}-{name}", layer, layer.out_features, None, "text")
        yield from joint_maps(prefix, attn, stride, transformer)
        yield found(f"{prefix}-attn-out", attn.to_out[0], channels, stride, layout=transformer)
        if block.attn2 is not None:
            yield from attention(f"{prefix}-second", block.attn2, stride, transformer, text=False)
            yield found(f"{prefix}-second-out", block.attn2.to_out[0], channels, stride, layout=transformer)
        yield found(f"{prefix}-norm-out", block.ff, channels, stride, tap="input", layout=transformer, whole=block)
        yield inner(prefix, block, stride, transformer)
        yield found(f"{prefix}-out", block, channels, stride, layout=transformer, index=1)


def layout(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
    """The grid is that of the latents, divided into patches; its tokens come before those of the text."""
    latents = args[0] if args else kwargs["hidden_states"]
    h, w = _patches.grid(latents, transformer.config.patch_size)
    return Layout((h, w), image=slice(0, h * w), text=slice(h * w, None))


def preset_model(transformer: nn.Module, name: str) -> str | None:
    return "sd3"


@dataclass(frozen=True)
class Conditions:
    """What one prompt tells the denoiser: ``text`` (77 CLIP and 256 T5 tokens, C) and ``pooled`` (C')."""

    text: Tensor
    pooled: Tensor


pixels_per_cell = pixels_per_latent = _patches.pixels_per_latent
multiple = _patches.multiple


def text_tokens(pipe: Any) -> int:
    """Of CLIP, then of T5."""
    return int(pipe.tokenizer_max_length) + _latents.context_length(pipe)


def encode_prompts(pipe: Any, prompts: list[str]) -> list[Conditions]:
    """Conditions of each prompt.

    Raises:
        ValueError: a prompt is longer than the T5 context. (The CLIP encoders read its beginning, as in generation.)
    """
    encoded = []
    for prompt in prompts:
        if pipe.tokenizer_3 is not None:
            _latents.refuse_long(pipe.tokenizer_3, prompt, _latents.context_length(pipe))
        text, _, pooled, _ = pipe.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, device=pipe._execution_device
        )
        encoded.append(Conditions(text[0], pooled[0]))
    return encoded


def encode_images(pipe: Any, images: Tensor, draw: Callable[[Tensor], Tensor] | None) -> Tensor:
    return _latents.encode_images(pipe, images, draw, pipe.transformer.dtype)


decode_latents = _latents.decode_latents


def denoise(pipe: Any, latents: Tensor, t: int, conditions: list[Conditions], size: tuple[int, int]) -> Tensor:
    """One call of the denoiser at σ = t/1000. Returns the velocity ε - x_0, (B, c, h, w)."""
    return pipe.transformer(
        hidden_states=latents,
        timestep=_latents.timesteps(latents, t),
        encoder_hidden_states=torch.stack([c.text for c in conditions]).to(latents),
        pooled_projections=torch.stack([c.pooled for c in conditions]).to(latents),
        return_dict=False,
    )[0]
