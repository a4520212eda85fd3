"""IP-Adapters: against diffusers by hand, in company, without a trace, and where they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from diffusion_features import FeatureExtractor, LoadError
from diffusion_features.suppression import CFG, ControlNet, Denoise, IPAdapter, LoRA
from diffusion_features.suppression.words import from_words
from tests.suppression.models import control, extractor, photo, save_ip_adapter, save_lora
from tests.suppression.traces import close, left_behind, same, snapshot
from tests.tiny import save_sd15, sd15_pipe
from tests.tiny_families import save_sdxl


def test_it_equals_diffusers_by_hand_and_leaves_nothing_behind(tmp_path: Path) -> None:
    fx = extractor("unet")
    file, before = save_ip_adapter(fx, tmp_path), snapshot(fx)
    parts, config = dict(fx.pipe.components), fx.pipe.config
    base = fx(photo(), "a cat", t=300, seed=5, activations="unet-out")
    found = fx(photo(), "a cat", t=300, seed=5, activations="unet-out", suppress=IPAdapter(file, scale=0.7))
    assert not same(base, found)
    assert left_behind(before, snapshot(fx)) == []
    assert fx.pipe.components == parts and fx.pipe.config == config
    assert fx.denoiser.config.encoder_hid_dim_type is None and fx.denoiser.encoder_hid_proj is None  # type: ignore[union-attr]
    assert same(base, fx(photo(), "a cat", t=300, seed=5, activations="unet-out"))

    pipe = sd15_pipe()
    pipe.load_ip_adapter(str(tmp_path), "", file.name, image_encoder_folder="image_encoder")
    pipe.set_ip_adapter_scale(0.7)
    encoder = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "image_encoder").eval()
    seen = CLIPImageProcessor(size=32, crop_size=32)(photo(), return_tensors="pt").pixel_values
    ids = pipe.tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        embedding, text = encoder(seen).image_embeds, pipe.text_encoder(ids)[0]
        pixels = pipe.image_processor.preprocess(photo())
        clean = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        alpha = pipe.scheduler.alphas_cumprod[300]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        shown = {"image_embeds": [embedding[:, None]]}
        expected = pipe.unet(noisy, 300, text, added_cond_kwargs=shown).sample
    torch.testing.assert_close(found["unet-out"], expected, rtol=1e-4, atol=1e-5)


def test_a_pipeline_that_has_one_loaded_is_refused(tmp_path: Path) -> None:
    file = save_ip_adapter(extractor("unet"), tmp_path)
    pipe = sd15_pipe()
    pipe.load_ip_adapter(str(tmp_path), "", file.name, image_encoder_folder="image_encoder")
    fx = FeatureExtractor.from_pipe(pipe)
    with pytest.raises(ValueError, match=r"call pipe\.unload_ip_adapter\(\) first"):
        fx(photo())
    pipe.unload_ip_adapter()
    assert fx(photo())


def test_at_scale_zero_it_does_nothing_and_maps_are_those_of_the_prompt(tmp_path: Path) -> None:
    fx = extractor("unet")
    file = save_ip_adapter(fx, tmp_path)
    ids = ["down-level0-repeat0-vit-block0-cross-map", "up-level1-repeat1-vit-block0-cross-q"]
    base = fx(photo(), "a cat", activations=ids)
    assert same(base, fx(photo(), "a cat", activations=ids, suppress=IPAdapter(file, scale=0)))
    steered = fx(photo(), "a cat", activations=ids, suppress=IPAdapter(file))
    torch.testing.assert_close(base[ids[0]], steered[ids[0]])  # the first cross-attention: nothing has changed yet
    assert not torch.equal(base[ids[1]], steered[ids[1]])


def test_every_image_of_a_batch_is_its_own_prompt(tmp_path: Path) -> None:
    fx = extractor("unet")
    technique = IPAdapter(save_ip_adapter(fx, tmp_path))
    images = [photo(s, height=64, width=128) for s in range(2)]
    both = fx(images, t=100, seed=[3, 4], suppress=technique)
    close({id: tensor[1:] for id, tensor in both.items()}, fx(images[1], t=100, seed=4, suppress=technique))


def test_it_goes_with_all_others_in_any_order(tmp_path: Path) -> None:
    fx = extractor("unet")
    file, before = save_ip_adapter(fx, tmp_path / "ip"), snapshot(fx)
    lora = LoRA(save_lora(fx, tmp_path, text=True))
    techniques = [IPAdapter(file), ControlNet(control(fx)), lora, Denoise(20, 2), CFG(3.0)]
    together = fx(photo(), "a cat", t=100, suppress=techniques)
    close(together, fx(photo(), "a cat", t=100, suppress=techniques[::-1]))
    assert not same(together, fx(photo(), "a cat", t=100, suppress=techniques[1:]))
    assert left_behind(before, snapshot(fx)) == []


def test_sdxl_keeps_its_own_conditions(tmp_path: Path) -> None:
    fx = FeatureExtractor.from_pipe(StableDiffusionXLPipeline.from_pretrained(save_sdxl(tmp_path / "xl")), "mid-*-out")
    file = save_ip_adapter(fx, tmp_path / "ip")
    base = fx(photo(), "a cat")
    assert same(base, fx(photo(), "a cat", suppress=IPAdapter(file, scale=0)))
    assert not same(base, fx(photo(), "a cat", suppress={"type": "IPAdapter", "source": str(file)}))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    fx = extractor("unet")
    file, before = save_ip_adapter(fx, tmp_path), snapshot(fx)

    def refused(source: Path, message: str, on: FeatureExtractor = fx) -> None:
        with pytest.raises((ValueError, LoadError), match=message):
            on(photo(), suppress=IPAdapter(source))

    refused(
        file, r"UNets of pipelines .*; StableDiffusion3Pipeline \(SD3Transformer2DModel\) is none", extractor("sd3")
    )
    refused(tmp_path / "nowhere.safetensors", "There is no file")
    refused(save_lora(fx, tmp_path / "lora"), "no IP-Adapter|image encoder of the IP-Adapter")
    state = load_file(file)
    last = max(int(key.split(".")[1]) for key in state if key.startswith("ip_adapter"))
    changed = {key.replace(f"ip_adapter.{last}.", f"ip_adapter.{last + 2}."): w for key, w in state.items()}
    for name, weights, message in (
        (
            "more",
            {**{key: w.clone() for key, w in state.items()}, **changed},
            "does not fit this model: it has 17 layers, this model has 16",
        ),
        ("fewer", {k: w for k, w in state.items() if f"ip_adapter.{last}." not in k}, "does not fit this model"),
        ("wider", {k: torch.cat([w, w], -1) if "ip_adapter" in k else w for k, w in state.items()}, "does not fit"),
        ("faces", {k.replace("proj.proj.", "proj.proj.0."): w for k, w in state.items()}, "FaceID adapter"),
    ):
        save_file(weights, tmp_path / f"{name}.safetensors")
        refused(tmp_path / f"{name}.safetensors", message)
    torch.save({}, tmp_path / "pickle.bin")
    refused(tmp_path / "pickle.bin", "no safetensors file.* pickle=True")
    (tmp_path / "image_encoder" / "model.safetensors").rename(tmp_path / "image_encoder" / "other")
    refused(file, "image encoder of the IP-Adapter, image_encoder in .* cannot be loaded")
    assert left_behind(before, snapshot(fx)) == []


def test_a_pipeline_with_an_adapter_of_its_own_is_left_alone(tmp_path: Path) -> None:
    pipe = sd15_pipe()
    fx = FeatureExtractor.from_pipe(pipe, "mid-vit-block0-out")
    file = save_ip_adapter(fx, tmp_path)
    pipe.load_ip_adapter(str(tmp_path), "", file.name)
    with pytest.raises(ValueError, match=r"call pipe\.unload_ip_adapter\(\) first"):
        fx(photo(), suppress=IPAdapter(file))


def test_the_word_for_it(tmp_path: Path) -> None:
    fx = FeatureExtractor.from_pretrained(save_sd15(tmp_path), "mid-vit-block0-out", device="cpu")
    assert from_words("image=a.safetensors@0.5", fx) == IPAdapter("a.safetensors", scale=0.5)
    known = IPAdapter("h94/IP-Adapter", weight_name="models/ip-adapter_sd15.safetensors")
    assert from_words("image", fx) == known
