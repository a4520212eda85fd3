"""The shipped pipeline loads by plain diffusers, is small, and is really trained."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion_features import FeatureExtractor
from diffusion_features.embedded import CLASSES, COLOURS, TEST_SEED, path, render
from segmentors import TrainingFreeSegmentor
from segmentors.training_free import PLAIN, PRESETS
from tests.embedded.overlap import mean_iou

SCENES = 16
#: Predicting zero scores 1. The shipped weights score about 0.05; the floor leaves room for other kernels.
HIGHEST_LOSS = 0.12
SIZE_LIMIT = 25 * 2**20
#: Mean IoU of plain averages of cross-attention on the scenes; the shipped weights 0.71, an untrained UNet 0.12.
LOWEST_IOU = 0.6

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipe():
    return diffusers.StableDiffusionPipeline.from_pretrained(path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def batch(pipe):
    """Sixteen test scenes: clean and noised latents, noise, timesteps, token ids."""
    scenes = [render(TEST_SEED + i) for i in range(SCENES)]
    pixels = np.stack([np.asarray(scene.image) for scene in scenes])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(x).latent_dist.mode() * pipe.vae.config.scaling_factor
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    t = torch.linspace(100, 900, SCENES).long()
    ids = pipe.tokenizer([s.caption for s in scenes], padding="max_length", return_tensors="pt").input_ids
    return pipe.scheduler.add_noise(latents, noise, t), noise, t, ids, latents


@torch.no_grad()
def loss(pipe, unet, batch, shift=0):
    """Mean squared error of the predicted noise, with the captions moved on by ``shift`` scenes."""
    noisy, noise, t, ids, _ = batch
    text = pipe.text_encoder(ids.roll(shift, dims=0)).last_hidden_state
    return torch.nn.functional.mse_loss(unet(noisy, t, text).sample, noise).item()


@pytest.fixture(scope="module")
def right(pipe, batch):
    return loss(pipe, pipe.unet, batch)


def test_folder_is_small_and_only_safetensors():
    files = [file for file in path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= SIZE_LIMIT
    weights = {file.suffix for file in files} - {".json", ".txt"}
    assert weights == {".safetensors"}


def test_index_names_no_safety_checker():
    index = json.loads((path() / "model_index.json").read_text())
    for part in ("safety_checker", "feature_extractor", "image_encoder"):
        assert index[part] == [None, None]
    assert index["requires_safety_checker"] is False


def test_loads_in_either_precision(pipe):
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    half = diffusers.StableDiffusionPipeline.from_pretrained(path(), dtype=torch.float16)
    assert half.unet.dtype == torch.float16


def test_tokenizer_knows_every_word_and_offsets(pipe):
    tokenizer = pipe.tokenizer
    assert tokenizer.model_max_length == 32
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == pipe.text_encoder.config.eos_token_id
    assert tokenizer.bos_token_id == pipe.text_encoder.config.bos_token_id
    words = {w for i in range(60) for w in render(i, 32, supersample=1).caption.replace(",", " ").split()}
    for word in {*words, *CLASSES, *COLOURS}:
        assert len(tokenizer(word).input_ids) == 3, word
    text = "A red CAR, zebra on ice!"
    coded = tokenizer(text, return_offsets_mapping=True)
    pieces = [text[a:b].lower() for a, b in coded["offset_mapping"][1:-1]]
    assert pieces[:4] == ["a", "red", "car", ","]
    assert "".join(pieces) == text.lower().replace(" ", "")


def test_autoencoder_reconstructs(pipe, batch):
    scene = render(TEST_SEED)
    with torch.no_grad():
        image = pipe.vae.decode(batch[4][:1] / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
    shown = (image[0].permute(1, 2, 0).numpy() + 1) * 127.5
    error = np.mean((shown - np.asarray(scene.image, np.float32)) ** 2)
    assert 10 * np.log10(255**2 / error) > 22


def test_weights_are_trained(right):
    assert right < HIGHEST_LOSS


def test_an_untrained_model_fails_that_check(pipe, batch):
    torch.manual_seed(0)
    untrained = diffusers.UNet2DConditionModel.from_config(pipe.unet.config).eval()
    assert loss(pipe, untrained, batch) > 2 * HIGHEST_LOSS


def test_the_caption_matters(pipe, batch, right):
    assert right < loss(pipe, pipe.unet, batch, shift=1)


def attention_iou(pipe) -> float:
    """Mean IoU over classes of plain averages."""
    segment = TrainingFreeSegmentor(FeatureExtractor.from_pipe(pipe), PRESETS["embedded"], replace(PLAIN, refine=False))
    return mean_iou(segment, [render(TEST_SEED + i) for i in range(SCENES)])


def test_attention_finds_the_words(pipe):
    assert attention_iou(pipe) > LOWEST_IOU


def test_attention_of_an_untrained_model_does_not(pipe):
    torch.manual_seed(0)
    untrained = diffusers.UNet2DConditionModel.from_config(pipe.unet.config).eval()
    assert attention_iou(diffusers.StableDiffusionPipeline(
        **{**pipe.components, "unet": untrained}, requires_safety_checker=False
    )) < LOWEST_IOU / 1.5  # fmt: skip


def test_samples_are_reproducible(pipe):
    pipe.set_progress_bar_config(disable=True)
    images = [
        pipe("a red car on grass", num_inference_steps=2, output_type="np",
             generator=torch.Generator().manual_seed(3)).images for _ in range(2)
    ]  # fmt: skip
    assert images[0].shape == (1, 128, 128, 3)
    assert np.array_equal(images[0], images[1])
