"""Z-Image: one stream of image and text tokens, the image first, each padded to a multiple of 32 tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor, nn

from ..activations import Activation, Layout, spans
from . import _latents, _patches
from ._walk import Found, found, joint_maps, named

DENOISERS = ("ZImageTransformer2DModel",)
BLOCKS = ("layers",)
ADAPTIVE_NORM = True


def list_activations(transformer: Any) -> list[Activation]:
    """Flux's grammar for the joint layers. The refiners before them, which see text or image alone, have no ids."""
    return named(transformer, _walk(transformer))


def _walk(transformer: Any) -> Iterator[Found]:
    channels, stride = transformer.dim, transformer.all_patch_size[0]
    for i, block in enumerate(transformer.layers):
        prefix, attn, ff = f"vit-block{i}", block.attention, block.feed_forward
        for name, layer in (("q", attn.to_q), ("k", attn.to_k), ("v", attn.to_v)):
            yield found(f"{prefix}-{name}", layer, layer.out_features, stride, layout=transformer, joint=True)
        for name, layer in (("cross-k", attn.to_k), ("cross-v", attn.to_v)):
            yield found(f"{prefix}-{name}", layer, layer.out_features, None, "text", layout=transformer, joint=True)
        yield from joint_maps(prefix, attn, stride, transformer)
        yield found(f"{prefix}-attn-out", attn.to_out[0], channels, stride, layout=transformer, joint=True)
        yield found(f"{prefix}-norm-out", ff, channels, stride, tap="input", layout=transformer, joint=True)
        last = ff.w2
        yield found(f"{prefix}-ffn-inner", last, last.in_features, stride, tap="input", layout=transformer, joint=True)
        yield found(f"{prefix}-out", block, channels, stride, layout=transformer, joint=True)


def layout(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
    """The grid is that of the latents, divided into patches; latents and texts come as lists, one entry a sample."""
    latents = args[0] if args else kwargs["x"]
    texts = args[2] if len(args) > 2 else kwargs["cap_feats"]
    patch = args[7] if len(args) > 7 else kwargs.get("patch_size", 2)
    h, w = _patches.grid(latents[0], patch)
    start = h * w + -(h * w) % SEQ_MULTI_OF
    return Layout((h, w), image=slice(0, h * w), text=spans([start] * len(texts), [len(text) for text in texts]))


def preset_model(transformer: nn.Module, name: str) -> str | None:
    return "zimage"


@dataclass(frozen=True)
class Conditions:
    """What one prompt tells the denoiser: ``text`` (tokens, C), the prompt as a chat has it."""

    text: Tensor


pixels_per_cell = pixels_per_latent = _patches.pixels_per_latent


def multiple(pipe: Any) -> int:
    return pixels_per_latent(pipe) * int(pipe.transformer.all_patch_size[0])


text_tokens = _latents.own_length


def encode_prompts(pipe: Any, prompts: list[str]) -> list[Conditions]:
    """Conditions of each prompt.

    Raises:
        ValueError: a prompt is longer than the context.
    """
    chat = [{"role": "user", "content": "{}"}]
    template = pipe.tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    encoded = []
    for prompt in prompts:
        _latents.refuse_long(pipe.tokenizer, prompt, _latents.context_length(pipe), template)
        texts, _ = pipe.encode_prompt(prompt, device=pipe._execution_device, do_classifier_free_guidance=False)
        encoded.append(Conditions(texts[0]))
    return encoded


def encode_images(pipe: Any, images: Tensor, draw: Callable[[Tensor], Tensor] | None) -> Tensor:
    return _latents.encode_images(pipe, images, draw, pipe.transformer.dtype)


decode_latents = _latents.decode_latents


def denoise(pipe: Any, latents: Tensor, t: int, conditions: list[Conditions], size: tuple[int, int]) -> Tensor:
    """One call of the denoiser, told 1 - σ at σ = t/1000. Returns the velocity ε - x_0, (B, c, h, w)."""
    prediction = pipe.transformer(
        list(latents[:, :, None].unbind(0)),  # one frame each
        (1000 - _latents.timesteps(latents, t)) / 1000,
        [c.text.to(latents) for c in conditions],
        return_dict=False,
    )[0]
    return -torch.stack(prediction)[:, :, 0]  # the model predicts x_0 - ε
