"""Flux.2: joint attention of text and image tokens, the text first; double-stream, then single-stream blocks whose one
projection makes queries, keys, values and the feed-forward side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation, Layout
from . import _latents, _patches
from ._walk import Found, found, joint_maps, named

DENOISERS = ("Flux2Transformer2DModel",)
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
ADAPTIVE_NORM = True


def list_activations(transformer: Any) -> list[Activation]:
    """Flux.1's ids, and ``ffn-inner`` of the single-stream blocks."""
    return named(transformer, _walk(transformer))


def _walk(transformer: Any) -> Iterator[Found]:
    double = len(transformer.transformer_blocks)
    for i, block in enumerate(transformer.transformer_blocks):
        yield from _double(f"vit-block{i}", block, transformer)
    for i, block in enumerate(transformer.single_transformer_blocks):
        yield from _single(f"vit-block{double + i}", block, transformer)


def _double(prefix: str, block: Any, transformer: Any) -> Iterator[Found]:
    attn, ff, channels = block.attn, block.ff, transformer.inner_dim
    for name, layer in (("q", attn.to_q), ("k", attn.to_k), ("v", attn.to_v)):
        yield found(f"{prefix}-{name}", layer, layer.out_features, 1, layout=transformer)
    for name, layer in (("cross-k", attn.add_k_proj), ("cross-v", attn.add_v_proj)):
        yield found(f"{prefix}-{name}", layer, layer.out_features, None, "text")
    yield from joint_maps(prefix, attn, 1, transformer)
    yield found(f"{prefix}-attn-out", attn.to_out[0], channels, 1, layout=transformer)
    yield found(f"{prefix}-norm-out", ff, channels, 1, tap="input", layout=transformer)
    yield found(f"{prefix}-ffn-inner", ff.act_fn, ff.linear_out.in_features, 1, layout=transformer)
    yield found(f"{prefix}-out", block, channels, 1, layout=transformer, index=1)


def _single(prefix: str, block: Any, transformer: Any) -> Iterator[Found]:
    """``attn-out`` is the attention before the output projection, which it shares with the feed-forward."""
    attn, channels, fused = block.attn, block.attn.inner_dim, block.attn.to_qkv_mlp_proj
    for place, name in enumerate(("q", "k", "v")):
        start = place * channels
        yield found(f"{prefix}-{name}", fused, channels, 1, layout=transformer, joint=True, start=start)
    for place, name in ((1, "cross-k"), (2, "cross-v")):
        start = place * channels
        yield found(f"{prefix}-{name}", fused, channels, None, "text", layout=transformer, joint=True, start=start)
    yield from joint_maps(prefix, attn, 1, transformer)
    inner, last = attn.mlp_hidden_dim, attn.to_out
    yield found(f"{prefix}-ffn-inner", attn.mlp_act_fn, inner, 1, layout=transformer, joint=True)
    yield found(f"{prefix}-attn-out", last, channels, 1, tap="input", layout=transformer, joint=True, start=0)
    yield found(f"{prefix}-out", block, transformer.inner_dim, 1, layout=transformer, joint=True, index=1)


def layout(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
    """The latents come as a sequence of patches; their rows and columns are in ``img_ids`` alone."""
    ids = args[3] if len(args) > 3 else kwargs["img_ids"]
    text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
    length = text.shape[1]
    return Layout(_patches.packed_grid(ids), image=slice(length, None), text=slice(0, length))


def preset_model(transformer: nn.Module, name: str) -> str | None:
    return "flux2"


@dataclass(frozen=True)
class Conditions:
    """What one prompt tells the denoiser: ``text`` (512 tokens, C), three layers of the text encoder side by side."""

    text: Tensor


pixels_per_cell = pixels_per_latent = multiple = _patches.pixels_per_token  # its latents are packed as they are encoded


text_tokens = _latents.context_length


def encode_prompts(pipe: Any, prompts: list[str]) -> list[Conditions]:
    """Conditions of each prompt.

    Raises:
        ValueError: a prompt is longer than the context.
    """
    tokenizer, template = _template(pipe)
    encoded = []
    for prompt in prompts:
        _latents.refuse_long(tokenizer, prompt, _latents.context_length(pipe), template)
        text, _ = pipe.encode_prompt(prompt, device=pipe._execution_device)
        encoded.append(Conditions(text[0]))
    return encoded


def _template(pipe: Any) -> tuple[Callable[..., Any], str]:
    """The tokenizer, and what the pipeline writes around a prompt: a chat, for [dev] after a system message."""
    chat = pipe.tokenizer.apply_chat_template
    if not hasattr(pipe, "system_message"):  # [klein], whose text encoder is Qwen3
        message = {"role": "user", "content": "{}"}
        template = chat([message], tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return pipe.tokenizer, template
    texts = (("system", pipe.system_message), ("user", "{}"))
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts]
    template = chat(messages, tokenize=False, add_generation_prompt=False)
    return partial(pipe.tokenizer.tokenizer, add_special_tokens=False), template  # the template has them


def encode_images(pipe: Any, images: Tensor, draw: Callable[[Tensor], Tensor] | None) -> Tensor:
    """(B, 3, H, W) in [-1, 1] → latents (B, 4c, h, w) of two by two cells, normalised by the VAE's statistics."""
    latents = pipe._patchify_latents(_latents.posterior(pipe, images, draw))
    mean, deviation = _statistics(pipe, latents)
    return ((latents - mean) / deviation).to(pipe.transformer.dtype)


def decode_latents(pipe: Any, latents: Tensor) -> Tensor:
    """The inverse of ``encode_images``."""
    mean, deviation = _statistics(pipe, latents)
    return _latents.decoded(pipe, pipe._unpatchify_latents(latents * deviation + mean))


def _statistics(pipe: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """The VAE's mean and standard deviation of each channel, (1, 4c, 1, 1)."""
    bn = pipe.vae.bn
    mean, variance = (x.view(1, -1, 1, 1).to(like) for x in (bn.running_mean, bn.running_var))
    return mean, torch.sqrt(variance + pipe.vae.config.batch_norm_eps)


def denoise(pipe: Any, latents: Tensor, t: int, conditions: list[Conditions], size: tuple[int, int]) -> Tensor:
    """One call of the denoiser at σ = t/1000, with a guidance of 1 if it is told one. Returns the velocity ε - x_0,
    (B, 4c, h, w)."""
    text = torch.stack([c.text for c in conditions]).to(latents)
    guided = pipe.transformer.config.guidance_embeds
    prediction = pipe.transformer(
        hidden_states=pipe._pack_latents(latents),
        timestep=_latents.timesteps(latents, t).to(latents.dtype) / 1000,
        guidance=torch.ones(len(latents), device=latents.device) if guided else None,
        encoder_hidden_states=text,
        txt_ids=pipe._prepare_text_ids(text).to(latents.device),
        img_ids=pipe._prepare_latent_ids(latents).to(latents.device),
        return_dict=False,
    )[0]
    return prediction.mT.unflatten(2, latents.shape[-2:])
