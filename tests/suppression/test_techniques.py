"""Techniques on a UNet and on transformers: what they change, and that nothing of them stays."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffusion_features import FeatureExtractor
from diffusion_features.suppression import CFG, ControlNet, Denoise, FineGrainedPrompt, LoRA
from diffusion_features.suppression.conditions import canny
from tests.suppression.models import PIPES, UNET_IDS, control, extractor, photo, save_lora
from tests.suppression.traces import close, left_behind, same, snapshot
from tests.tiny import save_sd15, sd15_pipe

BOTH = ["unet", "sd3"]


# ---- ControlNet -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPES)
def test_control_reaches_the_features_and_at_scale_zero_does_nothing(name: str) -> None:
    fx = extractor(name)
    net, before = control(fx), snapshot(fx)
    base = fx(photo(), "a cat", t=200)
    steered = fx(photo(), "a cat", t=200, suppress=[ControlNet(net)])
    assert any(not torch.equal(base[id], steered[id]) for id in base)
    assert same(base, fx(photo(), "a cat", t=200, suppress=[ControlNet(net, scale=0)]))
    assert left_behind(before, snapshot(fx)) == []
    assert same(base, fx(photo(), "a cat", t=200))


def test_control_equals_the_residuals_of_diffusers_by_hand() -> None:
    fx = extractor("unet")
    pipe, net = fx.pipe, control(fx)
    prompt, t = "a red cat", 300
    features = fx(photo(), prompt, t=t, seed=5, activations="unet-out", suppress=[ControlNet(net, scale=0.7)])
    pixels = torch.from_numpy(np.array(photo())).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(5))[None]
        alpha = pipe.scheduler.alphas_cumprod[t]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        ids = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        text = pipe.text_encoder(ids)[0]
        down, mid = net(noisy, t, text, canny(pixels), conditioning_scale=0.7, return_dict=False)
        expected = pipe.unet(
            noisy, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
    torch.testing.assert_close(features["unet-out"], expected, rtol=1e-4, atol=1e-5)


def test_sd3_control_equals_the_pipeline_of_diffusers_by_hand() -> None:
    fx = extractor("sd3")
    pipe, net, t = fx.pipe, control(fx), 400
    features = fx(photo(), "a cat", t=t, seed=1, suppress=[ControlNet(net)])
    pixels = torch.from_numpy(np.array(photo())).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        scale, shift = pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor
        clean = (pipe.vae.encode(pixels).latent_dist.mean - shift) * scale
        edges = pipe.vae.encode(canny(pixels) * 2 - 1).latent_dist.mean * scale  # without the shift, as it was trained
        noise = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(1))[None]
        noisy, level = 0.6 * clean + 0.4 * noise, torch.tensor([t])
        text, _, pooled, _ = pipe.encode_prompt("a cat", None, None, do_classifier_free_guidance=False)
        residuals = net(
            noisy, edges, encoder_hidden_states=text, pooled_projections=torch.zeros_like(pooled), timestep=level
        ).controlnet_block_samples
        blocks: dict[str, Tensor] = {}
        handles = [
            block.register_forward_hook(lambda m, a, out, i=i: blocks.__setitem__(f"vit-block{i}-out", out[1]))
            for i, block in enumerate(pipe.transformer.transformer_blocks)
        ]
        pipe.transformer(noisy, text, pooled, level, block_controlnet_hidden_states=residuals)
        for handle in handles:
            handle.remove()
    for id, tokens in blocks.items():
        torch.testing.assert_close(features[id].flatten(2).mT, tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_several_controls_add_up_in_any_order(name: str) -> None:
    fx = extractor(name)
    nets = [ControlNet(control(fx, seed=s), scale=s + 0.5) for s in range(2)]
    together = fx(photo(), t=200, suppress=nets)
    close(together, fx(photo(), t=200, suppress=nets[::-1]))
    assert not same(together, fx(photo(), t=200, suppress=nets[:1]))


def test_control_of_a_model_that_was_loaded_in_part_steers_the_blocks_as_the_whole_does(tmp_path: Path) -> None:
    whole = extractor("sd3")
    whole.pipe.save_pretrained(tmp_path)
    part = FeatureExtractor.from_pretrained(tmp_path, ["vit-block1-out"], dtype=torch.float32, device="cpu")
    assert len(part.denoiser.transformer_blocks) < len(whole.denoiser.transformer_blocks)  # type: ignore[arg-type]
    technique = ControlNet(control(whole))
    expected = whole(photo(), "a cat", suppress=[technique])["vit-block1-out"]
    torch.testing.assert_close(part(photo(), "a cat", suppress=[technique])["vit-block1-out"], expected)


def test_control_acts_on_every_image_of_a_batch_as_on_it_alone_and_on_any_shape() -> None:
    fx = extractor("unet")
    technique = ControlNet(control(fx))
    images = [photo(s, height=64, width=128) for s in range(2)]
    both = fx(images, ["a cat", "the dog"], t=100, seed=[3, 4], suppress=[technique])
    alone = fx(images[1], "the dog", t=100, seed=4, suppress=[technique])
    for id in both:
        torch.testing.assert_close(both[id][1:], alone[id], rtol=1e-4, atol=1e-5)


def test_control_with_prompts_of_several_lengths_is_what_each_has_alone() -> None:
    fx = extractor("unet")
    technique = ControlNet(control(fx))
    prompts = ["a cat", "a red dog beside " * 60, "the dog"]  # the second is read in chunks
    images = [photo(s) for s in range(3)]
    together = fx(images, prompts, t=100, seed=[3, 4, 5], suppress=[technique])
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        alone = fx(image, prompt, t=100, seed=3 + i, suppress=[technique])
        for id in together:
            torch.testing.assert_close(together[id][i : i + 1], alone[id], rtol=1e-4, atol=1e-5)


def test_canny_sees_a_step_of_brightness_and_not_a_faint_one() -> None:
    image = torch.zeros(2, 3, 32, 48)
    image[0, :, :, 20:] = 0.5  # 64 of 255
    image[1, :, :, 20:] = 0.02
    edges = canny(image)
    assert edges.shape == image.shape and set(edges.unique().tolist()) == {0.0, 1.0}
    columns = edges[0].amax((0, 1)).nonzero().flatten().tolist()
    assert columns and all(18 <= c <= 21 for c in columns)
    assert not edges[1].any()


# ---- LoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("name", BOTH)
def test_lora_changes_the_features_and_leaves_the_model_as_it_was(name: str, text: bool, tmp_path: Path) -> None:
    fx = extractor(name)
    file, before = save_lora(fx, tmp_path, text=text), snapshot(fx)
    base = fx(photo(), "a cat")
    changed = fx(photo(), "a cat", suppress=[LoRA(file)])
    assert any(not torch.equal(base[id], changed[id]) for id in base)
    assert same(base, fx(photo(), "a cat", suppress=[LoRA(file, scale=0)]))
    assert left_behind(before, snapshot(fx)) == []
    assert same(base, fx(photo(), "a cat"))


def test_lora_equals_the_matrices_added_by_hand(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    fx = extractor("unet")
    file = save_lora(fx, tmp_path)
    merged = copy.deepcopy(fx.pipe)
    layers = load_file(file)
    with torch.no_grad():
        for key, down in layers.items():
            if "lora_A" in key:
                path = key.removeprefix("unet.").removesuffix(".lora_A.weight")
                merged.unet.get_submodule(path).weight += 0.5 * layers[key.replace("lora_A", "lora_B")] @ down
    expected = FeatureExtractor.from_pipe(merged, UNET_IDS)(photo(), "a cat")
    close(fx(photo(), "a cat", suppress=[LoRA(file, scale=0.5)]), expected)


def test_lora_of_a_text_encoder_is_not_mixed_with_prompts_encoded_before_or_after(tmp_path: Path) -> None:
    fx = FeatureExtractor.from_pretrained(save_sd15(tmp_path / "sd"), UNET_IDS, dtype=torch.float32, device="cpu")
    technique = LoRA(save_lora(fx, tmp_path, text=True))
    base = fx(photo(), "a cat")
    under = fx(photo(), "a cat", suppress=[technique])
    fresh = FeatureExtractor.from_pipe(sd15_pipe(), UNET_IDS)
    assert same(under, fresh(photo(), "a cat", suppress=[technique]))
    assert same(base, fx(photo(), "a cat"))
    fx.encode_prompts("a cat")
    fx.release_text_encoders()
    with pytest.raises(ValueError, match="released"):
        fx(photo(), "a cat", suppress=[technique])


def test_lora_leaves_adapters_of_the_caller_as_they_are(tmp_path: Path) -> None:
    fx = extractor("unet")
    own, other = save_lora(fx, tmp_path, "own"), save_lora(fx, tmp_path, "other", seed=1)
    both = fx(photo(), suppress=[LoRA(own, scale=0.3), LoRA(other)])
    fx.pipe.load_lora_weights(tmp_path, weight_name=own.name, adapter_name="mine")
    fx.pipe.set_adapters("mine", 0.3)
    before, alone = snapshot(fx), fx(photo())
    close(both, fx(photo(), suppress=[LoRA(other)]))
    assert left_behind(before, snapshot(fx)) == []
    assert same(alone, fx(photo()))
    assert fx.pipe.get_active_adapters() == ["mine"]


def test_lora_leaves_no_trace_when_the_call_fails(tmp_path: Path) -> None:
    fx = extractor("unet")
    technique, before = LoRA(save_lora(fx, tmp_path, text=True)), snapshot(fx)
    with pytest.raises(ValueError, match="noise has shape"):
        fx(photo(), noise=torch.zeros(1, 4, 2, 2), suppress=[technique, ControlNet(control(fx))])
    assert left_behind(before, snapshot(fx)) == []


def test_a_trainable_denoiser_keeps_its_gradients_under_techniques(tmp_path: Path) -> None:
    fx = FeatureExtractor.from_pipe(sd15_pipe(), "mid-vit-block0-out", trainable=True)
    features = fx(photo(), suppress=[LoRA(save_lora(fx, tmp_path)), ControlNet(control(fx))])
    features["mid-vit-block0-out"].square().sum().backward()
    grads = {name: p.grad for name, p in fx.denoiser.named_parameters() if name.startswith("mid_block")}
    assert grads["mid_block.resnets.0.conv1.weight"] is not None
    assert grads["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"] is not None


# ---- prompt, steps, guidance ----------------------------------------------------------------------------------------


def test_prompts_are_filled_in_an_image() -> None:
    fx = extractor("unet")
    images = [photo(0), photo(1)]
    expected = fx(images, ["a cat, the red", "a dog, the red"])
    assert same(fx(images, ["a cat", "a dog"], suppress=[FineGrainedPrompt("{prompt}, the red")]), expected)
    seen: list[tuple[int, int]] = []

    def captioner(pictures: list[Any]) -> list[str]:
        seen.extend(p.size for p in pictures)
        return ["the red"] * len(pictures)

    technique = FineGrainedPrompt("{prompt}, {caption}", captioner)
    assert same(fx(images, ["a cat", "a dog"], suppress=[technique]), expected)
    assert seen == [(64, 64), (64, 64)]


@pytest.mark.parametrize("name", BOTH)
def test_denoise_is_the_extractors_own(name: str) -> None:
    fx = extractor(name)
    expected = fx(photo(), t=200, denoise_from=230, solver_steps=3)
    assert same(fx(photo(), t=200, suppress=[Denoise(by=30, steps=3)]), expected)


def test_guided_steps_equal_those_of_a_ddim_scheduler() -> None:
    pipe = sd15_pipe()
    ddim = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipe.scheduler = DDIMScheduler(**ddim, set_alpha_to_one=False, steps_offset=0, clip_sample=False)
    fx = FeatureExtractor.from_pipe(pipe, "unet-in")
    latents, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = dict(latents=latents, noise=noise, t=400)
    found = fx(None, "a cat", suppress=[Denoise(by=100, steps=2), CFG(3.0, "a dog")], **given)["unet-in"]
    assert not torch.allclose(found, fx(None, "a cat", suppress=[Denoise(by=100, steps=2)], **given)["unet-in"])

    with torch.no_grad():
        encoded = [
            pipe.text_encoder(pipe.tokenizer(p, padding="max_length", return_tensors="pt").input_ids)[0]
            for p in ("a cat", "a dog")
        ]
        x = pipe.scheduler.add_noise(latents, noise, torch.tensor([500]))
        for t in (500, 450):
            with_prompt, without = (pipe.unet(x, t, e).sample for e in encoded)
            eps = without + 3 * (with_prompt - without)
            now, then = pipe.scheduler.alphas_cumprod[[t, t - 50]]
            clean = (x - (1 - now).sqrt() * eps) / now.sqrt()
            x = then.sqrt() * clean + (1 - then).sqrt() * eps
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_guidance_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="Add Denoise"):
        extractor("unet")(photo(), suppress=[CFG()])


# ---- together -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_techniques_compose_in_any_order(name: str, tmp_path: Path) -> None:
    fx = extractor(name)
    before = snapshot(fx)
    techniques = [
        ControlNet(control(fx), scale=0.5),
        LoRA(save_lora(fx, tmp_path, text=True), scale=0.5),
        FineGrainedPrompt("{prompt} on the green grass"),
        Denoise(by=20, steps=2),
    ]
    orders = [*itertools.permutations(techniques)][::7]
    assert {order[0] for order in map(tuple, ([techniques.index(t) for t in o] for o in orders))} == {0, 1, 2, 3}
    results = [fx(photo(), "a cat", t=100, suppress=order) for order in orders]
    for result in results[1:]:
        close(result, results[0])
    for left_out in range(4):  # each of them has a part in the result
        fewer = [t for i, t in enumerate(techniques) if i != left_out]
        assert not same(fx(photo(), "a cat", t=100, suppress=fewer), results[0])
    assert left_behind(before, snapshot(fx)) == []


def test_techniques_come_from_configurations(tmp_path: Path) -> None:
    fx = extractor("unet")
    control(fx).save_pretrained(tmp_path / "control")
    file = save_lora(fx, tmp_path)
    made = [ControlNet(tmp_path / "control"), LoRA(file, 0.5), FineGrainedPrompt("a dog")]
    given = [
        dict(type="ControlNet", model=str(tmp_path / "control")),
        dict(type="LoRA", source=str(file), scale=0.5),
        dict(type="FineGrainedPrompt", text="a dog"),
    ]
    assert same(fx(photo(), suppress=made), fx(photo(), suppress=given))
    assert same(fx(photo(), suppress=made[2]), fx(photo(), "a dog"))
