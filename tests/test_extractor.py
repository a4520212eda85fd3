"""The extractor against the pipeline's own parts, run by hand; and what it owes its caller."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from diffusion_features import FeatureExtractor, UnknownActivation
from diffusion_features.loading import has_decoder
from tests import tiny_families
from tests.tiny import save_sd15, sd15_pipe

# ---- the families, and where their activations are, written by hand -------------------------------------------------


class Family(NamedTuple):
    save: Callable[[Path], Path]
    preset: str | list[str]
    modules: dict[str, str]


Q, K = "transformer_blocks.0.attn2.to_q", "transformer_blocks.0.attn1.to_k"
SD = {
    "mid-vit-block0-cross-k": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "up-level1-repeat1-vit-block0-cross-q": f"up_blocks.1.attentions.1.{Q}",
    "up-level1-repeat2-res-out": "up_blocks.1.resnets.2",
    "up-level2-repeat1-vit-block0-cross-q": f"up_blocks.2.attentions.1.{Q}",
    "up-level3-repeat0-vit-block0-self-k": f"up_blocks.3.attentions.0.{K}",
}
XL = {
    "mid-vit-block9-cross-v": "mid_block.attentions.0.transformer_blocks.9.attn2.to_v",
    "up-level0-repeat0-vit-block5-out": "up_blocks.0.attentions.0.transformer_blocks.5",
    "up-level0-repeat0-vit-block7-out": "up_blocks.0.attentions.0.transformer_blocks.7",
    "up-level1-repeat0-vit-block0-cross-q": f"up_blocks.1.attentions.0.{Q}",
    "up-level1-repeat0-vit-block0-out": "up_blocks.1.attentions.0.transformer_blocks.0",
    "up-level1-upsampler-out": "up_blocks.1.upsamplers.0",
}
PG = {
    "up-level0-repeat0-vit-block5-out": "up_blocks.0.attentions.0.transformer_blocks.5",
    "up-level1-repeat0-vit-block0-cross-q": f"up_blocks.1.attentions.0.{Q}",
    "up-level1-upsampler-out": "up_blocks.1.upsamplers.0",
    "unet-out": "conv_out",
}
IF = {
    "mid-repeat1-res-out": "mid_block.resnets.1",
    "up-level1-repeat2-res-increment": "up_blocks.1.resnets.2.conv2",
    "up-level2-upsampler-out": "up_blocks.2.upsamplers.0",
    "unet-out": "conv_out",
}
FAMILIES = {
    "sd15": Family(save_sd15, "practical", SD),
    "sd21": Family(tiny_families.save_sd21, "practical", SD),
    "sdxl": Family(tiny_families.save_sdxl, "practical", XL),
    "playground-v2": Family(tiny_families.save_playground_v2, "full", PG),
    "if": Family(tiny_families.save_if, ["up-level?-*-res-out"], IF),
}
SHORT, OTHER, LONG = "a photo of a cat", "the red dog on green grass", "a red cat on the green grass " * 10
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("models")

    def saved(name: str) -> Path:
        path = root / name
        return path if path.is_dir() else FAMILIES[name].save(path)

    return saved


@pytest.fixture(scope="module")
def extractors(folder: Folders) -> Callable[[str], FeatureExtractor]:
    """Frozen extractors, one a family, that no test changes."""
    made: dict[str, FeatureExtractor] = {}

    def get(name: str) -> FeatureExtractor:
        if name not in made:
            made[name] = FeatureExtractor.from_pretrained(folder(name), FAMILIES[name].preset, device="cpu")
        return made[name]

    return get


@pytest.fixture(scope="module")
def pipes(folder: Folders) -> Callable[[str], Any]:
    """The same models as diffusers itself loads them."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = DiffusionPipeline.from_pretrained(folder(name))
        return made[name]

    return get


@pytest.fixture(scope="module")
def fx(extractors: Callable[[str], FeatureExtractor]) -> FeatureExtractor:
    return extractors("sd15")


def picture(batch: int = 1, height: int = 64, width: int = 64, seed: int = 100) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[i], other[i]) for i in one)


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal up to ``tolerance`` times the largest value (or times 1, where all are smaller)."""
    assert sorted(one) == sorted(other)
    for id, tensor in one.items():
        assert (tensor.shape, tensor.dtype) == (other[id].shape, other[id].dtype), id
        allowed = tolerance * max(1.0, other[id].abs().max().item())
        assert (tensor - other[id]).abs().max().item() <= allowed, id


# ---- the run by hand ------------------------------------------------------------------------------------------------


def drawn(shape: tuple[int, ...], seeds: list[int]) -> Tensor:
    return torch.stack([torch.randn(shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds])


def clean_latents(pipe: Any, images: Tensor) -> Tensor:
    if getattr(pipe, "vae", None) is None:
        return images
    with torch.no_grad():
        return pipe.vae.encode(images).latent_dist.mean * pipe.vae.config.scaling_factor


def mixed(pipe: Any, clean: Tensor, noise: Tensor, t: int) -> Tensor:
    bar = pipe.scheduler.alphas_cumprod[t]
    return bar.sqrt() * clean + (1 - bar).sqrt() * noise


def encoded(pipe: Any, prompts: list[str], size: tuple[int, int]) -> dict[str, Any]:
    """What the pipeline's own ``__call__`` would tell its denoiser about these prompts."""
    with torch.no_grad():
        if not hasattr(pipe, "text_encoder_2"):
            return {"encoder_hidden_states": pipe.encode_prompt(prompts, do_classifier_free_guidance=False,
                    num_images_per_prompt=1, device="cpu")[0]}  # fmt: skip
        text, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device="cpu")
    ids = pipe._get_add_time_ids(size, (0, 0), size, text.dtype, pipe.text_encoder_2.config.projection_dim)
    added = {"text_embeds": pooled, "time_ids": ids.repeat(len(prompts), 1)}
    return {"encoder_hidden_states": text, "added_cond_kwargs": added}


