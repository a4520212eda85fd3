"""``attn`` against maps captured one by one and averaged in float64, ``vae-out`` against the schedulers' own steps."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from PIL import Image
from torch import Tensor

from diffusion_features import FeatureExtractor, UnknownActivation, capture, list_activations
from diffusion_features.cli import main
from diffusion_features.composed import CATEGORIES
from diffusion_features.store import Store
from tests import tiny_families
from tests.tiny import save_sd15, sd15_pipe
from tests.tiny_dits import PIPELINES, build

HEIGHT, WIDTH = 64, 96
IMAGES = torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
PROMPTS = ["a photo of a cat", "the red dog"]


def enlarged(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """(..., h, w) → (..., height, width), each value the bilinear mean of the four cells around its place."""
    for axis, length in ((-2, height), (-1, width)):
        have = grid.shape[axis]
        place = np.clip((np.arange(length) + 0.5) * have / length - 0.5, 0, have - 1)
        low = np.minimum(place.astype(int), max(have - 2, 0))
        weight = np.zeros((length, have))
        weight[np.arange(length), low] = 1 - (place - low)
        if have > 1:
            weight[np.arange(length), low + 1] = place - low
        grid = np.moveaxis(np.moveaxis(grid, axis, -1) @ weight.T, -1, axis)
    return grid


def naive(maps: dict[str, Tensor], attention: Sequence[str], sides: tuple[int, int], whole: int) -> np.ndarray:
    """``attn`` of captured maps (B, heads, queries, keys), by papers' words, a map at a time.

    Args:
        sides: smallest and largest side of a cell in pixels.
        whole: H * W.
    """
    parts = []
    for category in attention:
        stage, kind = category.split("_")
        for side in (32, 16, 8):
            layers = [
                tensor.double().numpy().mean(1) for id, tensor in maps.items()
                if id.endswith(f"-{kind}-map") and id.split("-")[0] in (stage, "vit" if stage == "up" else "")
                and tensor.shape[2] * side**2 == whole and sides[0] <= side <= sides[1]
            ]  # fmt: skip
            if layers:
                mean = sum(layers) / len(layers)
                grid = mean.transpose(0, 2, 1).reshape(len(mean), -1, HEIGHT // side, WIDTH // side)
                parts.append(enlarged(grid, HEIGHT // 8, WIDTH // 8))
    return np.concatenate(parts, axis=1)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return sd15_pipe()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd15(tmp_path_factory.mktemp("sd15"))


# ---- attn -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "channels"),
    [
        (["up_cross"], 2 * 77),  # the published number
        (["down_cross", "up_cross"], 4 * 77),  # and that of the baseline in VPD's manner
        (["up_self", "down_cross"], 2 * 3 + 4 * 6 + 2 * 77),
    ],
)
def test_attn_is_the_mean_of_what_is_captured_map_by_map(pipe: Any, attention: list[str], channels: int) -> None:
    fx = FeatureExtractor.from_pipe(pipe, "attn", attention=attention)
    found = fx(IMAGES, PROMPTS, t=100, seed=[1, 2])
    maps = fx(IMAGES, PROMPTS, t=100, seed=[1, 2], activations="*-map")
    expected = naive(maps, attention, (16, 32), HEIGHT * WIDTH)
    assert list(found) == ["attn"] and found["attn"].shape == (2, channels, HEIGHT // 8, WIDTH // 8)
    np.testing.assert_allclose(found["attn"].numpy(), expected, atol=1e-6)
    known = 0 if "up_self" in attention else channels
    assert vars(fx.feature_info["attn"]) == {"channels": known, "stride": 8, "kind": "spatial"}


def test_attn_of_sdxl_with_several_layers_a_repeat(tmp_path: Path) -> None:
    fx = FeatureExtractor.from_pretrained(tiny_families.save_sdxl(tmp_path), ["attn"], attention="mid_cross")
    maps = fx(IMAGES, PROMPTS, activations="*-map")
    expected = naive(maps, ["mid_cross"], (16, 32), HEIGHT * WIDTH)
    np.testing.assert_allclose(fx(IMAGES, PROMPTS)["attn"].numpy(), expected, atol=1e-6)
    assert sum(id.startswith("mid") and id.endswith("cross-map") for id in maps) == 10


@pytest.fixture(scope="module", params=PIPELINES)
def transformer(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def test_attn_of_transformers(transformer: Any) -> None:
    linear = type(transformer).__name__ == "SanaPipeline"  # its attention to the image has no map
    attention = ["up_cross"] if linear else ["up_self", "up_cross"]
    fx = FeatureExtractor.from_pipe(transformer, ["attn", "*-map"], attention=attention)
    found = fx(IMAGES, PROMPTS, t=300)
    maps = {id: tensor for id, tensor in found.items() if id.endswith(("self-map", "cross-map"))}
    expected = naive(maps, attention, (8, 32), HEIGHT * WIDTH)
    np.testing.assert_allclose(found["attn"].numpy(), expected, atol=1e-6)
    cross = FeatureExtractor.from_pipe(transformer, "attn")
    channels = cross(IMAGES[:1], PROMPTS[0], t=300)["attn"].shape[1]
    own_length = type(transformer).__name__.startswith(("Lumina2", "QwenImage", "ZImage"))
    assert cross.feature_info["attn"].channels == (0 if own_length else channels)


def test_a_long_prompt_has_more_channels_and_a_shorter_one_beside_it_is_padded(pipe: Any) -> None:
    fx = FeatureExtractor.from_pipe(pipe, "attn")
    prompts = ["cat " * 100, "a cat"]
    found = fx(IMAGES, prompts)["attn"]
    assert found.shape[1] == 2 * 77 * 2
    maps = fx(IMAGES, prompts, activations="*-map")
    np.testing.assert_allclose(found.numpy(), naive(maps, ["up_cross"], (16, 32), HEIGHT * WIDTH), atol=1e-6)


def test_a_map_that_is_asked_for_too_is_what_it_is_alone(pipe: Any) -> None:
    fx = FeatureExtractor.from_pipe(pipe, "attn")
    id = "up-level1-repeat0-vit-block0-cross-map"
    for heads in ("each", "mean"):
        both = fx(IMAGES, activations=["attn", "mid-vit-out", id], heads=heads, output_dtype=torch.float64)
        assert list(both) == ["mid-vit-out", id, "attn"] and {x.dtype for x in both.values()} == {torch.float64}
        for name in both:
            alone = fx(IMAGES, activations=name, heads=heads)[name]
            assert torch.allclose(both[name], alone.double(), atol=1e-6), name


def test_maps_are_not_kept_until_the_end(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six maps, two sums: what ``AttentionSum`` holds when the last map comes."""
    from diffusion_features import composed

    held, add = [], composed.AttentionSum.add

    def spy(self: Any, id: str, call: Any) -> None:
        add(self, id, call)
        held.append(sum(tensor.numel() for tensor in self.sums.values()))

    monkeypatch.setattr(composed.AttentionSum, "add", spy)
    FeatureExtractor.from_pipe(pipe, "attn", attention="up_self")(IMAGES)
    assert len(held) == 6 and held[-1] == max(held) == 2 * (6 * 6 + 24 * 24)


