"""The shipped weights draw what a prompt says: the ground it names, told by its colours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusion_features.embedded import TEST_SEED, label, path, render

GROUNDS = ("grass", "sand", "sea", "snow")
STEPS, GUIDANCE, NOISES = 8, 3.0, 3
FEWEST = 7  # of twelve that must be right; who guesses, or always says the same, has three
PIXART = {"use_resolution_binning": False, "clean_caption": False}
ROWS = 28  # of 128, at the bottom: no horizon is as low

diffusers = pytest.importorskip("diffusers")


#: The denoiser of each model, its pipeline in diffusers, and what PixArt's wants to be told of 128 pixels.
MODELS = {
    "embedded": ("unet", "StableDiffusionPipeline", {}),
    "embedded-dit": ("transformer", "PixArtAlphaPipeline", PIXART),
    "embedded-dit-small": ("transformer", "PixArtAlphaPipeline", PIXART),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(model):
    return quiet(getattr(diffusers, MODELS[model][1]).from_pretrained(path(model), dtype=torch.float32))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


def recognised(pipe, real: np.ndarray, call: dict[str, bool]) -> int:
    """How many of the grounds in prompts are those whose real colour is nearest to the lower part of the picture."""
    prompts = [f"a photo of a cup on {name} under the sky" for name in GROUNDS] * NOISES
    noises = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    images = pipe(
        prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noises, output_type="np", **call
    ).images
    lower = images[:, -ROWS:].reshape(len(prompts), -1, 3).mean(axis=1) * 255
    distance = np.linalg.norm(lower[:, None] - real[None], axis=2)
    return int((distance.argmin(axis=1) == np.tile(np.arange(len(GROUNDS)), NOISES)).sum())


def test_the_ground_of_a_prompt_can_be_recognised(pipe, real, model):
    assert recognised(pipe, real, MODELS[model][2]) >= FEWEST


def test_an_untrained_denoiser_fails_that_check(pipe, real, model):
    """It knows no prompt: what it draws does not depend on it."""
    torch.manual_seed(0)
    name, _, call = MODELS[model]
    blank = type(pipe.components[name]).from_config(pipe.components[name].config).eval()
    other = quiet(type(pipe)(**{**pipe.components, name: blank}))
    assert recognised(other, real, call) < FEWEST
