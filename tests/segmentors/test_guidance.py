"""S-CFG: its rates against loops, a generation against a sampler of our own, and that nothing is left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from scipy import ndimage
from torch import Tensor

from diffusion_features import FeatureExtractor
from segmentors import Preset
from segmentors.training_free.guidance import generate, region_rates
from segmentors.training_free.rescaling import entity_maps
from tests import tiny_dits
from tests.released import seeded
from tests.segmentors.test_segmentor import naive_tokens
from tests.tiny import sd15_pipe

PROMPT, SCALE, T = "a red cat on the grass", 4.0, 500
REFERENCE = "up-level2-repeat1-vit-block0-cross-q"
REFINERS = ["up-level3-repeat0", "up-level3-repeat1", "down-level0-repeat1"]


def naive_rates(difference: np.ndarray, regions: np.ndarray, foreground: np.ndarray, scale: float) -> np.ndarray:
    """Of one image, region by region."""
    size = np.sqrt((difference**2).sum(0))
    rate = np.ones_like(size)
    for region in np.unique(regions):
        there = regions == region
        if foreground.any() and size[there].mean() > 0:
            rate[there] = min(max(size[foreground].mean() / size[there].mean(), 0.8), 3.0, 15 / scale)
    return ndimage.gaussian_filter(rate, 0.5, mode="mirror", truncate=1 / 0.5)  # one cell each way


@pytest.mark.parametrize("scale", [2.0, 10.0])
def test_rates_equal_their_equations(scale: float) -> None:
    difference = seeded("d", 3, 4, 7, 9).double()
    regions = (seeded("r", 3, 7, 9) * 2).round().abs().long()
    difference[0] *= 1 + 3 * (regions[0] == 1)  # a region that is guided much more than others
    difference[0] *= 1 - 0.9 * (regions[0] == 2).double()  # and one much less
    difference[1][:, regions[1] == 0] = 0  # one not at all
    foreground = seeded("f", 3, 7, 9) > 0.3
    foreground[2] = False
    found = region_rates(difference, regions, foreground, scale)
    assert found.shape == (3, 1, 7, 9)
    for i in range(3):
        expected = naive_rates(difference[i].numpy(), regions[i].numpy(), foreground[i].numpy(), scale)
        assert np.allclose(found[i, 0].numpy(), expected, atol=1e-12)
    assert found[0].max() - found[0].min() > 0.3 and torch.allclose(found[2], torch.ones((), dtype=torch.float64))
    assert torch.allclose(region_rates(difference.float(), regions, foreground, scale).double(), found, atol=1e-5)


def ddim_pipe() -> Any:
    pipe = sd15_pipe()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():  # random attention is flat, and one word would win everywhere
        for name, weight in pipe.unet.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                weight.mul_(5)
    return pipe


def step_by_hand(pipe: Any, latents: Tensor) -> Tensor:
    """The first of two steps, from stored maps, in the order of the paper's equations."""
    unet, scheduler = pipe.unet, pipe.scheduler
    scheduler.set_timesteps(2)
    t = scheduler.timesteps[0]
    fx = FeatureExtractor.from_pipe(pipe)
    outs: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(text: str) -> tuple[Tensor, dict[str, Tensor]]:
        from diffusion_features import capture

        hooks = []
        for a in fx.available:
            if a.id.endswith("cross-map"):
                out = unet.get_submodule(a.module).to_out[0]
                hooks.append(out.register_forward_pre_hook(lambda m, x, id=a.id: outs.update({id: (x[0], m.weight)})))
        ids = pipe.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
        with capture(unet, ["*-cross-map", "*-self-map", REFERENCE]) as maps:
            noise = unet(latents, t, encoder_hidden_states=pipe.text_encoder(ids)[0]).sample
        for hook in hooks:
            hook.remove()
        return noise, maps

    def tokens_of(maps: dict[str, Tensor]) -> Tensor:
        return naive_tokens({k: v for k, v in maps.items() if k.endswith("map")}, outs, maps[REFERENCE])

    without, maps = forward("")
    start = tokens_of(maps)[0].numpy()
    told, maps = forward(PROMPT)
    words = [*range(1, 7)]  # every word of this prompt is one token
    found = entity_maps(tokens_of(maps), [[word] for word in words], words, "sum")
    s = torch.stack([maps[f"{place}-vit-block0-self-map"][0].double().mean(0) for place in REFINERS]).mean(0)
    regions = (s @ s @ found.flatten(1).T).argmax(1).view(8, 8).numpy()
    blurred = ndimage.gaussian_filter(start, 1.1, mode="mirror", truncate=2 / 1.1)
    foreground = (blurred - blurred.min()) / (blurred.max() - blurred.min()) < 0.5
    difference = (told - without)[0].double()
    rate = naive_rates(difference.numpy(), regions, foreground, SCALE)
    assert rate.std() > 0.01 and len(np.unique(regions)) > 1
    guided = without.double() + SCALE * torch.from_numpy(rate) * difference
    return scheduler.step(guided.float(), t, latents).prev_sample


