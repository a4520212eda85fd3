"""Draws the pictures of ``docs/embedded.md``: ``python training/pictures.py world``, or another of ``SHEETS``."""

from __future__ import annotations

import argparse
import copy
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    PixArtAlphaPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from PIL import Image, ImageDraw, ImageFont
from scenes import ROOT

from diffusion_features.embedded import TEST_SEED, path, render
from diffusion_features.images import as_tensor
from diffusion_features.suppression.words import EMBEDDED_CANNY

IMAGES = ROOT / "docs" / "images"
COLUMNS, SIDE, GAP, TEXT = 6, 192, 14, 50
PROMPTS = (
    "a red car on a gray road under a blue sky",
    "a yellow boat on a calm sea under a cloudy sky",
    "a purple house on green grass under a blue sky",
    "an orange cat on white snow under a night sky",
    "a green tree on green grass under a sunset sky",
    "a blue fish, sea, sand",
    "a pink balloon under a blue sky, on yellow sand",
    "a photo of a red mushroom on green grass near the sea",
    "a white cup on a gray road under a night sky",
    "a red apple and a blue cup on yellow sand under the sky",
    "a blue bird with green grass and a cloudy sky",
    "a yellow umbrella on yellow sand near a blue sea",
)


def sheet(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Lay out captioned pictures in rows of ``COLUMNS`` on a white page."""
    font = ImageFont.load_default(11)
    rows = -(-len(pictures) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + TEXT + GAP) + GAP), "white")
    draw = ImageDraw.Draw(page)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = GAP + i % COLUMNS * (SIDE + GAP), GAP + i // COLUMNS * (SIDE + TEXT + GAP)
        page.paste(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (x, y))
        lines = textwrap.wrap(caption, 32)[:3]
        draw.multiline_text((x, y + SIDE + 4), "\n".join(lines), fill=(60, 60, 66), font=font, spacing=2)
    return page


def world() -> Image.Image:
    """Return a sheet of test scenes with their captions."""
    scenes = [render(TEST_SEED + i, SIDE) for i in range(18)]
    return sheet([scene.image for scene in scenes], [scene.caption for scene in scenes])


def samples(pipe: DiffusionPipeline, prompts: Sequence[str] = PROMPTS, steps: int = 20, **call: Any) -> Image.Image:
    """Return a sheet of what ``pipe(**call)`` generates for ``prompts`` with DDIM and guidance 4."""
    sampler = copy.copy(pipe)
    sampler.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    sampler.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for i in range(0, len(prompts), COLUMNS):
        row = list(prompts[i : i + COLUMNS])
        generators = [torch.Generator().manual_seed(i + k) for k in range(len(row))]
        found = sampler(row, num_inference_steps=steps, guidance_scale=4.0, generator=generators, **call)
        pictures += found.images
    return sheet(pictures, prompts)


def adapters(numbers: Sequence[int] = (7, 8, 9)) -> Image.Image:
    """Return a sheet, a row for each scene: it, its edges, and what is generated without and with each adapter."""
    home = path().parent
    control = ControlNetModel.from_pretrained(home / "canny", dtype=torch.float32)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        path(), controlnet=control, dtype=torch.float32, requires_safety_checker=False
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    names = ("sketch", "sketch-overfitted")
    for name in names:
        pipe.load_lora_weights(home / "lora", weight_name=f"{name}.safetensors", adapter_name=name.replace("-", "_"))
    pictures, titles = [], []
    for number in numbers:
        scene = render(TEST_SEED + number)
        edges = EMBEDDED_CANNY(as_tensor(scene.image))
        pictures += [scene.image, Image.fromarray((edges[0, 0].numpy() * 255).astype("uint8")).convert("RGB")]
        titles += [scene.caption, "its edges"]
        for lora, scale in ((None, 0.0), (None, 1.0), *((name, 0.0) for name in names)):
            pipe.set_adapters([(lora or names[0]).replace("-", "_")], [1.0 if lora else 0.0])
            pictures += pipe(
                scene.caption, edges, num_inference_steps=20, guidance_scale=4.0, controlnet_conditioning_scale=scale,
                generator=torch.Generator().manual_seed(number),
            ).images  # fmt: skip
            titles.append(f"LoRA {lora}" if lora else "the ControlNet" if scale else "caption alone")
    return sheet(pictures, titles)


def transformer(model: str) -> Image.Image:
    """Return the sheet of samples of a transformer."""
    # Binning would generate at 256 pixels, the smallest size that PixArt's own table has, and shrink the result.
    call = {"use_resolution_binning": False, "clean_caption": False}
    return samples(PixArtAlphaPipeline.from_pretrained(path(model), dtype=torch.float32), **call)


def shipped() -> Image.Image:
    """Return the sheet of samples of the UNet."""
    return samples(StableDiffusionPipeline.from_pretrained(path(), dtype=torch.float32))


SHEETS = {"world": world, "samples": shipped, "adapters": adapters, "dit": partial(transformer, "embedded-dit"),
          "dit_small": partial(transformer, "embedded-dit-small")}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=[*SHEETS])
    which = parser.parse_args().which
    IMAGES.mkdir(parents=True, exist_ok=True)
    SHEETS[which]().save(IMAGES / ("world.png" if which == "world" else f"embedded_{which}.png"), optimize=True)