def hooked(pipe: Any, modules: dict[str, str], latents: Tensor, t: int, told: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs of modules in one call of the pipeline's own denoiser, image tokens laid out in rows."""
    found: dict[str, Tensor] = {}
    grids = [(-(-latents.shape[-2] // 2**k), -(-latents.shape[-1] // 2**k)) for k in range(4)]

    def hook(id: str) -> Any:
        def note(module: nn.Module, args: Any, out: Tensor) -> None:
            if out.ndim == 3 and not id.endswith(("cross-k", "cross-v")):
                h, w = next(g for g in grids if g[0] * g[1] == out.shape[1])
                out = out.reshape(len(out), h, w, -1).permute(0, 3, 1, 2)
            found[id] = out.clone()

        return note

    handles = [pipe.unet.get_submodule(path).register_forward_hook(hook(id)) for id, path in modules.items()]
    with torch.no_grad():
        pipe.unet(latents, t, **told)
    for handle in handles:
        handle.remove()
    return found


def by_hand(
    pipe: Any, modules: dict[str, str], images: Tensor, prompts: list[str], t: int, seeds: list[int]
) -> dict[str, Tensor]:
    clean = clean_latents(pipe, images)
    latents = mixed(pipe, clean, drawn(tuple(clean.shape), seeds), t)
    return hooked(pipe, modules, latents, t, encoded(pipe, prompts, (images.shape[-2], images.shape[-1])))


# ---- every family ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_those_of_the_pipeline_s_own_parts(
    extractors: Any, pipes: Any, name: str, size: tuple[int, int]
) -> None:
    images, prompts, seeds = picture(2, *size), [SHORT, OTHER], [3, 8]
    modules = FAMILIES[name].modules
    ours = extractors(name)(images, prompts, t=50, seed=seeds, activations=list(modules))
    close(ours, by_hand(pipes(name), modules, images, prompts, 50, seeds))


@pytest.mark.parametrize("t", [0, 1, 500, 999])
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_at_every_noise_level(extractors: Any, pipes: Any, name: str, t: int) -> None:
    modules = FAMILIES[name].modules
    ours = extractors(name)(picture(), SHORT, t=t, seed=1, activations=list(modules))
    close(ours, by_hand(pipes(name), modules, picture(), [SHORT], t, [1]), 2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_its_images_alone(folder: Folders, name: str) -> None:
    """In float64: in float32 they differ as much as the processor likes."""
    extractor = FeatureExtractor.from_pretrained(folder(name), FAMILIES[name].preset, dtype=torch.float64, device="cpu")
    images, prompts = picture(3, 64, 96), [SHORT, OTHER, ""]
    batch = extractor(images, prompts, seed=[5, 6, 5])
    for i, seed in enumerate([5, 6, 5]):
        alone = extractor(images[i : i + 1], prompts[i], seed=seed)
        close({k: v[i : i + 1] for k, v in batch.items()}, alone, 1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_feature_info_is_what_comes_out(extractors: Any, name: str) -> None:
    extractor = extractors(name)
    features, info = extractor(picture(1, 64, 64)), extractor.feature_info
    assert list(features) == list(info)
    for id, tensor in features.items():
        assert info[id].kind == "spatial"
        assert tuple(tensor.shape) == (1, info[id].channels, 64 // info[id].stride, 64 // info[id].stride)


def test_feature_info_of_maps_and_text(folder: Folders) -> None:
    asked = ["mid-vit-block0-self-map", "mid-vit-block0-cross-map", "mid-vit-block0-cross-k"]
    extractor = FeatureExtractor.from_pretrained(folder("sd15"), asked)
    features, info = extractor(picture(1, 64, 64)), extractor.feature_info
    cells = (64 // 64) ** 2
    heads, width = extractor.pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.heads, 32
    text, cross, self_ = (info[i] for i in asked[::-1])
    assert (self_.kind, self_.channels, self_.stride) == ("map", heads, 64)
    assert (cross.kind, cross.channels, cross.stride) == ("map", heads, 64)
    assert (text.kind, text.channels, text.stride) == ("text", width, None)
    assert features[asked[0]].shape == (1, heads, cells, cells)
    assert features[asked[1]].shape == (1, heads, cells, 77)
    assert features[asked[2]].shape == (1, 77, width)


@pytest.mark.parametrize("name", FAMILIES)
def test_inversion_is_that_of_the_inverse_scheduler(extractors: Any, pipes: Any, name: str) -> None:
    """0 → 10 → ... → 50, whatever scheduler, VAE scale and prediction type the model has."""
    pipe, modules, images = pipes(name), FAMILIES[name].modules, picture(1, 64, 96)
    kind = pipe.scheduler.config.prediction_type
    inverse = DDIMInverseScheduler.from_config(
        pipe.scheduler.config, prediction_type=kind, clip_sample=False, set_alpha_to_one=False, steps_offset=0,
        timestep_spacing="leading",
    )  # fmt: skip
    inverse.set_timesteps(100)
    latents, told = clean_latents(pipe, images), encoded(pipe, [SHORT], (64, 96))
    with torch.no_grad():
        for t in range(0, 50, 10):
            prediction = pipe.unet(latents, t, **told).sample[:, : latents.shape[1]]
            latents = inverse.step(prediction, t + 10, latents).prev_sample
    ours = extractors(name)(images, SHORT, t=50, invert=True, solver_steps=5, activations=list(modules))
    close(ours, hooked(pipe, modules, latents, 50, told), 1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_denoising_is_that_of_the_ddim_scheduler(extractors: Any, pipes: Any, name: str) -> None:
    """60 → 58 → ... → 50, as the papers do."""
    pipe, modules, images = pipes(name), FAMILIES[name].modules, picture(1, 64, 96)
    ddim = DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, thresholding=False, timestep_spacing="leading"
    )
    ddim.set_timesteps(500)
    clean, told = clean_latents(pipe, images), encoded(pipe, [SHORT], (64, 96))
    latents = mixed(pipe, clean, drawn(tuple(clean.shape), [4]), 60)
    with torch.no_grad():
        for t in range(60, 50, -2):
            prediction = pipe.unet(latents, t, **told).sample[:, : latents.shape[1]]
            latents = ddim.step(prediction, t, latents, eta=0.0).prev_sample
    ours = extractors(name)(images, SHORT, t=50, seed=4, denoise_from=60, solver_steps=5, activations=list(modules))
    close(ours, hooked(pipe, modules, latents, 50, told), 1e-4)


def test_inverted_denoised_and_plain_differ(fx: FeatureExtractor) -> None:
    plain = fx(picture(), SHORT, t=50)
    assert not same(plain, fx(picture(), SHORT, t=50, invert=True))
    assert not same(plain, fx(picture(), SHORT, t=50, denoise_from=100))
    assert same(plain, fx(picture(), SHORT, t=50, denoise_from=50))


# ---- prompts --------------------------------------------------------------------------------------------------------


def long_by_hand(tokenizer: Any, encoder: Any, prompt: str, layer: int | None) -> tuple[Tensor, Tensor]:
    """The text of each chunk of 75 tokens alone, one after another; and the encoder's first output of chunk 0."""
    start, end = (tokenizer.convert_tokens_to_ids(f"<|{x}oftext|>") for x in ("start", "end"))
    words = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(prompt))
    assert 75 < len(words) <= 150
    texts, firsts = [], []
    for chunk in (words[:75], words[75:]):
        row = [start, *chunk, end] + [tokenizer.pad_token_id] * (75 - len(chunk))
        with torch.no_grad():
            out = encoder(torch.tensor([row]), output_hidden_states=True)
        texts.append(out[0] if layer is None else out.hidden_states[layer])
        firsts.append(out[0])
    return torch.cat(texts, dim=1), firsts[0]


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_a_long_prompt_is_read_in_chunks(extractors: Any, pipes: Any, name: str) -> None:
    pipe, modules, images = pipes(name), FAMILIES[name].modules, picture()
    text, _ = long_by_hand(pipe.tokenizer, pipe.text_encoder, LONG, None)
    clean = clean_latents(pipe, images)
    latents = mixed(pipe, clean, drawn(tuple(clean.shape), [0]), 50)
    theirs = hooked(pipe, modules, latents, 50, {"encoder_hidden_states": text})
    ours = extractors(name)(images, LONG, activations=list(modules))
    assert ours["mid-vit-block0-cross-k"].shape[1] == 154
    close(ours, theirs)


def test_a_long_prompt_is_read_by_both_encoders_of_sdxl(extractors: Any, pipes: Any) -> None:
    pipe, modules, images = pipes("sdxl"), FAMILIES["sdxl"].modules, picture()
    assert pipe.tokenizer.pad_token_id != pipe.tokenizer_2.pad_token_id
    first, _ = long_by_hand(pipe.tokenizer, pipe.text_encoder, LONG, -2)
    second, pooled = long_by_hand(pipe.tokenizer_2, pipe.text_encoder_2, LONG, -2)
    assert pooled.shape == (1, 24)
    told = {
        "encoder_hidden_states": torch.cat([first, second], dim=-1),
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])},
    }
    clean = clean_latents(pipe, images)
    latents = mixed(pipe, clean, drawn(tuple(clean.shape), [0]), 50)
    ours = extractors("sdxl")(images, LONG, activations=list(modules))
    close(ours, hooked(pipe, modules, latents, 50, told))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_prompts_of_several_lengths_in_a_batch(extractors: Any, name: str) -> None:
    asked = [i for i in FAMILIES[name].modules if not i.startswith("mid")] + ["mid-vit-block0-cross-map"]
    prompts, extractor = [SHORT, LONG, ""], extractors(name)
    batch = extractor(picture(3), prompts, activations=asked)
    for i, prompt in enumerate(prompts):
        alone = extractor(picture(3)[i : i + 1], prompt, activations=asked)
        map_ = alone.pop("mid-vit-block0-cross-map")
        padded = batch["mid-vit-block0-cross-map"][i : i + 1]
        torch.testing.assert_close(padded[..., : map_.shape[-1]], map_, rtol=1e-5, atol=1e-5)
        assert padded[..., map_.shape[-1] :].abs().sum() == 0
        close({k: v[i : i + 1] for k, v in batch.items() if k in alone}, alone)


def test_75_words_are_one_chunk_and_76_two(fx: FeatureExtractor) -> None:
    id = "mid-vit-block0-cross-k"
    for words, tokens in [(0, 77), (1, 77), (75, 77), (76, 154), (150, 154), (151, 231)]:
        assert fx(picture(), "cat " * words, activations=id)[id].shape[1] == tokens


def test_a_prompt_too_long_for_t5_is_refused(extractors: Any) -> None:
    extractors("if")(picture(), "cat " * 76)
    with pytest.raises(ValueError, match="the prompt has 78 tokens and this model reads 77; shorten it"):
        extractors("if")(picture(), "cat " * 77)


def test_prompts_matter_and_the_default_is_empty(fx: FeatureExtractor) -> None:
    assert same(fx(picture()), fx(picture(), ""))
    assert not same(fx(picture(), SHORT), fx(picture(), OTHER))


def counted(encoder: nn.Module) -> list[int]:
    calls: list[int] = []
    encoder.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_each_distinct_prompt_is_encoded_once(folder: Folders) -> None:
    extractor = FeatureExtractor.from_pretrained(folder("sd15"))
    calls = counted(extractor.pipe.text_encoder)
    extractor(picture(4), [SHORT, OTHER, SHORT, SHORT], t=[50, 100], ensemble=2)
    assert len(calls) == 2
    extractor(picture(2), [OTHER, SHORT])
    assert len(calls) == 2
    extractor(picture(), "the dog")
    assert len(calls) == 3


def test_only_the_last_prompts_of_calls_are_remembered(folder: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion_features.extractor.RECENT", 2)
    extractor = FeatureExtractor.from_pretrained(folder("sd15"))
    extractor.encode_prompts("asked for")
    calls = counted(extractor.pipe.text_encoder)
    extractor(picture(3), ["one", "two", "three"])
    extractor(picture(3), ["three", "asked for", "two"])
    assert len(calls) == 3
    extractor(picture(), "one")
    assert len(calls) == 4


def test_a_caller_s_prompts_are_encoded_at_each_call() -> None:
    pipe = sd15_pipe()
    extractor = FeatureExtractor.from_pipe(pipe)
    before = extractor(picture(3), SHORT)
    calls = counted(pipe.text_encoder)
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.mul_(3)  # as a LoRA on the text encoder would
    assert not same(before, extractor(picture(3), SHORT))
    assert len(calls) == 1


def test_released_text_encoders(folder: Folders, fx: FeatureExtractor) -> None:
    extractor = FeatureExtractor.from_pretrained(folder("sd15"))
    extractor.encode_prompts([SHORT, OTHER])
    extractor.release_text_encoders()
    assert extractor.pipe.text_encoder is None
    assert same(extractor(picture(2), [OTHER, SHORT]), fx(picture(2), [OTHER, SHORT]))
    with pytest.raises(ValueError, match=r"text encoders were released; known prompts are .*not 'the dog'"):
        extractor(picture(), "the dog")


@pytest.mark.parametrize("name", ["sd15", "sdxl", "if"])
def test_prompts_named_while_loading(folder: Folders, extractors: Any, name: str) -> None:
    preset = FAMILIES[name].preset
    extractor = FeatureExtractor.from_pretrained(folder(name), preset, prompts=[SHORT, OTHER])
    assert not [n for n, part in extractor.pipe.components.items() if n.startswith("text_encoder") and part is not None]
    assert same(extractor(picture(), OTHER), extractors(name)(picture(), OTHER))
    with pytest.raises(ValueError, match="not ''"):
        extractor(picture())


def test_one_string_is_one_prompt(folder: Folders) -> None:
    extractor = FeatureExtractor.from_pretrained(folder("sd15"), prompts=SHORT)
    assert extractor(picture(), SHORT)
    with pytest.raises(ValueError, match="released"):
        extractor(picture(), "a")


# ---- noise, seeds and several timesteps -----------------------------------------------------------------------------


def test_seeds(fx: FeatureExtractor) -> None:
    images = picture(2)
    first = fx(images, seed=1)
    assert same(first, fx(images, seed=1))
    assert same(first, fx(images, seed=[1, 1]))
    assert same(first, fx(images, seed=np.int64(1)))
    assert all(not torch.equal(first[i], other) for i, other in fx(images, seed=2).items())
    close({k: v[1:] for k, v in fx(images, seed=[2, 1]).items()}, {k: v[1:] for k, v in first.items()})


def test_the_global_generators_are_neither_used_nor_moved(fx: FeatureExtractor) -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), pickle.dumps(np.random.get_state())

    arguments: dict[str, Any] = dict(sample_posterior=True, denoise_from=60, solver_steps=2, ensemble=2)
    torch.manual_seed(0)
    before = states()
    first = fx(picture(), SHORT, **arguments)
    assert states() == before
    torch.manual_seed(1)
    assert same(first, fx(picture(), SHORT, **arguments))


def test_several_timesteps(fx: FeatureExtractor) -> None:
    asked = ["up-level1-*-res-out", "mid-vit-block0-cross-k", "mid-vit-block0-*-map"]
    levels = [200, 0, 50, 50]
    together = fx(picture(2), SHORT, t=levels, seed=[1, 2], activations=asked)
    for i, t in enumerate(levels):
        alone = fx(picture(2), SHORT, t=t, seed=[1, 2], activations=asked)
        assert same({k: v[:, i] for k, v in together.items()}, alone)
    assert all(v.shape[:2] == (2, 4) for v in together.values())
    assert same({k: v[:, 0] for k, v in fx(picture(), t=(7,)).items()}, fx(picture(), t=7))
    assert same(fx(picture(), t=range(3, 5)), fx(picture(), t=np.array([3, 4])))


def test_an_ensemble_is_the_mean_over_draws(fx: FeatureExtractor) -> None:
    generators = [torch.Generator().manual_seed(s) for s in (3, 9)]
    draws = [torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators]) for _ in range(3)]
    runs = [fx(picture(2), SHORT, noise=noise) for noise in draws]
    expected = {id: torch.stack([run[id] for run in runs]).mean(0) for id in runs[0]}
    close(fx(picture(2), SHORT, seed=[3, 9], ensemble=3), expected, 1e-6)
    several = fx(picture(2), SHORT, seed=[3, 9], ensemble=3, t=[50, 10])
    close({k: v[:, 0] for k, v in several.items()}, expected, 1e-6)


def test_given_noise_and_latents(fx: FeatureExtractor, pipes: Any) -> None:
    noise = drawn((2, 4, 8, 12), [40, 41])
    images = picture(2, 64, 96)
    assert same(fx(images, noise=noise), fx(images, seed=[40, 41]))
    latents = clean_latents(pipes("sd15"), images)
    close(fx(None, latents=latents, seed=[40, 41]), fx(images, seed=[40, 41]), 1e-6)


def test_given_latents_tell_sdxl_the_size_of_the_image(extractors: Any, pipes: Any) -> None:
    images = picture(1, 64, 96)
    latents = clean_latents(pipes("sdxl"), images)
    close(extractors("sdxl")(None, latents=latents), extractors("sdxl")(images), 1e-6)


def test_the_posterior_is_sampled_by_a_stream_of_its_own(fx: FeatureExtractor, pipes: Any) -> None:
    """From the model input at two noise levels follow both the latents and the noise in it."""
    images, seeds = picture(2, 128, 128), [5, 6]
    with torch.no_grad():
        posterior = pipes("sd15").vae.encode(images).latent_dist
    bars = pipes("sd15").scheduler.alphas_cumprod.double()
    signal, sigma = bars[[100, 700]].sqrt(), (1 - bars[[100, 700]]).sqrt()
    inputs = fx(images, t=[100, 700], seed=seeds, sample_posterior=True, activations="unet-in")["unet-in"].double()
    weights = torch.linalg.inv(torch.stack([signal, sigma], dim=1))
    latents, noise = torch.einsum("ij,bjchw->ibchw", weights, inputs)
    torch.testing.assert_close(noise.float(), drawn((2, 4, 16, 16), seeds), rtol=1e-4, atol=1e-4)
    scale = pipes("sd15").vae.config.scaling_factor
    drawn_twice = (latents.float() / scale - posterior.mean) / posterior.std
    n = drawn_twice[0].numel()
    assert abs(drawn_twice.mean().item()) < 5 / (2 * n) ** 0.5
    assert drawn_twice.std().item() == pytest.approx(1, abs=5 / (4 * n) ** 0.5)
    together = torch.stack([*drawn_twice.flatten(1), *noise.float().flatten(1)])
    assert (torch.corrcoef(together) - torch.eye(4)).abs().max() < 5 / n**0.5


# ---- images ---------------------------------------------------------------------------------------------------------


def test_pictures_of_every_kind(fx: FeatureExtractor) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous() / 127.5 - 1
    expected = fx(tensor)
    assert same(fx(Image.fromarray(pixels)), expected)
    assert same(fx([Image.fromarray(pixels)]), expected)
    assert same(fx(tensor.double()), expected)
    assert fx([Image.fromarray(pixels)] * 2, size=(128, 64))["up-level1-repeat2-res-out"].shape == (2, 32, 4, 2)
    assert fx(tensor, size=128)["up-level1-repeat2-res-out"].shape == (1, 32, 4, 4)


@pytest.mark.parametrize(("name", "multiple"), [("sd15", 8), ("sdxl", 8), ("if", 8)])
def test_sizes_the_model_cannot_take(extractors: Any, name: str, multiple: int) -> None:
    assert extractors(name).multiple == multiple
    with pytest.raises(ValueError, match=r"60x100 .*multiples of 8; the nearest such size is 64x104: pass size="):
        extractors(name)(picture(1, 60, 100))
    with pytest.raises(ValueError, match="multiples of 8"):
        extractors(name)(picture(), size=(64, 65))


# ---- dtypes and devices ---------------------------------------------------------------------------------------------


def test_bfloat16(folder: Folders, fx: FeatureExtractor) -> None:
    half = FeatureExtractor.from_pretrained(folder("sd15"), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    features, exact = half(picture(), SHORT), fx(picture(), SHORT)
    for id, tensor in features.items():
        assert tensor.dtype == torch.bfloat16
        assert (tensor.float() - exact[id]).abs().max() < 0.1 * exact[id].abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_float64_moves_all_of_an_owned_pipeline(folder: Folders, extractors: Any, name: str) -> None:
    exact = FeatureExtractor.from_pretrained(folder(name), FAMILIES[name].preset).to(torch.float64)
    parts = [part for part in exact.pipe.components.values() if isinstance(part, nn.Module)]
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float64}
    features = exact(picture(), SHORT)
    assert {v.dtype for v in features.values()} == {torch.float64}
    close({k: v.float() for k, v in features.items()}, extractors(name)(picture(), SHORT), 1e-4)
    mean = exact(picture(), SHORT, ensemble=2)
    noises = torch.Generator().manual_seed(0)
    shape = exact(picture(), SHORT, activations="unet-in")["unet-in"].shape[1:]
    runs = [exact(picture(), SHORT, noise=torch.randn(shape, generator=noises)[None]) for _ in range(2)]
    close(mean, {k: (runs[0][k] + runs[1][k]) / 2 for k in mean}, 1e-14)


def test_captures_go_where_they_are_asked_to(fx: FeatureExtractor) -> None:
    plain, half = fx(picture(), SHORT), fx(picture(), SHORT, output_dtype=torch.float16, output_device="cpu")
    assert same({k: v.half() for k, v in plain.items()}, half)


def test_an_sdxl_vae_in_float16_is_back_in_float16() -> None:
    """It overflows there and is raised to float32 while it encodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_families, "_save", lambda build, folder, seed=0: build())
        pipe: Any = tiny_families.save_sdxl("")
    pipe = pipe.to(torch.float16)
    before = copy.deepcopy(pipe.vae.state_dict())
    seen: list[torch.dtype] = []
    pipe.vae.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    features = FeatureExtractor.from_pipe(pipe)(picture(), SHORT)
    assert seen == [torch.float32]
    assert {v.dtype for v in features.values()} == {torch.float16}
    after = pipe.vae.state_dict()
    assert all(after[k].dtype == torch.float16 and torch.equal(after[k], v) for k, v in before.items())


# ---- ownership ------------------------------------------------------------------------------------------------------


def snapshot(pipe: Any) -> dict[str, Any]:
    """All of a pipeline that a guest might change."""
    found: dict[str, Any] = {}
    for name, part in pipe.components.items():
        found[name] = id(part)
        if not isinstance(part, nn.Module):
            continue
        for path, module in part.named_modules():
            hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
            found[f"{name}.{path}"] = (id(module), module.training, hooks, id(getattr(module, "processor", None)))
        for path, tensor in [*part.named_parameters(), *part.named_buffers()]:
            data = tensor.detach().cpu().numpy().tobytes()
            found[f"{name}:{path}"] = (tensor.requires_grad, tensor.dtype, str(tensor.device), tensor.data_ptr(), data)
    found["scheduler state"] = {k: str(v) for k, v in vars(pipe.scheduler).items()}
    return found


def test_a_caller_s_pipeline_is_left_as_it_was() -> None:
    pipe = sd15_pipe()
    pipe.scheduler.set_timesteps(7)
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    pipe.vae.requires_grad_(False)
    pipe.unet.conv_in.requires_grad_(False)
    pipe.unet.set_attn_processor(copy.deepcopy(pipe.unet.attn_processors))
    before = snapshot(pipe)
    extractor = FeatureExtractor.from_pipe(pipe, ["practical", "mid-vit-block0-*-map"])
    extractor(picture(2), [SHORT, LONG], t=[50, 100], ensemble=2, sample_posterior=True)
    extractor(picture(), SHORT, t=50, invert=True)
    extractor(picture(), SHORT, t=50, denoise_from=60)
    for wrong in (dict(t=1000), dict(prompt=[SHORT] * 3), dict(noise=torch.zeros(1))):
        with pytest.raises(ValueError):
            extractor(picture(), **wrong)
    extractor.train().eval().requires_grad_(False).to(torch.float64).half().to("meta")
    with pytest.raises(ValueError, match="belongs to its caller"):
        extractor.release_text_encoders()
    assert snapshot(pipe) == before
    assert pipe.vae.decoder is not None


def test_the_timesteps_of_presets_can_be_read(fx: FeatureExtractor) -> None:
    assert fx.preset_timesteps.keys() == fx.presets.keys()
    assert fx.preset_timesteps["practical"] == 51 and fx.preset_timesteps["dift"] == 261


def test_activations_of_the_list_can_be_given_back(fx: FeatureExtractor) -> None:
    some = [a for a in fx.available if a.role == "res-out"][:2]
    assert list(fx(picture(), activations=some)) == [a.id for a in some] == list(fx(picture(), activations=tuple(some)))
    assert list(fx(picture(), activations=some[0])) == [some[0].id]


def test_drawing_without_the_decoder_says_what_is_missing(tmp_path: Path) -> None:
    fx = FeatureExtractor.from_pretrained(save_sd15(tmp_path), "mid-vit-out", device="cpu")
    with pytest.raises(RuntimeError, match=r"the VAE's decoder was not loaded, .* name vae-out among its activations"):
        fx.pipe.vae.decode(torch.zeros(1, 4, 8, 8))


def test_an_owned_pipeline_is_frozen_and_has_no_decoder(fx: FeatureExtractor) -> None:
    assert fx.owned and not has_decoder(fx.pipe)
    for part in fx.pipe.components.values():
        if isinstance(part, nn.Module):
            assert not part.training
            assert not any(p.requires_grad for p in part.parameters())
    assert not any(v.requires_grad for v in fx(picture()).values())


class Head(nn.Module):
    """What a user builds on features."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__()
        self.extractor = extractor
        self.classify = nn.Conv2d(32, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.extractor(images)["up-level1-repeat2-res-out"])


def test_a_frozen_extractor_is_no_part_of_what_is_saved(folder: Folders, tmp_path: Path) -> None:
    extractor = FeatureExtractor.from_pretrained(folder("sd15"))
    assert dict(extractor.state_dict()) == {}
    assert list(extractor.parameters()) == list(extractor.buffers()) == []
    head = Head(extractor)
    assert [name for name, _ in head.named_parameters()] == ["classify.weight", "classify.bias"]
    assert sorted(head.state_dict()) == ["classify.bias", "classify.weight"]
    torch.save(head.state_dict(), tmp_path / "head.pt")
    other = Head(FeatureExtractor.from_pretrained(folder("sd15")))
    other.load_state_dict(torch.load(tmp_path / "head.pt"), strict=True)
    assert torch.equal(other(picture()), head(picture()))
    head.train()(picture()).sum().backward()
    assert head.classify.weight.grad is not None
    assert not extractor.pipe.unet.training and extractor.pipe.unet.conv_in.weight.grad is None


def test_a_parent_takes_an_owned_pipeline_along(folder: Folders) -> None:
    head = Head(FeatureExtractor.from_pretrained(folder("sd15"))).double()
    assert head.extractor.dtype == torch.float64 and head(picture()).dtype == torch.float64


def test_a_trainable_extractor(folder: Folders, fx: FeatureExtractor) -> None:
    extractor = FeatureExtractor.from_pretrained(folder("sd15"), trainable=True)
    features = extractor(picture(), SHORT)
    close({k: v.detach() for k, v in features.items()}, fx(picture(), SHORT), 1e-6)
    assert all(v.requires_grad for v in features.values())
    unet = extractor.pipe.unet
    assert {id(p) for p in extractor.parameters()} == {id(p) for p in unet.parameters()}
    assert set(extractor.state_dict()) == {f"trained.{name}" for name in unet.state_dict()}
    assert not any(
        p.requires_grad for part in ("vae", "text_encoder") for p in getattr(extractor.pipe, part).parameters()
    )
    sum(v.square().sum() for v in features.values()).backward()
    for path in ("conv_in", "time_embedding.linear_1", "up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_k"):
        assert unet.get_submodule(path).weight.grad.abs().sum() > 0
    assert unet.conv_out.weight.grad is None
    torch.optim.SGD(extractor.parameters(), lr=1e-3).step()
    assert not same(extractor(picture(), SHORT), features)
    other = FeatureExtractor.from_pretrained(folder("sd15"), trainable=True)
    other.load_state_dict(extractor.state_dict(), strict=True)
    assert same(other(picture(), SHORT), extractor(picture(), SHORT))
    with torch.no_grad():
        assert not any(v.requires_grad for v in extractor(picture(), SHORT).values())
    moved = extractor.to(torch.float64)
    assert {p.dtype for p in moved.pipe.vae.parameters()} == {torch.float64}
    assert {v.dtype for v in moved(picture(), SHORT).values()} == {torch.float64}


def test_gradients_of_a_trainable_extractor_are_right(folder: Folders) -> None:
    """Against a difference quotient in float64, through noise, denoising steps and maps."""
    asked = ["up-level1-repeat2-res-out", "mid-vit-block0-cross-map"]
    extractor = FeatureExtractor.from_pretrained(folder("sd15"), asked, trainable=True).to(torch.float64)
    bias = extractor.pipe.unet.conv_in.bias

    def loss() -> Tensor:
        found = extractor(picture(), SHORT, t=50, denoise_from=60, solver_steps=2)
        return sum(v.square().sum() for v in found.values())

    loss().backward()
    direction = torch.randn(bias.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            bias += step * direction
            values.append(loss().item())
    assert (values[0] - values[1]) / 2e-5 == pytest.approx((bias.grad @ direction).item(), rel=1e-5)


def test_copies_and_pickles(folder: Folders) -> None:
    extractor = FeatureExtractor.from_pretrained(folder("sd15"))
    expected = extractor(picture(), SHORT)
    for other in (copy.deepcopy(extractor), pickle.loads(pickle.dumps(extractor))):
        assert other.pipe.unet is not extractor.pipe.unet
        assert same(other(picture(), SHORT), expected)


# ---- threads --------------------------------------------------------------------------------------------------------


def test_threads_get_what_they_would_get_alone() -> None:
    pipe = sd15_pipe()
    one, other = FeatureExtractor.from_pipe(pipe), FeatureExtractor.from_pipe(pipe, "legacy")
    jobs = [
        (one, dict(prompt=SHORT, t=50, seed=1)),
        (one, dict(prompt=OTHER, t=300, seed=2, activations=["mid-vit-block0-*-map", "unet-out"])),
        (other, dict(prompt=LONG, t=10, seed=3)),
    ]

    def run(job: int) -> dict[str, Tensor]:
        extractor, arguments = jobs[job]
        return extractor(picture(seed=job), **arguments)

    alone = [run(job) for job in range(len(jobs))]
    found: dict[tuple[int, int], dict[str, Tensor]] = {}

    def work(job: int) -> None:
        for turn in range(4):
            found[job, turn] = run(job)

    threads = [threading.Thread(target=work, args=(job,)) for job in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert all(same(features, alone[job]) for (job, _), features in found.items())


# ---- what is wrong --------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(prompt=[SHORT]), ValueError, "1 prompts for 2 images: give one prompt, or one an image"),
    (dict(prompt=[SHORT] * 3), ValueError, "3 prompts for 2 images"),
    (dict(seed=[1, 2, 3]), ValueError, "3 seeds for 2 images"),
    (dict(t=1000), ValueError, "t=1000 is out of range: it must be between 0 .* and 999"),
    (dict(t=[50, -1]), ValueError, "t=-1 is out of range"),
    (dict(t=[]), ValueError, "t is an empty list"),
    (dict(t=50.0), TypeError, "t must be an integer"),
    (dict(t=True), TypeError, "t must be an integer"),
    (dict(t=[50, None]), TypeError, "t must be an integer"),
    (dict(activations="practicle"), UnknownActivation, "did you mean practical"),
    (dict(activations="mid-vit-ot"), UnknownActivation, "did you mean mid-vit-out"),
    (dict(activations=[]), ValueError, "no activation is asked for"),
    (dict(denoise_from=49), ValueError, "denoise_from=49 must not be below t=50"),
    (dict(denoise_from=1000), ValueError, "t=1000 is out of range"),
    (dict(invert=True, denoise_from=60), ValueError, "invert draws no noise"),
    (dict(invert=True, ensemble=2), ValueError, "invert draws no noise"),
    (dict(ensemble=0), ValueError, "ensemble must be at least 1"),
    (dict(ensemble=2, noise=torch.zeros(2, 4, 8, 8)), ValueError, "exactly 1 where noise is given"),
    (
        dict(noise=torch.zeros(1, 4, 8, 8)),
        ValueError,
        r"noise has shape \(1, 4, 8, 8\); the latents have \(2, 4, 8, 8\)",
    ),
    (dict(latents=torch.zeros(4, 8, 8)), ValueError, r"latents must have shape \(B, c, h, w\), not \(4, 8, 8\)"),
    (dict(solver_steps=0, invert=True), ValueError, "solver_steps must be at least 1"),
    (dict(heads="all"), ValueError, "heads must be 'each' or 'mean'"),
    (dict(images=None), ValueError, "give images, or latents"),
    (dict(images=picture(1, 30, 64)), ValueError, "nearest such size is 32x64"),
    (dict(images=[Image.new("RGB", (64, 64)), Image.new("RGB", (32, 64))]), ValueError, "differ in size"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=[row[2][:40] for row in WRONG])
def test_errors(fx: FeatureExtractor, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fx(**{"images": picture(2), **arguments})


def test_an_unknown_preset_or_id_while_loading(folder: Folders) -> None:
    with pytest.raises(UnknownActivation, match="Presets for it: practical, legacy, amalgamation, amalgamation-small"):
        FeatureExtractor.from_pretrained(folder("sd15"), "full")
    with pytest.raises(UnknownActivation, match="Presets for it: amalgamation, full"):
        FeatureExtractor.from_pretrained(folder("playground-v2"), "legacyy")
    with pytest.raises(UnknownActivation, match="It has no presets"):
        FeatureExtractor.from_pretrained(folder("if"))


def test_a_pipeline_without_text_encoder_or_denoiser() -> None:
    pipe = sd15_pipe()
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="the pipeline has no text encoder"):
        FeatureExtractor.from_pipe(pipe)(picture(), SHORT)
    pipe.unet = None
    with pytest.raises(TypeError, match="StableDiffusionPipeline has no denoiser"):
        FeatureExtractor.from_pipe(pipe)


def test_infinite_activations_are_named() -> None:
    pipe = sd15_pipe()
    path = SD["up-level1-repeat1-vit-block0-cross-q"]
    extractor = FeatureExtractor.from_pipe(pipe)
    with torch.no_grad():
        pipe.unet.get_submodule(path).weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"^up-level1-repeat1-vit-block0-cross-q has infinite.*float32\.$"):
        extractor(picture(), SHORT)
    assert extractor(picture(), SHORT, activations="mid-vit-out")  # what comes before is fine


def test_the_remedy_for_float16() -> None:
    pipe = sd15_pipe()
    with torch.no_grad():
        pipe.unet.get_submodule(SD["up-level1-repeat1-vit-block0-cross-q"]).weight.mul_(1e7)
    extractor = FeatureExtractor.from_pipe(pipe)
    assert extractor(picture(), SHORT)
    with pytest.raises(FloatingPointError, match=r"cross-q has .*\.float16\. Load .* output_dtype, torch\.float32 or"):
        extractor(picture(), SHORT, output_dtype=torch.float16)