@torch.no_grad()
def test_a_generation_is_that_of_a_sampler_of_our_own() -> None:
    pipe, latents = ddim_pipe(), seeded("latents", 1, 4, 8, 8)
    seen: list[Tensor] = []

    def keep(pipe: Any, step: int, t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(values["latents"])
        return values

    options: dict[str, Any] = dict(num_inference_steps=2, output_type="latent", latents=latents.clone())
    generate(pipe, PROMPT, guidance_scale=SCALE, callback_on_step_end=keep, **options)
    expected = step_by_hand(pipe, latents)
    assert torch.allclose(seen[0], expected, atol=2e-4)
    pipe(PROMPT, guidance_scale=SCALE, callback_on_step_end=keep, **options)
    assert (seen[0] - seen[2]).abs().max() > 10 * (seen[0] - expected).abs().max()


def test_rates_of_one_are_ordinary_guidance_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ddim_pipe()
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    options: dict[str, Any] = dict(num_inference_steps=2, output_type="latent", height=48, width=80)

    def seeds() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(4)]

    plain = pipe([PROMPT, "a dog"], generator=seeds(), guidance_scale=SCALE, num_images_per_prompt=2, **options).images
    semantic = generate(
        pipe, [PROMPT, "a dog"], generator=seeds(), guidance_scale=SCALE, num_images_per_prompt=2, **options
    ).images
    alone = generate(pipe, "a dog", generator=seeds()[3], guidance_scale=SCALE, **options).images
    assert plain.shape == semantic.shape == (4, 4, 6, 10) and (semantic - plain).abs().max() > 1e-3
    assert torch.allclose(semantic[3], alone[0], atol=1e-3)
    import segmentors.training_free.guidance as guidance

    monkeypatch.setattr(guidance, "region_rates", lambda d, r, f, s: torch.ones(len(d), 1, *d.shape[-2:]))
    ones = generate(
        pipe, [PROMPT, "a dog"], generator=seeds(), guidance_scale=SCALE, num_images_per_prompt=2, **options
    ).images
    assert torch.allclose(ones, plain, atol=1e-5)
    assert all(torch.equal(before[name], weight) for name, weight in pipe.unet.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


def test_a_transformer_with_a_predicted_variance_and_t5() -> None:
    """T5 has no first token: its last one with the prompt stands for what no word does."""
    pipe = tiny_dits.build("pixart_sigma")
    preset = Preset(("*-cross-map",), "vit-block1-cross-q", ("vit-block1-self-map",), 2, 100)
    options: dict[str, Any] = dict(num_inference_steps=2, output_type="np", height=64, width=96,
                                   use_resolution_binning=False, clean_caption=False)  # fmt: skip
    plain, semantic = (
        run(pipe, PROMPT, generator=torch.Generator().manual_seed(0), guidance_scale=SCALE, **more, **options).images
        for run, more in ((type(pipe).__call__, {}), (generate, {"preset": preset}))
    )
    assert np.isfinite(semantic).all() and np.abs(semantic - plain).max() > 1e-4
    from segmentors.training_free.encoders import text_parts
    from segmentors.training_free.guidance import _whole

    (part,) = text_parts(FeatureExtractor.from_pipe(pipe, "*"))
    ids = pipe.tokenizer(PROMPT).input_ids
    assert _whole(part, PROMPT) == (True, ids.index(pipe.tokenizer.eos_token_id))
    (clip,) = text_parts(FeatureExtractor.from_pipe(sd15_pipe()))
    assert _whole(clip, PROMPT) == (False, 0)


def test_what_cannot_be_guided() -> None:
    pipe = sd15_pipe()
    with pytest.raises(ValueError, match="guidance_scale=1"):
        generate(pipe, PROMPT, guidance_scale=1)
    with pytest.raises(ValueError, match="was called on 2 latents for 2 prompts"):
        generate(_Once(pipe), [PROMPT, "a dog"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


class _Once:
    """A pipeline that calls its denoiser on the prompts alone."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def __call__(self, prompt: Any, **options: Any) -> Any:
        text = torch.zeros(len(prompt), 77, 24)
        return self.pipe.unet(torch.zeros(len(prompt), 4, 8, 8), T, encoder_hidden_states=text)
