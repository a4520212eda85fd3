"""Tiny models of every family that has ControlNets, and random ControlNets and LoRAs that do something to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    HunyuanDiT2DControlNetModel,
    QwenImageControlNetModel,
    SanaControlNetModel,
    SD3ControlNetModel,
)
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusion_features import FeatureExtractor
from tests import tiny_dits
from tests.tiny import sd15_pipe
from tests.tiny_families import _sdxl

SIZE = 64
UNET_IDS = ["down-level0-repeat0-res-out", "mid-vit-block0-out", "up-level1-repeat1-vit-block0-cross-q"]
PIPES: dict[str, Callable[[], Any]] = {
    "unet": sd15_pipe,
    "sdxl": _sdxl,
    "sd3": tiny_dits.sd3,
    "flux": tiny_dits.flux_dev,
    "hunyuan": tiny_dits.hunyuan,
    "sana": tiny_dits.sana,
    "qwen": tiny_dits.qwen,
}


def photo(seed: int = 0, height: int = SIZE, width: int = SIZE) -> Image.Image:
    """Random blocks, so that there are edges."""
    blocks = torch.randint(0, 256, (height // 16, width // 16, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(blocks.to(torch.uint8).numpy()).resize((width, height), Image.Resampling.NEAREST)


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def extractor(name: str) -> FeatureExtractor:
    """An extractor of the tiny model, of activations early, in the middle and late."""
    pipe = seeded(PIPES[name])
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()  # else T5 drops out at random
    if name == "unet":
        return FeatureExtractor.from_pipe(pipe, UNET_IDS)
    if name == "sdxl":
        return FeatureExtractor.from_pipe(pipe, ["down-*-res-out", "mid-vit-out", "up-*-res-out"])
    return FeatureExtractor.from_pipe(pipe, ["vit-block*-out"])


def control(fx: FeatureExtractor, seed: int = 0) -> Any:
    """A ControlNet of the extractor's denoiser, with residuals that are not zero, as fresh ones are."""
    model: Any = fx.denoiser
    name = type(model).__name__
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "UNet2DConditionModel":
            made: Any = ControlNetModel.from_unet(model, conditioning_embedding_out_channels=(8, 8, 8, 8))
        elif name == "SD3Transformer2DModel":
            made = SD3ControlNetModel.from_config({**model.config, "num_layers": 2})  # from_transformer edits the model
        elif name == "FluxTransformer2DModel":
            made = FluxControlNetModel.from_transformer(
                model, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16
            )
        elif name == "HunyuanDiT2DModel":
            keys = ("num_attention_heads", "attention_head_dim", "in_channels", "patch_size", "cross_attention_dim",
                    "cross_attention_dim_t5", "pooled_projection_dim", "text_len", "text_len_t5", "mlp_ratio",
                    "hidden_size", "sample_size",
                    "use_style_cond_and_image_meta_size")  # fmt: skip
            settings = {key: model.config[key] for key in keys}
            made = HunyuanDiT2DControlNetModel(transformer_num_layers=model.config.num_layers, **settings)
        elif name == "SanaTransformer2DModel":
            keys = ("in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "patch_size",
                    "num_cross_attention_heads", "cross_attention_head_dim", "cross_attention_dim", "caption_channels",
                    "sample_size")  # fmt: skip
            made = SanaControlNetModel(num_layers=2, **{key: model.config[key] for key in keys})
        else:
            made = QwenImageControlNetModel.from_transformer(
                model, num_layers=2, attention_head_dim=16, num_attention_heads=2
            )
        for parameter in made.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.3)
    return made.eval()


def save_lora(fx: FeatureExtractor, folder: Path, name: str = "lora", text: bool = False, seed: int = 0) -> Path:
    """A random LoRA of the denoiser's attention, and of its first text encoder, as diffusers writes them."""
    pipe = fx.pipe
    denoiser = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    parts = {denoiser: ["to_q", "to_v"]} | ({"text_encoder": ["q_proj", "v_proj"]} if text else {})
    layers = {f"{part}_lora_layers": _random(getattr(pipe, part), targets, seed) for part, targets in parts.items()}
    type(pipe).save_lora_weights(folder, weight_name=f"{name}.safetensors", **layers)
    return folder / f"{name}.safetensors"


def _random(model: Any, targets: list[str], seed: int) -> dict[str, torch.Tensor]:
    other = type(model).from_config(model.config) if hasattr(model, "from_config") else type(model)(model.config)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=targets), other)
    state = get_peft_model_state_dict(other)
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=generator) * 0.3 for key, value in state.items()}


def save_ip_adapter(fx: FeatureExtractor, folder: Path, seed: int = 0) -> Path:
    """A random IP-Adapter of the extractor's UNet, and its image encoder beside it, as their repositories have them."""
    unet: Any = fx.denoiser
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=20,
    )  # fmt: skip
    seeded(lambda: CLIPVisionModelWithProjection(config)).save_pretrained(folder / "image_encoder")
    generator, width = torch.Generator().manual_seed(seed), unet.config.cross_attention_dim
    state = {
        "image_proj.proj.weight": torch.randn(4 * width, 20, generator=generator) * 0.3,
        "image_proj.proj.bias": torch.zeros(4 * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    crosses = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(crosses):
        channels = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        for what in ("to_k_ip", "to_v_ip"):
            state[f"ip_adapter.{2 * number + 1}.{what}.weight"] = (
                torch.randn(channels, width, generator=generator) * 0.3
            )
    save_file(state, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"