def test_attn_carries_gradients(folder: Path) -> None:
    fx = FeatureExtractor.from_pretrained(folder, "attn", trainable=True, device="cpu")
    weight = fx.denoiser.get_submodule("up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k").weight
    fx(IMAGES, PROMPTS)["attn"].square().sum().backward()
    found, weight.grad = weight.grad, None
    maps = fx(IMAGES, PROMPTS, activations="*-cross-map")
    total = torch.zeros(())
    for level, grid in ((1, (2, 3)), (2, (4, 6))):
        mean = torch.stack([maps[f"up-level{level}-repeat{r}-vit-block0-cross-map"].mean(1) for r in range(3)]).mean(0)
        large = torch.from_numpy(
            np.stack([enlarged(row, 8, 12) for row in np.eye(grid[0] * grid[1]).reshape(-1, *grid)])
        )
        total = total + torch.einsum("bqk,qhw->bkhw", mean.double(), large).square().sum()
    total.backward()
    assert found.abs().max() > 0 and torch.allclose(found, weight.grad, rtol=1e-3, atol=1e-7)


# ---- vae-out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", [PNDMScheduler, DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_vae_out_is_the_scheduler_s_own_step_decoded(kind: Any, prediction: str) -> None:
    pipe = sd15_pipe()
    pipe.scheduler = kind.from_config(pipe.scheduler.config, prediction_type=prediction, clip_sample=False)
    fx = FeatureExtractor.from_pipe(pipe, ["unet-in", "unet-out", "vae-out"])
    found = fx(IMAGES, PROMPTS, t=100, seed=[1, 2])
    assert list(found) == ["unet-in", "unet-out", "vae-out"]
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(1000)
    sample = found["unet-in"]
    alphas = scheduler.alphas_cumprod[[99, 100]]
    noise = ((1 - alphas) / alphas).sqrt()
    if kind is EulerDiscreteScheduler:  # which counts in multiples of the clean image
        sample = sample * (1 + noise[1] ** 2).sqrt()
    level = next(t for t in scheduler.timesteps if t == 100)
    after = scheduler.step(found["unet-out"], level, sample).prev_sample
    if kind is EulerDiscreteScheduler:
        after = after / (1 + noise[0] ** 2).sqrt()
    with torch.no_grad():
        expected = pipe.vae.decode(after / pipe.vae.config.scaling_factor).sample
    assert torch.allclose(found["vae-out"], expected, atol=1e-4)
    assert vars(fx.feature_info["vae-out"]) == {"channels": 3, "stride": 1, "kind": "spatial"}
    assert pipe.scheduler.num_inference_steps is None  # the caller's own is not set to anything


