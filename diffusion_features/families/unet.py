"""UNets: Stable Diffusion 1.x and 2.x, SDXL, Playground v2, and DeepFloyd IF stage I.

Activation ids and tensors: arXiv 2410.03558, as its released configurations name them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from ..activations import Activation, Layout
from . import _latents
from ._walk import Found, found, named
from ._walk import block as transformer_block

DENOISERS = ("UNet2DConditionModel",)


# ---- what there is to capture ---------------------------------------------------------------------------------------


def list_activations(unet: nn.Module) -> list[Activation]:
    """All activations in forward order: 197 published ids and 32 text-side ones for SD1.5, 612 and 140 for SDXL."""
    return named(unet, _walk(unet))


def _walk(unet: Any) -> Iterator[Found]:
    yield found("unet-in", unet.conv_in, unet.conv_in.in_channels, 1, tap="input")
    yield found("unet-after-conv-in", unet.conv_in, unet.conv_in.out_channels, 1)
    stride = 1
    for level, block in enumerate(unet.down_blocks):
        yield from _repeats(f"down-level{level}", block, stride)
        for sampler in block.downsamplers or ():
            stride *= 2
            yield from _sampler(f"down-level{level}-downsampler", sampler, stride)
    if unet.mid_block is not None:
        yield from _mid(unet.mid_block, stride)
    for level, block in enumerate(unet.up_blocks):
        yield from _repeats(f"up-level{level}", block, stride)
        for sampler in block.upsamplers or ():
            stride //= 2
            yield from _sampler(f"up-level{level}-upsampler", sampler, stride)
    yield found("unet-out", unet.conv_out, unet.conv_out.out_channels, 1)


def _repeats(prefix: str, block: Any, stride: int) -> Iterator[Found]:
    attentions = list(getattr(block, "attentions", []))
    for repeat, resnet in enumerate(block.resnets):
        yield from _resnet(f"{prefix}-repeat{repeat}-res", resnet, stride)
        if attentions:
            yield from _vit(f"{prefix}-repeat{repeat}-vit", attentions[repeat], stride)


def _mid(block: Any, stride: int) -> Iterator[Found]:
    """The middle runs resnet 0, then (attention i, resnet i+1) for each attention."""
    yield from _resnet("mid-repeat0-res", block.resnets[0], stride)
    several = len(block.attentions) > 1
    for i, (attention, resnet) in enumerate(zip(block.attentions, block.resnets[1:], strict=True)):
        yield from _vit(f"mid-repeat{i}-vit" if several else "mid-vit", attention, stride)
        yield from _resnet(f"mid-repeat{i + 1}-res", resnet, stride)


def _resnet(prefix: str, resnet: ResnetBlock2D, stride: int) -> Iterator[Found]:
    yield found(f"{prefix}-increment", resnet.conv2, resnet.out_channels, stride)
    yield found(f"{prefix}-out", resnet, resnet.out_channels, stride)


def _sampler(prefix: str, sampler: Any, stride: int) -> Iterator[Found]:
    if isinstance(sampler, ResnetBlock2D):  # DeepFloyd IF resamples inside residual blocks
        yield from _resnet(prefix, sampler, stride)
    else:
        yield found(f"{prefix}-out", sampler, sampler.out_channels, stride)


def _vit(prefix: str, vit: nn.Module, stride: int) -> Iterator[Found]:
    if not isinstance(vit, Transformer2DModel):  # DeepFloyd IF has bare attention layers, of which nothing is published
        return
    for i, block in enumerate(vit.transformer_blocks):
        yield from transformer_block(f"{prefix}-block{i}", block, block.dim, stride, vit)
    yield found(f"{prefix}-out", vit, vit.out_channels, stride)


def layout(vit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
    """The grid inside a Transformer2DModel is that of the (B, C, h, w) tensor it is called with."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return Layout((hidden.shape[-2], hidden.shape[-1]))


def preset_model(unet: nn.Module, name: str) -> str | None:
    """``sd15`` for the topology of SD1.x and 2.x (the embedded model has it too), ``sdxl``, ``pgv2``, else none."""
    shape = tuple(tuple(len(a.transformer_blocks) for a in _vits(block)) for block in unet.up_blocks)  # type: ignore
    if shape == ((), (1, 1, 1), (1, 1, 1), (1, 1, 1)):
        return "sd15"
    if shape == ((10, 10, 10), (2, 2, 2), ()):
        return "pgv2" if re.search(r"playground[-_. ]?v?2", name, re.IGNORECASE) else "sdxl"
    return None


def _vits(block: Any) -> list[Any]:
    return [a for a in getattr(block, "attentions", []) if isinstance(a, Transformer2DModel)]


# ---- how the model is called ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conditions:
    """What one prompt tells the denoiser: ``text`` (tokens, C) and, for SDXL, ``pooled`` (C')."""

    text: Tensor
    pooled: Tensor | None = None


def pixels_per_cell(pipe: Any) -> int:
    """Image pixels along one side of a latent cell; 1 for a pixel-space model."""
    return int(pipe.vae_scale_factor) if _vae(pipe) is not None else 1


pixels_per_latent = pixels_per_cell


def multiple(pipe: Any) -> int:
    """Image sides must be multiples of this. A latent UNet fits any latent; IF halves its pixels at every level."""
    return pixels_per_cell(pipe) if _vae(pipe) is not None else 2 ** (len(pipe.unet.config.block_out_channels) - 1)


