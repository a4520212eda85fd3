"""Qwen-Image: joint attention of text and image tokens, the text first; a video VAE that encodes one frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation, Layout, spans
from . import _latents, _patches
from ._walk import Found, found, joint_maps, named

DENOISERS = ("QwenImageTransformer2DModel",)
BLOCKS = ("transformer_blocks",)
ADAPTIVE_NORM = True


def list_activations(transformer: Any) -> list[Activation]:
    """Flux's grammar for double-stream blocks; there are no others."""
    return named(transformer, _walk(transformer))


def _walk(transformer: Any) -> Iterator[Found]:
    channels = transformer.inner_dim
    for i, block in enumerate(transformer.transformer_blocks):
        prefix, attn, ff = f"vit-block{i}", block.attn, block.img_mlp
        for name, layer in (("q", attn.to_q), ("k", attn.to_k), ("v", attn.to_v)):
            yield found(f"{prefix}-{name}", layer, layer.out_features, 1, layout=transformer)
        for name, layer in (("cross-k", attn.add_k_proj), ("cross-v", attn.add_v_proj)):
            yield found(f"{prefix}-{name}", layer, layer.out_features, None, "text", layout=transformer, joint=True)
        yield from joint_maps(prefix, attn, 1, transformer)
        yield found(f"{prefix}-attn-out", attn.to_out[0], channels, 1, layout=transformer)
        yield found(f"{prefix}-norm-out", ff, channels, 1, tap="input", layout=transformer)
        yield found(f"{prefix}-ffn-inner", ff.net[0], ff.net[2].in_features, 1, layout=transformer)
        yield found(f"{prefix}-out", block, channels, 1, layout=transformer, index=1)


def layout(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
    """The latents come as a sequence of patches; their rows and columns are in ``img_shapes`` alone. They follow the
    text, which is padded at its end to the longest of the batch."""
    text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
    mask = args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states_mask")
    shapes = args[4] if len(args) > 4 else kwargs["img_shapes"]
    rows, length = text.shape[:2]
    _, h, w = shapes[0][0] if isinstance(shapes[0], list) else shapes[0]
    lengths = [length] * rows if mask is None else mask.sum(dim=1).tolist()
    return Layout((h, w), image=slice(length, length + h * w), text=spans([0] * rows, lengths))


def preset_model(transformer: nn.Module, name: str) -> str | None:
    return "qwen"


@dataclass(frozen=True)
class Conditions:
    """What one prompt tells the denoiser: ``text`` (tokens, C), the rest of the pipeline's template after it."""

    text: Tensor


pixels_per_cell = multiple = _patches.pixels_per_token
pixels_per_latent = _patches.pixels_per_latent


text_tokens = _latents.own_length


def encode_prompts(pipe: Any, prompts: list[str]) -> list[Conditions]:
    """Conditions of each prompt.

    Raises:
        ValueError: a prompt is longer than the context.
    """
    limit = pipe.prompt_template_encode_start_idx + _latents.context_length(pipe)
    encoded = []
    for prompt in prompts:
        _latents.refuse_long(pipe.tokenizer, prompt, limit, pipe.prompt_template_encode)
        text, _ = pipe.encode_prompt(prompt, device=pipe._execution_device)
        encoded.append(Conditions(text[0]))
    return encoded


def encode_images(pipe: Any, images: Tensor, draw: Callable[[Tensor], Tensor] | None) -> Tensor:
    """(B, 3, H, W) in [-1, 1] → latents (B, c, h, w), normalised by the mean and deviation of each channel."""
    if pipe.vae.decoder is None:
        pipe.vae.decoder = nn.Identity()  # released; but the VAE counts its layers before it encodes
    latents = _latents.posterior(pipe, images[:, :, None], draw)[:, :, 0]
    mean, deviation = _statistics(pipe, latents)
    return ((latents - mean) / deviation).to(pipe.transformer.dtype)


def decode_latents(pipe: Any, latents: Tensor) -> Tensor:
    """The inverse of ``encode_images``."""
    mean, deviation = _statistics(pipe, latents)
    return _latents.decoded(pipe, (latents * deviation + mean)[:, :, None])[:, :, 0]


def _statistics(pipe: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and standard deviation of each channel of what the VAE encodes to, (1, c, 1, 1)."""
    config = pipe.vae.config
    mean, deviation = (torch.tensor(x).view(1, -1, 1, 1).to(like) for x in (config.latents_mean, config.latents_std))
    return mean, deviation


def denoise(pipe: Any, latents: Tensor, t: int, conditions: list[Conditions], size: tuple[int, int]) -> Tensor:
    """One call of the denoiser at σ = t/1000. Returns the velocity ε - x_0, (B, c, h, w)."""
    rows, channels, height, width = latents.shape
    texts = [c.text for c in conditions]
    lengths = torch.tensor([len(text) for text in texts])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    prediction = pipe.transformer(
        hidden_states=pipe._pack_latents(latents, rows, channels, height, width),
        timestep=_latents.timesteps(latents, t).to(latents.dtype) / 1000,
        encoder_hidden_states=nn.utils.rnn.pad_sequence(texts, batch_first=True).to(latents),
        encoder_hidden_states_mask=None if mask.all() else mask.to(latents.device),
        img_shapes=[[(1, height // 2, width // 2)]] * rows,
        return_dict=False,
    )[0]
    factor = pipe.vae_scale_factor
    return pipe._unpack_latents(prediction, height * factor, width * factor, factor)[:, :, 0]
