"""The preset files, against the papers' settings and the schedulers that turned those into timesteps."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    PixArtTransformer2DModel,
    PNDMScheduler,
    UNet2DConditionModel,
)

from diffusion_features import FeatureExtractor, list_activations
from diffusion_features.activations import ANY, preset_folder, presets, select
from diffusion_features.families import family_of
from tests.tiny_dits import PIPELINES, build

STUDIED = 3 / 7
"""Of the depth of embedded-dit."""
XL = dict(
    sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=[1, 2, 10],
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
    attention_head_dim=[5, 10, 20], use_linear_projection=True,
)  # fmt: skip
MODELS: dict[str, Any] = {
    "sd15": lambda: UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8),
    "sdxl": lambda: UNet2DConditionModel(**XL),  # type: ignore[arg-type]
    "pgv2": lambda: UNet2DConditionModel(**XL),  # type: ignore[arg-type]
    "pixart": lambda: PixArtTransformer2DModel(caption_channels=4096, sample_size=128),
    "embedded-dit": lambda: PixArtTransformer2DModel(4, 32, num_layers=8, caption_channels=96, cross_attention_dim=128),
    "embedded-dit-small": lambda: PixArtTransformer2DModel(
        2, 32, num_layers=4, caption_channels=96, cross_attention_dim=64
    ),
    "hunyuan": lambda: HunyuanDiT2DModel(in_channels=4, patch_size=2, num_layers=40, hidden_size=1408),
    "flux": lambda: FluxTransformer2DModel(guidance_embeds=True),
}


@cache
def model(name: str) -> Any:
    with torch.device("meta"):
        return MODELS[name]()


def content(name: str) -> dict[str, Any]:
    return json.loads((preset_folder() / f"{name}.json").read_text(encoding="utf-8"))


def ids(name: str, preset: str) -> list[str]:
    return [a.id for a in select(list_activations(model(name)), preset, presets(name))]


def blocks(numbers: Any, suffix: str) -> set[str]:
    return {f"vit-block{i}-{suffix}" for i in numbers}


def test_every_file_is_of_a_family_and_complete() -> None:
    assert {file.stem for file in preset_folder().glob("*.json")} == {*MODELS, ANY}
    called = {"pgv2": "playground-v2"} | {name: name for name in MODELS if "embedded" in name}  # of one topology
    for name in MODELS:
        assert family_of(model(name)).preset_model(model(name), called.get(name, "")) == name
    for name in (*MODELS, ANY):
        for preset in content(name).values():
            assert set(preset) == {"source", "t", "activations"} and "arXiv" in preset["source"]
            assert isinstance(preset["t"], int) and 0 < preset["t"] < 1000


@pytest.mark.parametrize("name", PIPELINES)
def test_every_transformer_has_the_preset_of_the_study(name: str) -> None:
    fx = FeatureExtractor.from_pipe(build(name), "study")
    (found,) = fx.activations
    blocks = [a.id for a in fx.available if re.fullmatch(r"vit-block\d+-out", a.id)]
    assert found.kind == "spatial" and found.id == blocks[round(STUDIED * (len(blocks) - 1))]


@pytest.mark.parametrize(("name", "blocks"), [("embedded-dit", 8), ("pixart", 28), ("hunyuan", 40), ("flux", 57)])
def test_the_study_is_read_at_the_same_depth(name: str, blocks: int) -> None:
    """The block of another transformer that is as far from its first as the studied one is from its own."""
    has = list_activations(model(name))
    (found,) = presets(name, has)["study"]
    block = int(found.removeprefix("vit-block").removesuffix("-out"))
    assert abs(block / (blocks - 1) - 3 / 7) <= 0.5 / (blocks - 1) + 0.01


def test_a_unet_has_no_preset_of_transformers() -> None:
    assert "study" not in presets("sd15", list_activations(model("sd15")))


@pytest.mark.parametrize(
    ("name", "preset", "crosses", "others"),
    [
        ("pixart", "goca", 28, {"vit-block13-cross-q"} | blocks(range(10, 18), "self-map")),
        ("pixart", "goca-low-memory", 8, {"vit-block13-cross-q"} | blocks(range(10, 18), "self-map")),
        ("hunyuan", "goca", 10, {"vit-block25-cross-q"} | blocks(range(20, 30), "self-map")),
        ("flux", "goca", 57, {"vit-block27-attn-out"} | blocks((12, 18), "self-map")),
        ("flux", "goca-low-memory", 5, {"vit-block27-attn-out"} | blocks((12, 18), "self-map")),
        ("sd15", "goca", 16, {
            "up-level2-repeat1-vit-block0-cross-q", "up-level3-repeat0-vit-block0-self-map",
            "up-level3-repeat1-vit-block0-self-map", "down-level0-repeat1-vit-block0-self-map",
        }),
        ("sdxl", "goca", 70, {
            "up-level1-repeat0-vit-block0-cross-q", "down-level1-repeat0-vit-block0-self-map",
            "down-level1-repeat0-vit-block1-self-map", "up-level1-repeat0-vit-block0-self-map",
            "up-level1-repeat0-vit-block1-self-map", "up-level1-repeat1-vit-block0-self-map",
            "up-level1-repeat1-vit-block1-self-map", "up-level1-repeat2-vit-block0-self-map",
        }),
    ],
)  # fmt: skip
def test_layers_of_goca(name: str, preset: str, crosses: int, others: set[str]) -> None:
    """arXiv 2603.06178, its settings of each model."""
    found = ids(name, preset)
    maps = {id for id in found if id.endswith("cross-map")}
    assert len(maps) == crosses and set(found) - maps == others
    low = {"pixart": blocks(range(10, 18), "cross-map"), "flux": blocks((12, 18, 27, 28, 29), "cross-map")}
    assert "low" not in preset or maps == low[name]
    assert name != "hunyuan" or maps == blocks(range(20, 30), "cross-map")


def test_layer_of_dift() -> None:
    """1280 channels at half the latents' resolution: 48 x 48 at 768 pixels, as its users report."""
    (found,) = (a for a in list_activations(model("sd15")) if a.id in ids("sd15", "dift"))
    assert (found.channels, found.stride, found.module) == (1280, 2, "up_blocks.1.upsamplers.0")


