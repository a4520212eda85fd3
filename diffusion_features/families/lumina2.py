"""Lumina-Image 2: one stream of text and image tokens with grouped-query attention; the text first, each sample's own
length of it, so that the images of a batch start at different places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation, Layout, spans
from . import _latents, _patches
from ._walk import Found, found, joint_maps, named

DENOISERS = ("Lumina2Transformer2DModel",)
BLOCKS = ("layers",)
ADAPTIVE_NORM = True


def list_activations(transformer: Any) -> list[Activation]:
    """Flux's grammar for the joint layers; keys and values have fewer channels than queries. The refiners before them,
    which see text or image alone, have no ids."""
    return named(transformer, _walk(transformer))


def _walk(transformer: Any) -> Iterator[Found]:
    channels, stride = transformer.config.hidden_size, transformer.config.patch_size
    for i, block in enumerate(transformer.layers):
        prefix, attn = f"vit-block{i}", block.attn
        for name, layer in (("q", attn.to_q), ("k", attn.to_k), ("v", attn.to_v)):
            yield found(f"{prefix}-{name}", layer, layer.out_features, stride, layout=transformer, joint=True)
        for name, layer in (("cross-k", attn.to_k), ("cross-v", attn.to_v)):
            yield found(f"{prefix}-{name}", layer, layer.out_features, None, "text", layout=transformer, joint=True)
        yield from joint_maps(prefix, attn, stride, transformer)
        yield found(f"{prefix}-attn-out", attn.to_out[0], channels, stride, layout=transformer, joint=True)
        ff, last = block.feed_forward, block.feed_forward.linear_2
        yield found(f"{prefix}-norm-out", ff, channels, stride, tap="input", layout=transformer, joint=True)
        yield found(f"{prefix}-ffn-inner", last, last.in_features, stride, tap="input", layout=transformer, joint=True)
        yield found(f"{prefix}-out", block, channels, stride, layout=transformer, joint=True)


def layout(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
    """The grid is that of the latents, divided into patches; its tokens follow as many of the text as its mask has."""
    latents = args[0] if args else kwargs["hidden_states"]
    mask = args[3] if len(args) > 3 else kwargs["encoder_attention_mask"]
    h, w = _patches.grid(latents, transformer.config.patch_size)
    lengths = mask.sum(dim=1).tolist()
    rows = len(lengths)
    return Layout((h, w), image=spans(lengths, [h * w] * rows), text=spans([0] * rows, lengths))


def preset_model(transformer: nn.Module, name: str) -> str | None:
    return "lumina2"


@dataclass(frozen=True)
class Conditions:
    """What one prompt tells the denoiser: ``text`` (256 Gemma tokens, C), and a ``mask`` (256,) of what is not padding.

    The text begins with the pipeline's system prompt.
    """

    text: Tensor
    mask: Tensor


pixels_per_cell = pixels_per_latent = _patches.pixels_per_latent
multiple = _patches.multiple


text_tokens = _latents.own_length


def encode_prompts(pipe: Any, prompts: list[str]) -> list[Conditions]:
    """Conditions of each prompt.

    Raises:
        ValueError: a prompt is longer than the context, of which the system prompt takes a part.
    """
    encoded = []
    for prompt in prompts:
        template = pipe.system_prompt + " <Prompt Start> {}"
        _latents.refuse_long(pipe.tokenizer, prompt, _latents.context_length(pipe), template)
        text, mask, *_ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device=pipe._execution_device)
        encoded.append(Conditions(text[0], mask[0]))
    return encoded


def encode_images(pipe: Any, images: Tensor, draw: Callable[[Tensor], Tensor] | None) -> Tensor:
    return _latents.encode_images(pipe, images, draw, pipe.transformer.dtype)


decode_latents = _latents.decode_latents


def denoise(pipe: Any, latents: Tensor, t: int, conditions: list[Conditions], size: tuple[int, int]) -> Tensor:
    """One call of the denoiser, told 1 - σ at σ = t/1000. Returns the velocity ε - x_0, (B, c, h, w)."""
    prediction = pipe.transformer(
        hidden_states=latents,
        timestep=1 - _latents.timesteps(latents, t) / 1000,
        encoder_hidden_states=torch.stack([c.text for c in conditions]).to(latents),
        encoder_attention_mask=torch.stack([c.mask for c in conditions]).to(latents.device),
        return_dict=False,
    )[0]
    return -prediction  # the model predicts x_0 - ε