def test_vae_out_of_a_flow_model() -> None:
    pipe = build("sd3")
    fx = FeatureExtractor.from_pipe(pipe, "vae-out")
    seen: dict[str, Any] = {}
    handle = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(kwargs, output=output[0]), with_kwargs=True
    )
    found = fx(IMAGES, PROMPTS, t=300)["vae-out"]
    handle.remove()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[0.3, 0.299])
    after = scheduler.step(seen["output"], scheduler.timesteps[0], seen["hidden_states"]).prev_sample
    with torch.no_grad():
        expected = pipe.vae.decode(after / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
    assert torch.allclose(found, expected, atol=1e-5)


def test_at_the_end_of_the_schedule_there_is_no_further_step(pipe: Any) -> None:
    fx = FeatureExtractor.from_pipe(pipe, ["unet-in", "vae-out"])
    found = fx(IMAGES, t=0)
    with torch.no_grad():
        expected = pipe.vae.decode(found["unet-in"] / pipe.vae.config.scaling_factor).sample
    assert torch.allclose(found["vae-out"], expected, atol=1e-4)


def test_a_pixel_model_decodes_nothing(tmp_path: Path) -> None:
    fx = FeatureExtractor.from_pretrained(tiny_families.save_if(tmp_path), ["unet-in", "vae-out"])
    found = fx(IMAGES, t=0)
    assert torch.allclose(found["vae-out"], found["unet-in"], atol=1e-5)
    with pytest.raises(ValueError, match=r"attn cannot be made of up_cross: this model .* it has none at all"):
        fx(IMAGES, activations="attn")


# ---- how they are asked for -----------------------------------------------------------------------------------------


def test_every_way_to_ask(folder: Path, tmp_path: Path) -> None:
    both = ["attn", "vae-out"]
    fx = FeatureExtractor.from_pretrained(folder, {"attn": True, "vae-out": True, "mid-vit-out": False}, device="cpu")
    found = fx(IMAGES, PROMPTS)
    assert list(found) == list(fx.feature_info) == both
    (tmp_path / "both.json").write_text(json.dumps({"attn": True, "vae-out": True, "unet-in": False}))
    for spec in (both, tmp_path / "both.json", ["vae-out", "attn"]):
        again = fx(IMAGES, PROMPTS, activations=spec)
        assert list(again) == both and all(torch.equal(again[id], found[id]) for id in both)
    file = FeatureExtractor.from_pretrained(folder, tmp_path / "both.json", device="cpu")
    assert all(torch.equal(tensor, found[id]) for id, tensor in file(IMAGES, PROMPTS).items())
    several = fx(IMAGES, PROMPTS, t=[50, 100], ensemble=2)
    assert several["attn"].shape == (2, 2, 2 * 77, 8, 12) and several["vae-out"].shape == (2, 2, 3, HEIGHT, WIDTH)
    streamed = fx.stream(IMAGES, lambda id, x: (id, x), PROMPTS, activations=[*both, "mid-vit-out"])
    assert list(streamed) == ["mid-vit-out", *both]
    for id, (name, tensor) in streamed.items():
        assert name == id and torch.equal(tensor, fx(IMAGES, PROMPTS, activations=id)[id])


def test_they_are_listed_apart_and_no_glob_takes_them(pipe: Any) -> None:
    assert len(list_activations(pipe.unet)) == 229
    fx = FeatureExtractor.from_pipe(pipe, ["*", "*-map"])
    assert len(fx.activations) == len(fx.available) == 229
    for glob in ("att*", "vae-*"):
        with pytest.raises(UnknownActivation, match="which no glob takes; ask for it by name"):
            fx(IMAGES, activations=glob)


@pytest.mark.parametrize("id", ["attn", "vae-out"])
def test_capture_refuses_them(pipe: Any, id: str) -> None:
    with pytest.raises(UnknownActivation, match=rf"{id}.*FeatureExtractor makes it of several"), capture(pipe.unet, id):
        pass


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("upcross", "no attention 'upcross'; did you mean 'up_cross'"),
        (["up_cross", "side_self"], "no attention 'side_self'"),
        ([], "attention is empty; it takes any of down_cross"),
        ("mid_cross", "attn cannot be made of mid_cross.* it has down_cross, down_self, up_cross, up_self"),
    ],
)
def test_wrong_attention(pipe: Any, attention: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureExtractor.from_pipe(pipe, "attn", attention=attention)


def test_each_category_exists_somewhere() -> None:
    assert {f"{stage}_{kind}" for stage in ("down", "mid", "up") for kind in ("cross", "self")} == set(CATEGORIES)


def test_what_was_not_loaded_is_said(folder: Path, tmp_path: Path) -> None:
    fx = FeatureExtractor.from_pretrained(folder, "mid-vit-out", device="cpu")
    with pytest.raises(ValueError, match="vae-out needs the VAE's decoder, which was not loaded: name vae-out among"):
        fx(IMAGES, activations="vae-out")
    build("pixart_sigma").save_pretrained(tmp_path)
    cut = FeatureExtractor.from_pretrained(tmp_path, "vit-block0-out", device="cpu")
    with pytest.raises(ValueError, match="vit-block2-cross-map was not loaded"):
        cut(IMAGES, activations="attn")
    whole = FeatureExtractor.from_pretrained(tmp_path, ["vit-block0-out", "attn", "vae-out"], device="cpu")
    found = whole(IMAGES, t=300)
    assert {id: tuple(x.shape[1:]) for id, x in found.items()} == {
        "vit-block0-out": (24, 4, 6), "attn": (300, 8, 12), "vae-out": (3, HEIGHT, WIDTH),
    }  # fmt: skip


def test_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)).save(photo)
    out = ["-o", str(tmp_path / "out"), "--model", str(folder), "--device", "cpu"]
    asked = [
        "--activations",
        "attn",
        "--activations",
        "vae-out",
        "--attention",
        "down_cross",
        "--attention",
        "up_cross",
    ]
    assert main(["extract", str(photo), *out, *asked]) == 0
    store = Store.open(tmp_path / "out")
    assert store.settings["attention"] == ["down_cross", "up_cross"]
    assert store.settings["activations"]["attn"] == {"channels": 4 * 77, "stride": 8, "kind": "spatial"}
    fx = FeatureExtractor.from_pretrained(folder, "attn", attention=["down_cross", "up_cross"], device="cpu")
    assert torch.equal(store.read("photo.png")["attn"], fx(photo)["attn"][0])
    assert store.read("photo.png")["vae-out"].shape == (3, 64, 96)
    capsys.readouterr()
    assert main(["extract", str(photo), *out, *asked[:-2]]) == 2  # other settings
    assert "attention" in capsys.readouterr().err
    assert main(["extract", str(photo), *out, "--activations", "mid-vit-out", "--attention", "up_cross"]) == 2
    assert "add --activations attn" in capsys.readouterr().err
    assert main(["list", "--model", str(folder), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "229 of the 229 activations" in shown and "Besides, made of several: attn" in shown