def img2img_timestep(scheduler: Any, steps: int, strength: float, **options: Any) -> int:
    """The first timestep of diffusers' image-to-image pipelines, which the released code takes for these models."""
    scheduler.set_timesteps(**(options or {"num_inference_steps": steps}))
    return round(float(scheduler.timesteps[int(max(steps - min(steps * strength, steps), 0))]))


SD_BETAS: Any = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_timesteps_are_what_the_denoiser_was_told() -> None:
    def released(scheduler: Any, t: int) -> int:
        scheduler.set_timesteps(1000)
        return int(scheduler.timesteps[1000 - t])

    sd15 = PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1)
    sdxl = EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1)
    pixart = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    assert content("sd15")["goca"]["t"] == released(sd15, 100)
    assert {content("sd15")[name]["t"] for name in content("sd15") if "ama" in name} == {released(sd15, 50)}
    assert content("sd15")["practical"]["t"] == content("sd15")["legacy"]["t"] == released(sd15, 50)
    assert content("sdxl")["goca"]["t"] == released(sdxl, 100)
    assert {
        content(name)[preset]["t"] for name in ("sdxl", "pgv2") for preset in presets(name) if preset != "goca"
    } == {released(sdxl, 50)}
    assert {preset["t"] for preset in content("pixart").values()} == {released(pixart, 100)}
    hunyuan = DDPMScheduler(timestep_spacing="leading", steps_offset=1)
    assert content("hunyuan")["goca"]["t"] == img2img_timestep(hunyuan, 50, 0.1)
    flux = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
    )
    sigmas = torch.linspace(1, 1 / 28, 28).tolist()
    found = img2img_timestep(flux, 28, 0.15, sigmas=sigmas, mu=1.15)  # 4096 tokens, 1024 x 1024 pixels
    assert {preset["t"] for preset in content("flux").values()} == {found} == {407}
