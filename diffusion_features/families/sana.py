"""Sana: linear attention to the image, then softmax attention to a Gemma prompt; latents of 32 pixels a cell."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation, Layout
from . import _latents, _patches
from ._walk import Found, attention, found, named

DENOISERS = ("SanaTransformer2DModel",)
BLOCKS = ("transformer_blocks",)
ADAPTIVE_NORM = True


def list_activations(transformer: Any) -> list[Activation]:
    """PixArt's ids but ``self-map``: linear attention has no probabilities, its q, k and v are the projections."""
    return named(transformer, _walk(transformer))


def _walk(transformer: Any) -> Iterator[Found]:
    stride = transformer.config.patch_size
    for i, block in enumerate(transformer.transformer_blocks):
        prefix, attn = f"vit-block{i}", block.attn1
        for name, layer in (("q", attn.to_q), ("k", attn.to_k), ("v", attn.to_v)):
            yield found(f"{prefix}-self-{name}", layer, layer.out_features, stride, layout=transformer)
        yield from attention(f"{prefix}-cross", block.attn2, stride, transformer, text=True)
        last = block.ff.conv_point  # the feed-forward is convolutional: its tensors are (B, C, h, w)
        yield found(f"{prefix}-ffn-inner", last, last.in_channels, stride, tap="input")
        yield found(f"{prefix}-out", block, attn.to_out[0].out_features, stride, layout=transformer)


def layout(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
    """The grid is that of the latents, divided into patches."""
    latents = args[0] if args else kwargs["hidden_states"]
    return Layout(_patches.grid(latents, transformer.config.patch_size))


def preset_model(transformer: nn.Module, name: str) -> str | None:
    return "sana"


@dataclass(frozen=True)
class Conditions:
    """What one prompt tells the denoiser: ``text`` (300 Gemma tokens, C), and a ``mask`` (300,) of what is not padding.

    The text encoder reads the prompt after the pipeline's instruction, of which the first and last token remain here.
    """

    text: Tensor
    mask: Tensor


pixels_per_cell = pixels_per_latent = _patches.pixels_per_latent
multiple = _patches.multiple


text_tokens = _latents.context_length


def encode_prompts(pipe: Any, prompts: list[str]) -> list[Conditions]:
    """Conditions of each prompt, after the instruction that a generation has by default.

    Raises:
        ValueError: a prompt is longer than the context.
    """
    instruction = inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default
    before = "\n".join(instruction)
    limit = len(pipe.tokenizer.encode(before)) + _latents.context_length(pipe) - 2  # as the pipeline has it
    encoded = []
    for prompt in prompts:
        _latents.refuse_long(pipe.tokenizer, prompt, limit, before + "{}")
        text, mask, *_ = pipe.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            complex_human_instruction=instruction,
            device=pipe._execution_device,
        )
        encoded.append(Conditions(text[0], mask[0]))
    return encoded


def encode_images(pipe: Any, images: Tensor, draw: Callable[[Tensor], Tensor] | None) -> Tensor:
    return _latents.encode_images(pipe, images, draw, pipe.transformer.dtype)  # deterministic: nothing to draw


decode_latents = _latents.decode_latents


def denoise(pipe: Any, latents: Tensor, t: int, conditions: list[Conditions], size: tuple[int, int]) -> Tensor:
    """One call of the denoiser at σ = t/1000. Returns the velocity ε - x_0, (B, c, h, w)."""
    prediction = pipe.transformer(
        latents,
        encoder_hidden_states=torch.stack([c.text for c in conditions]).to(latents),
        encoder_attention_mask=torch.stack([c.mask for c in conditions]).to(latents.device),
        timestep=_latents.timesteps(latents, t) * pipe.transformer.config.timestep_scale,
        return_dict=False,
    )[0]
    return prediction[:, : latents.shape[1]]  # some predict a variance too
