"""AuraFlow: joint attention of text and image tokens, eight registers first, then the text; double-stream, then
single-stream blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation, Layout
from . import _latents, _patches
from ._walk import Found, found, joint_maps, named

DENOISERS = ("AuraFlowTransformer2DModel",)
BLOCKS = ("joint_transformer_blocks", "single_transformer_blocks")
ADAPTIVE_NORM = True


def list_activations(transformer: Any) -> list[Activation]:
    """Flux's grammar; single-stream blocks have a feed-forward of their own, so ``norm-out`` and ``ffn-inner`` too."""
    return named(transformer, _walk(transformer))


def _walk(transformer: Any) -> Iterator[Found]:
    double = len(transformer.joint_transformer_blocks)
    for i, block in enumerate(transformer.joint_transformer_blocks):
        yield from _block(f"vit-block{i}", block, transformer, joint=False)
    for i, block in enumerate(transformer.single_transformer_blocks):
        yield from _block(f"vit-block{double + i}", block, transformer, joint=True)


def _block(prefix: str, block: Any, transformer: Any, *, joint: bool) -> Iterator[Found]:
    """A block; ``joint`` if it has one stream. The text stream of the others begins with the registers all the same."""
    attn, channels, stride = block.attn, transformer.inner_dim, transformer.config.patch_size
    for name, layer in (("q", attn.to_q), ("k", attn.to_k), ("v", attn.to_v)):
        yield found(f"{prefix}-{name}", layer, layer.out_features, stride, layout=transformer, joint=joint)
    text = (attn.to_k, attn.to_v) if joint else (attn.add_k_proj, attn.add_v_proj)
    for name, layer in zip(("cross-k", "cross-v"), text, strict=True):
        yield found(f"{prefix}-{name}", layer, layer.out_features, None, "text", layout=transformer, joint=True)
    yield from joint_maps(prefix, attn, stride, transformer)
    yield found(f"{prefix}-attn-out", attn.to_out[0], channels, stride, layout=transformer, joint=joint)
    yield found(f"{prefix}-norm-out", block.ff, channels, stride, tap="input", layout=transformer, joint=joint)
    last = block.ff.out_projection
    yield found(f"{prefix}-ffn-inner", last, last.in_features, stride, tap="input", layout=transformer, joint=joint)
    yield found(f"{prefix}-out", block, channels, stride, layout=transformer, joint=joint, index=1)


def layout(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
    """The grid is that of the latents, divided into patches; registers and text come before its tokens."""
    latents = args[0] if args else kwargs["hidden_states"]
    text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
    patch, registers = transformer.config.patch_size, transformer.register_tokens.shape[1]
    h, w = _patches.grid(latents, patch)
    start = registers + text.shape[1]
    return Layout((h, w), image=slice(start, None), text=slice(registers, start))


def preset_model(transformer: nn.Module, name: str) -> str | None:
    return "auraflow"


@dataclass(frozen=True)
class Conditions:
    """What one prompt tells the denoiser: ``text`` (256 T5 tokens, C), padding being zero."""

    text: Tensor


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
        text, *_ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device=pipe._execution_device)
        encoded.append(Conditions(text[0]))
    return encoded


def encode_images(pipe: Any, images: Tensor, draw: Callable[[Tensor], Tensor] | None) -> Tensor:
    return _latents.encode_images(pipe, images, draw, pipe.transformer.dtype)


decode_latents = _latents.decode_latents


def denoise(pipe: Any, latents: Tensor, t: int, conditions: list[Conditions], size: tuple[int, int]) -> Tensor:
    """One call of the denoiser at σ = t/1000. Returns the velocity ε - x_0, (B, c, h, w)."""
    return pipe.transformer(
        latents,
        encoder_hidden_states=torch.stack([c.text for c in conditions]).to(latents),
        timestep=(_latents.timesteps(latents, t) / 1000).to(latents.dtype),
        return_dict=False,
    )[0]
