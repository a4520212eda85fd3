"""HunyuanDiT: a transformer whose blocks attend to the image, then to a BERT and a T5 prompt side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from torch import Tensor, nn

from ..activations import Activation, Layout
from . import _latents, _patches
from ._walk import block, named

DENOISERS = ("HunyuanDiT2DModel",)
BLOCKS = ("blocks",)


def list_activations(transformer: Any) -> list[Activation]:
    """Ten ids a block, as for PixArt, two of them text-side."""
    channels, stride = transformer.inner_dim, transformer.config.patch_size
    blocks = enumerate(transformer.blocks)
    return named(
        transformer,
        (f for i, b in blocks for f in block(f"vit-block{i}", b, channels, stride, transformer)),
    )


def layout(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
    """The grid is that of the latents, divided into patches."""
    latents = args[0] if args else kwargs["hidden_states"]
    return Layout(_patches.grid(latents, transformer.config.patch_size))


def preset_model(transformer: nn.Module, name: str) -> str | None:
    return "hunyuan"


@dataclass(frozen=True)
class Conditions:
    """What one prompt tells the denoiser: the text and mask of BERT (tokens, C), (tokens,), and those of T5."""

    bert: Tensor
    bert_mask: Tensor
    t5: Tensor
    t5_mask: Tensor


pixels_per_cell = pixels_per_latent = _patches.pixels_per_latent
multiple = _patches.multiple


def text_tokens(pipe: Any) -> int:
    """Of BERT, then of T5."""
    return int(pipe.transformer.config.text_len + pipe.transformer.config.text_len_t5)


def encode_prompts(pipe: Any, prompts: list[str]) -> list[Conditions]:
    """Conditions of each prompt.

    Raises:
        ValueError: a prompt is longer than the T5 context. (BERT's 77 tokens are its beginning, as in generation.)
    """
    encoded = []
    for prompt in prompts:
        _latents.refuse_long(pipe.tokenizer_2, prompt, pipe.transformer.config.text_len_t5)
        found: list[Tensor] = []
        lengths = (pipe.transformer.config.text_len, pipe.transformer.config.text_len_t5)
        for index, length in enumerate(lengths):
            text, _, mask, _ = pipe.encode_prompt(
                prompt,
                device=pipe._execution_device,
                do_classifier_free_guidance=False,
                max_sequence_length=length,
                text_encoder_index=index,
            )
            found += [text[0], mask[0]]
        encoded.append(Conditions(*found))
    return encoded


def encode_images(pipe: Any, images: Tensor, draw: Callable[[Tensor], Tensor] | None) -> Tensor:
    return _latents.encode_images(pipe, images, draw, pipe.transformer.dtype)


decode_latents = _latents.decode_latents


def denoise(pipe: Any, latents: Tensor, t: int, conditions: list[Conditions], size: tuple[int, int]) -> Tensor:
    """One call of the denoiser, told the size of an uncropped image. Returns ε (B, c, h, w)."""
    transformer, rows = pipe.transformer, len(latents)
    height, width = size
    patch, cell = transformer.config.patch_size, pixels_per_cell(pipe)
    grid = (height // cell // patch, width // cell // patch)
    rotary = get_2d_rotary_pos_embed(
        transformer.inner_dim // transformer.num_heads,
        get_resize_crop_region_for_grid(grid, 512 // 8 // patch),
        grid,
        device=latents.device,
        output_type="pt",
    )
    prediction = transformer(
        latents,
        _latents.timesteps(latents, t).to(latents.dtype),
        encoder_hidden_states=torch.stack([c.bert for c in conditions]).to(latents),
        text_embedding_mask=torch.stack([c.bert_mask for c in conditions]).to(latents.device),
        encoder_hidden_states_t5=torch.stack([c.t5 for c in conditions]).to(latents),
        text_embedding_mask_t5=torch.stack([c.t5_mask for c in conditions]).to(latents.device),
        image_meta_size=torch.tensor([[height, width, height, width, 0, 0]] * rows).to(latents),
        style=torch.zeros(rows, dtype=torch.long, device=latents.device),
        image_rotary_emb=rotary,
        return_dict=False,
    )[0]
    return prediction[:, : latents.shape[1]]  # the rest is the predicted variance
