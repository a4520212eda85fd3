"""The shipped transformers load by plain diffusers, are small, really trained, and find words in a scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffusion_features import FeatureExtractor
from diffusion_features.embedded import CLASSES, COLOURS, TEST_SEED, Scene, path, render
from diffusion_features.loading import load_pipeline
from segmentors import TrainingFreeSegmentor
from segmentors.training_free import PLAIN
from tests.embedded.overlap import mean_iou

MODELS = ("embedded-dit", "embedded-dit-small")
TIMES = {"embedded-dit": 5.0, "embedded-dit-small": 4.0}
"""How much better than an untrained one they find words, at least."""
#: Predicting zero scores 1.
HIGHEST_LOSS = 0.12
SIZE_LIMIT = 12 * 2**20
SCENES = 16

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module", params=MODELS)
def fx(request: pytest.FixtureRequest) -> FeatureExtractor:
    return FeatureExtractor(load_pipeline(request.param), "*", model_id=request.param)  # with the VAE's decoder


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render(TEST_SEED + i) for i in range(SCENES)]


def untrained(fx: FeatureExtractor) -> FeatureExtractor:
    torch.manual_seed(0)
    blank = diffusers.PixArtTransformer2DModel.from_config(fx.denoiser.config).eval()
    pipe = diffusers.PixArtAlphaPipeline(**{**fx.pipe.components, "transformer": blank})
    return FeatureExtractor(pipe, "*", model_id=fx.model_id)


@torch.no_grad()
def loss(fx: FeatureExtractor, scenes: Sequence[Scene], shift: int = 0) -> float:
    """Mean squared error of the predicted noise, with the captions moved on by ``shift`` scenes."""
    pixels = torch.stack([torch.from_numpy(np.array(scene.image)).permute(2, 0, 1) / 127.5 - 1 for scene in scenes])
    latents = fx.pipe.vae.encode(pixels).latent_dist.mode() * fx.pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    captions = [scenes[(i + shift) % len(scenes)].caption for i in range(len(scenes))]
    text, mask, *_ = fx.pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    t = torch.linspace(100, 900, len(scenes)).long()
    kept = fx.pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    predicted = fx.denoiser(
        kept.sqrt() * latents + (1 - kept).sqrt() * noise, text, t, {"resolution": None, "aspect_ratio": None},
        encoder_attention_mask=mask,
    ).sample  # fmt: skip
    return float(F.mse_loss(predicted, noise))


def attention_iou(fx: FeatureExtractor, scenes: Sequence[Scene]) -> float:
    """Mean IoU over classes of plain averages."""
    return mean_iou(TrainingFreeSegmentor(fx, method=replace(PLAIN, refine=False)), scenes)


@pytest.mark.parametrize("model", MODELS)
def test_the_folder_is_small_and_holds_only_safetensors(model: str) -> None:
    files = [file for file in path(model).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= SIZE_LIMIT
    assert {file.suffix for file in files} <= {".json", ".safetensors"}
    assert isinstance(diffusers.PixArtAlphaPipeline.from_pretrained(path(model)), diffusers.PixArtAlphaPipeline)


def test_the_tokenizer_knows_each_word_and_where_it_stands(fx: FeatureExtractor) -> None:
    tokenizer: Any = fx.pipe.tokenizer
    for word in (*CLASSES, *COLOURS):
        assert len(tokenizer(word).input_ids) == 2, word
    text = "a red car, zebra on ice!"
    pieces = [text[a:b] for a, b in tokenizer(text, return_offsets_mapping=True)["offset_mapping"][:-1]]
    assert pieces[:3] == ["a", "red", "car"]
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_weights_are_trained_and_read_the_caption(fx: FeatureExtractor, scenes: list[Scene]) -> None:
    right = loss(fx, scenes)
    assert right < HIGHEST_LOSS
    assert right < loss(fx, scenes, shift=1)
    assert loss(untrained(fx), scenes) > 2 * HIGHEST_LOSS


def test_attention_finds_the_words(fx: FeatureExtractor, scenes: list[Scene]) -> None:
    assert attention_iou(fx, scenes) > TIMES[fx.model_id] * attention_iou(untrained(fx), scenes)


def test_another_sampler_does_not_clip_its_latents(fx: FeatureExtractor) -> None:
    """They are larger than 1: clipped, all colours turn purple."""
    assert diffusers.DDIMScheduler.from_config(fx.pipe.scheduler.config).config.clip_sample is False


def test_only_the_blocks_that_are_needed_are_loaded(scenes: list[Scene], fx: FeatureExtractor) -> None:
    few = FeatureExtractor.from_pretrained(fx.model_id, "vit-block2-out")
    assert len(few.denoiser.transformer_blocks) == 3 < len(fx.denoiser.transformer_blocks)
    image, id = scenes[0].image, "vit-block2-out"
    assert torch.equal(few(image, "a cat", t=100)[id], fx(image, "a cat", t=100, activations=id)[id])


def test_its_presets_are_found_by_name(scenes: list[Scene], fx: FeatureExtractor) -> None:
    practical = FeatureExtractor.from_pretrained(fx.model_id)(scenes[0].image)
    assert {*practical} == {*fx.presets["practical"]}
    assert all(feature.isfinite().all() for feature in practical.values())


def test_it_draws_a_scene_again_from_the_same_seed(fx: FeatureExtractor) -> None:
    pipe = fx.pipe
    pipe.set_progress_bar_config(disable=True)
    images = [
        pipe("a red car on grass", num_inference_steps=2, output_type="np", use_resolution_binning=False,
             clean_caption=False, generator=torch.Generator().manual_seed(3)).images for _ in range(2)
    ]  # fmt: skip
    assert images[0].shape == (1, 128, 128, 3)
    assert np.array_equal(images[0], images[1])


def test_the_larger_one_predicts_the_noise_better(scenes: list[Scene]) -> None:
    large, small = (loss(FeatureExtractor(load_pipeline(model), "*", model_id=model), scenes) for model in MODELS)
    assert large < 0.9 * small
