"""The small SD1.5 denoiser on which the papers' released code was run, and the digest its captures are kept as."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn


def seeded(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def reproducible(model: nn.Module) -> nn.Module:
    """Weights that depend on nothing but each parameter's name and shape."""
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            drawn = seeded(name, *weight.shape)
            if weight.ndim > 1:
                weight.copy_(drawn * weight[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.1 * drawn)
            else:
                weight.copy_(0.05 * drawn)
    return model.eval()


def sd15() -> tuple[Any, dict[str, Any]]:
    """The denoiser, and the arguments it was called with: a batch of two 16x16 latents and nine text tokens."""
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    call = dict(
        sample=seeded("x", 2, 4, 16, 16), timestep=torch.tensor(51), encoder_hidden_states=seeded("c", 2, 9, 24)
    )
    return reproducible(unet), call


def digest(tensor: Tensor) -> dict[str, Any]:
    flat = tensor.float().reshape(-1)
    probes = torch.randint(0, flat.numel(), (16,), generator=torch.Generator().manual_seed(7))
    return {"mean": flat.mean().item(), "std": flat.std().item(), "probe": flat[probes].tolist()}
