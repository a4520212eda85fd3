"""The shipped ControlNet and LoRAs load by diffusers' own loaders, and do what they are for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from torch import Tensor

from diffusion_features.embedded import TEST_SEED, TRAIN_SEED, path, render
from diffusion_features.suppression.words import EMBEDDED_CANNY

SCENES = 24
HOME = Path(path()).parent
#: Where training/train_lora.py begins; the over-fitted adapter has seen the first two from here, and no others.
LEARNT = TRAIN_SEED + 4_000_000
SIZE_LIMIT = 12 * 2**20


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(path(), dtype=torch.float32)


@dataclass
class Batch:
    """Scenes as pixels in [-1, 1], noised latents, the noise, timesteps and token ids."""

    pixels: Tensor
    noisy: Tensor
    noise: Tensor
    t: Tensor
    ids: Tensor


@torch.no_grad()
def batch(pipe: Any, first: int, count: int = SCENES, style: str | None = None, repeat: int = 1) -> Batch:
    scenes = [render(first + i, 128, style=style) for i in range(count)] * repeat
    pixels = torch.from_numpy(np.stack([np.asarray(scene.image) for scene in scenes])).permute(0, 3, 1, 2) / 127.5 - 1
    latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(300, 900, len(scenes)).long()
    ids = pipe.tokenizer(
        [s.caption for s in scenes], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    return Batch(pixels, pipe.scheduler.add_noise(latents, noise, t), noise, t, ids)


@torch.no_grad()
def loss(pipe: Any, drawn: Batch, **residuals: Any) -> float:
    """Mean squared error of the predicted noise."""
    text = pipe.text_encoder(drawn.ids).last_hidden_state
    return torch.nn.functional.mse_loss(pipe.unet(drawn.noisy, drawn.t, text, **residuals).sample, drawn.noise).item()


@torch.no_grad()
def controlled(pipe: Any, control: ControlNetModel, drawn: Batch, edges: Tensor) -> float:
    text = pipe.text_encoder(drawn.ids).last_hidden_state
    down, mid = control(drawn.noisy, drawn.t, text, edges, return_dict=False)
    return loss(pipe, drawn, down_block_additional_residuals=down, mid_block_additional_residual=mid)


def test_edges_help_and_those_of_another_scene_do_not(pipe: StableDiffusionPipeline) -> None:
    control = ControlNetModel.from_pretrained(HOME / "canny", dtype=torch.float32)
    drawn = batch(pipe, TEST_SEED)
    edges = EMBEDDED_CANNY(drawn.pixels)
    alone = loss(pipe, drawn)
    assert controlled(pipe, control, drawn, edges) < alone
    assert controlled(pipe, control, drawn, edges.roll(1, dims=0)) > alone


def test_the_adapter_knows_sketches_it_never_saw(pipe: StableDiffusionPipeline) -> None:
    drawn = batch(pipe, TEST_SEED, style="sketch")
    alone = loss(pipe, drawn)
    pipe.load_lora_weights(HOME / "lora", weight_name="sketch.safetensors", adapter_name="sketch")
    assert loss(pipe, drawn) < 0.9 * alone
    pipe.load_lora_weights(HOME / "lora", weight_name="sketch-overfitted.safetensors", adapter_name="other")
    pipe.set_adapters(["sketch"])
    fitted = loss(pipe, drawn)
    pipe.set_adapters(["other"])
    assert loss(pipe, drawn) > fitted


def test_the_overfitted_one_knows_its_two_by_heart(pipe: StableDiffusionPipeline) -> None:
    by_heart = batch(pipe, LEARNT, 2, style="sketch", repeat=12)
    pipe.load_lora_weights(HOME / "lora", weight_name="sketch.safetensors", adapter_name="sketch")
    fitted = loss(pipe, by_heart)
    pipe.delete_adapters(["sketch"])
    pipe.load_lora_weights(HOME / "lora", weight_name="sketch-overfitted.safetensors")
    assert loss(pipe, by_heart) < 0.9 * fitted


def test_they_are_small_and_only_safetensors() -> None:
    files = [file for name in ("canny", "lora") for file in (HOME / name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= SIZE_LIMIT
    assert {file.suffix for file in files} == {".json", ".safetensors"}
