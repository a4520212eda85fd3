"""The shipped weights draw what a prompt says: the ground it names, told by its colours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusion_features.embedded import TEST_SEED, label, path, render

GROUNDS = ("grass", "sand", "sea", "snow")
STEPS, GUIDANCE = 8, 3.0
FEWEST = 3  # of four that must be right; who guesses, or always says the same, has one
ROWS = 28  # of 128, at the bottom: no horizon is as low

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipe():
    found = diffusers.StableDiffusionPipeline.from_pretrained(path(), dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    """Mean colour of each ground in real renderings: (grounds, 3)."""
    scenes = [render(TEST_SEED + i, 64, style="clean") for i in range(60)]
    found = []
    for name in GROUNDS:
        masks = [scene.semantic == label(name) for scene in scenes]
        colours = [
            np.asarray(s.image, float)[m] for s, m in zip(scenes, masks, strict=True) if s.places[1].name == name
        ]
        found.append(np.concatenate(colours).mean(axis=0))
    return np.array(found)


def recognised(pipe, real: np.ndarray) -> int:
    """How many of the grounds in prompts are those whose real colour is nearest to the lower part of the picture."""
    prompts = [f"a photo of a cup on {name} under the sky" for name in GROUNDS]
    noises = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    images = pipe(
        prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noises, output_type="np"
    ).images
    lower = images[:, -ROWS:].reshape(len(GROUNDS), -1, 3).mean(axis=1) * 255
    distance = np.linalg.norm(lower[:, None] - real[None], axis=2)
    return int((distance.argmin(axis=1) == np.arange(len(GROUNDS))).sum())


def test_the_ground_of_a_prompt_can_be_recognised(pipe, real):
    assert recognised(pipe, real) >= FEWEST


def test_an_untrained_unet_fails_that_check(pipe, real):
    """It knows no prompt, so what it draws is the same for each."""
    torch.manual_seed(0)
    blank = diffusers.UNet2DConditionModel.from_config(pipe.unet.config).eval()
    parts = {**pipe.components, "unet": blank}
    other = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    assert recognised(other, real) < FEWEST