def _vae(pipe: Any) -> Any:
    return getattr(pipe, "vae", None)


def text_tokens(pipe: Any) -> int:
    """Of a chunk, which is all that a prompt of up to 75 tokens takes."""
    return int(pipe.tokenizer.model_max_length)


def encode_prompts(pipe: Any, prompts: list[str]) -> list[Conditions]:
    """Conditions of each prompt. CLIP prompts of any length: chunks of 75 tokens, each with its own BOS and EOS.

    Raises:
        ValueError: a DeepFloyd IF prompt is longer than its T5 context.
    """
    if _vae(pipe) is None:
        return [_encode_t5(pipe, p) for p in prompts]
    return [_encode_clip(pipe, p) for p in prompts]


def _encode_t5(pipe: Any, prompt: str) -> Conditions:
    if pipe.text_encoder is None:
        raise ValueError("the pipeline has no text encoder to encode the prompt with")
    _latents.refuse_long(pipe.tokenizer, prompt, 77)  # the context DeepFloyd IF was trained with
    text, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device=pipe._execution_device)
    return Conditions(text[0])


def _encode_clip(pipe: Any, prompt: str) -> Conditions:
    sdxl = getattr(pipe, "text_encoder_2", None) is not None
    pairs = [(pipe.tokenizer, pipe.text_encoder)]
    pairs += [(pipe.tokenizer_2, pipe.text_encoder_2)] if sdxl else []
    texts, pooled = [], None
    for tokenizer, encoder in pairs:
        if encoder is None:
            continue
        learned = set(tokenizer.added_tokens_encoder) - set(tokenizer.all_special_tokens)
        ids, mask = chunk_tokens(tokenizer, pipe.maybe_convert_prompt(prompt, tokenizer) if learned else prompt)
        ids, mask = ids.to(pipe._execution_device), mask.to(pipe._execution_device)
        uses_mask = getattr(encoder.config, "use_attention_mask", False)
        out = encoder(ids, attention_mask=mask if uses_mask else None, output_hidden_states=sdxl)
        texts.append((out.hidden_states[-2] if sdxl else out[0]).flatten(0, 1))
        pooled = out[0][0] if sdxl and out[0].ndim == 2 else pooled
    if not texts:
        raise ValueError("the pipeline has no text encoder to encode the prompt with")
    longest = max(len(t) for t in texts)
    if any(len(t) != longest for t in texts):
        raise ValueError("the two text encoders cut this prompt into different numbers of chunks; shorten it")
    return Conditions(torch.cat(texts, dim=-1), pooled)


def chunk_tokens(tokenizer: Any, prompt: str) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of a prompt, each (chunks, model_max_length); every chunk has its BOS and EOS."""
    length = tokenizer.model_max_length
    words = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids
    size = length - 2
    chunks = [words[i : i + size] for i in range(0, max(len(words), 1), size)]
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = [[bos, *c, eos, *[pad] * (size - len(c))] for c in chunks]
    masks = [[1] * (len(c) + 2) + [0] * (size - len(c)) for c in chunks]
    return torch.tensor(rows), torch.tensor(masks)


def encode_images(pipe: Any, images: Tensor, draw: Callable[[Tensor], Tensor] | None) -> Tensor:
    """(B, 3, H, W) in [-1, 1] → clean latents (B, c, h, w), scaled as the denoiser knows them.

    Args:
        draw: standard normal like its argument, to sample the VAE posterior; ``None`` takes its mean.
    """
    if _vae(pipe) is None:
        return images.to(pipe.unet.dtype)
    return _latents.encode_images(pipe, images, draw, pipe.unet.dtype)


def decode_latents(pipe: Any, latents: Tensor) -> Tensor:
    """The inverse of ``encode_images``."""
    return latents if _vae(pipe) is None else _latents.decode_latents(pipe, latents)


def denoise(pipe: Any, latents: Tensor, t: int, conditions: list[Conditions], size: tuple[int, int]) -> Tensor:
    """One call of the denoiser on x_t (B, c, h, w), conditioned on the training timestep t. Returns (B, c, h, w).

    Args:
        conditions: one an image.
        size: (height, width) of the images in pixels, which SDXL is conditioned on.
    """
    text, mask = _pad([c.text for c in conditions])
    text = text.to(latents)
    added: dict[str, Tensor] = {}
    if pipe.unet.config.addition_embed_type == "text_time":
        height, width = size
        times = torch.tensor([[height, width, 0, 0, height, width]] * len(latents))
        pooled = torch.stack([c.pooled for c in conditions if c.pooled is not None])
        added = {"text_embeds": pooled.to(latents), "time_ids": times.to(latents)}
    prediction = pipe.unet(
        latents,
        _latents.timesteps(latents, t),
        encoder_hidden_states=text,
        encoder_attention_mask=None if mask is None else mask.to(latents.device),
        added_cond_kwargs=added or None,
        return_dict=False,
    )[0]
    return prediction[:, : latents.shape[1]]  # DeepFloyd IF predicts the variance too


def _pad(texts: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Texts stacked to (B, longest, C), and a (B, longest) mask of what is text if they differ in length."""
    lengths = [len(t) for t in texts]
    stacked = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    if len(set(lengths)) == 1:
        return stacked, None
    return stacked, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
