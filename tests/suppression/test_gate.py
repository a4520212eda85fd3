"""GATE: the Laplacian score by hand, the order it puts techniques in, its intervals, and the command."""

from __future__ import annotations

import inspect
import json
import math
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import laplace
from torch import Tensor

from diffusion_features import FeatureExtractor
from diffusion_features.cli import main
from diffusion_features.noising import add_noise, is_flow, signal_and_noise
from diffusion_features.suppression import Technique
from diffusion_features.suppression.gate import (
    BASE,
    Gain,
    Spread,
    Trial,
    bootstrap,
    closeness,
    distances,
    laplacian,
    laplacian_score,
    ranked,
    trials,
)
from diffusion_features.suppression.repaint import repaint
from tests.suppression.models import UNET_IDS, control, extractor, photo, save_lora
from tests.tiny import save_sd15


def test_the_laplacian_is_that_of_scipy() -> None:
    feature = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    each = np.stack([[laplace(c.astype(np.float64), mode="nearest") for c in f] for f in feature.numpy()])
    expected = np.sqrt((each**2).sum(1))
    np.testing.assert_allclose(laplacian(feature).numpy(), expected, rtol=1e-5)


def test_the_score_of_a_case_by_hand() -> None:
    reference, anchor, feature = torch.zeros(3, 2, 3, 3)
    reference[0, 1, 1] = 1.0  # |Lap| is 4 at the centre, 1 at its four neighbours: 8 in all
    anchor[1, 0, 0] = 2.0  # a corner: 2 of its neighbours are itself, so 2·2 there and 2 at each of two neighbours
    feature[0, 1, 1] = 0.5
    # d(anchor): corner |0-4|, neighbours of the corner |1-2| twice, centre 4, the other two neighbours 1 each
    # d(feature): half of 8
    d_anchor, d_feature = 4 + 2 * 1 + 4 + 2 * 1, 4
    score = laplacian_score(feature[None], reference[None], anchor[None])
    assert score.item() == pytest.approx((d_anchor - d_feature) / d_anchor)


def test_the_score_is_one_for_the_reference_zero_for_the_anchor_and_undefined_without_shift() -> None:
    reference, anchor = torch.randn(2, 3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    assert laplacian_score(reference, reference, anchor).tolist() == [1.0] * 3
    assert laplacian_score(anchor, reference, anchor).tolist() == [0.0] * 3
    assert (laplacian_score(anchor * 3, reference, anchor) < 0).all()
    assert all(map(math.isnan, laplacian_score(anchor, reference, reference).tolist()))
    with pytest.raises(ValueError, match="same shape"):
        laplacian_score(reference[..., :3], reference, anchor)


class Stub(Technique):
    """Makes the denoiser predict what leads to given clean latents, whatever it is called with."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents  # as the denoiser is given them

    def applied(self, fx: Any, call: Any) -> AbstractContextManager[None]:
        @contextmanager
        def inside() -> Any:
            def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
                call = inspect.signature(module.forward).bind(*args, **kwargs).arguments
                x = call["sample"] if "sample" in call else call["hidden_states"]
                signal, sigma = signal_and_noise(fx.pipe.scheduler, int(call["timestep"].flatten()[0]))
                eps = (x - signal * self.latents) / sigma
                return (eps - self.latents if is_flow(fx.pipe.scheduler) else eps,)

            handle = fx.denoiser.register_forward_hook(hook, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()

        return inside()


def encoded(fx: FeatureExtractor, image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        return fx.pipe.vae.encode(pixels).latent_dist.mean * fx.pipe.vae.config.scaling_factor


def test_repainting_arrives_where_the_denoiser_leads() -> None:
    fx = extractor("unet")
    latents = encoded(fx, photo(3))
    found = repaint(fx, photo(0), suppress=[Stub(latents)], steps=3)
    with torch.no_grad():  # ᾱ_0 is not 1: a little of what is taken for noise at the start stays
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0))[None]
        signal, sigma = signal_and_noise(fx.pipe.scheduler, 799)  # 0.8 of 999
        eps = noise + signal / sigma * (encoded(fx, photo(0)) - latents)
        left = add_noise(latents, eps, 0, fx.pipe.scheduler)
        expected = fx.pipe.vae.decode(left / fx.pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["sd3", "qwen"])
def test_decoding_undoes_the_scaling_of_encoding(name: str) -> None:
    fx = extractor(name)
    pixels = torch.from_numpy(np.array(photo())).permute(2, 0, 1)[None].float() / 127.5 - 1
    video = pixels[:, :, None] if name == "qwen" else pixels
    with torch.no_grad():
        expected = fx.pipe.vae.decode(fx.pipe.vae.encode(video).latent_dist.mean).sample
        found = fx.family.decode_latents(fx.pipe, fx.family.encode_images(fx.pipe, pixels, None))
    torch.testing.assert_close(found, expected[:, :, 0] if name == "qwen" else expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_a_technique_that_returns_the_image_ranks_above_one_that_returns_noise(name: str) -> None:
    fx = extractor(name)
    latents, noise = torch.randn(2, *encoded(fx, photo()).shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        image = fx.family.decode_latents(fx.pipe, latents)[0].clamp(
            -1, 1
        )  # one that even an untrained decoder can give
    techniques = {"noise": [Stub(noise)], "image": [Stub(latents)]}
    found = trials(fx, image, techniques, seeds=(0, 1, 2), steps=2)
    rows = ranked(found)
    assert [row.technique for row in rows] == ["image", "noise"]
    assert rows[0].verdict == "use" and rows[0].rmse.mean > rows[1].rmse.mean
    assert min(x.ssim for x in found if x.technique == "image") > 0.98
    assert {x.technique for x in found} == {BASE, "noise", "image"}
    assert all(set(x.laplacian) == {a.id for a in fx.activations} for x in found)


def trial(technique: str, image: int, seed: int, ssim: float, score: float = 0.0) -> Trial:
    return Trial(technique, image, seed, 0.0, ssim, 0.0, {"a": score}, torch.zeros(1))


def test_the_rule_of_recommendation() -> None:
    found = []
    for image in range(6):
        for seed in range(2):
            jitter = 0.01 * (-1) ** image
            found += [
                trial(BASE, image, seed, 0.5),
                trial("better", image, seed, 0.6 + jitter),
                trial("nothing", image, seed, 0.5 + jitter),
                trial("worse", image, seed, 0.4 + jitter),
                trial("mixed", image, seed, 0.6 + jitter, score=-0.1 + jitter),
            ]
    assert {row.technique: row.verdict for row in ranked(found)} == {
        "better": "use", "nothing": "no effect", "worse": "harmful", "mixed": "harmful",
    }  # fmt: skip
    assert [row.technique for row in ranked(found)] == ["better", "nothing", "mixed", "worse"]


def test_the_bootstrap_resamples_images_and_not_their_seeds() -> None:
    values = {(image, seed): image / 10 + (seed - 1) * 5 for image in range(40) for seed in range(3)}
    found = bootstrap(values)
    spread = np.std([image / 10 for image in range(40)]) / math.sqrt(40)
    assert found.mean == pytest.approx(1.95)
    assert found.low == pytest.approx(1.95 - 1.96 * spread, abs=0.05)
    assert found.high == pytest.approx(1.95 + 1.96 * spread, abs=0.05)
    assert bootstrap({(0, 0): 0.3}) == Gain(0.3, None, None) and bootstrap({(0, 0): 0.3}).sign == 0


def test_the_spread_is_over_the_seeds_of_an_image_alone() -> None:
    found = [
        trial(BASE, image, seed, 10.0 * image + value) for image in (0, 1) for seed, value in enumerate((1.0, 3.0))
    ]
    assert distances(found)[BASE]["ssim"] == Spread(7.0, pytest.approx(math.sqrt(2)))
    assert distances(found[:1])[BASE]["ssim"] == Spread(1.0, None)


def test_the_feature_distance_is_half_of_lpips_without_weights() -> None:
    fx = extractor("unet")
    found = trials(fx, photo(1), {"noise": [Stub(torch.zeros(1, 4, 8, 8))]}, seeds=[3], steps=2)[1]
    ours = fx(photo(1), t=0, seed=3)
    other = fx(found.repainted[None], t=0, seed=3)
    layers = []
    for id in UNET_IDS:
        a, b = (f[id][0].double().flatten(1).numpy() for f in (ours, other))
        unit_a, unit_b = (x / np.sqrt((x**2).sum(0)) for x in (a, b))
        layers.append(((unit_a - unit_b) ** 2).sum(0).mean())
    assert found.feature_distance == pytest.approx(np.mean(layers) / 2, rel=1e-4) and found.feature_distance > 1e-3


def test_closeness_of_equal_and_of_opposite_images() -> None:
    image = torch.ones(3, 16, 16)
    assert closeness(image, image) == (0.0, 1.0)
    assert closeness(-image, image)[0] == pytest.approx(1.0)


def test_repainting_needs_a_decoder(tmp_path: Path) -> None:
    fx = FeatureExtractor.from_pretrained(save_sd15(tmp_path), UNET_IDS, device="cpu")
    with pytest.raises(ValueError, match="decoder was not loaded"):
        repaint(fx, photo(), steps=1)


def test_the_command_writes_a_report_and_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, image = save_sd15(tmp_path / "sd"), tmp_path / "photo.png"
    photo().save(image)
    fx = extractor("unet")
    control(fx).save_pretrained(tmp_path / "control")
    lora = save_lora(fx, tmp_path)
    words = [f"canny={tmp_path / 'control'}@0.5", f"lora={lora}", "prompt={prompt}, the red"]
    code = main([
        "gate", str(image), "--model", str(model), "--technique", *words, "--together", "--steps", "2", "--seeds", "2",
        "-o", str(tmp_path / "report"), "--activations", "up-level1-upsampler-out",
    ])  # fmt: skip
    assert code == 0
    report = json.loads((tmp_path / "report" / "gate.json").read_text())
    assert {row["technique"] for row in report["techniques"]} == {*words, "together"}
    assert len(report["trials"]) == 5 * 2 and report["settings"]["t"] == 50
    assert Image.open(tmp_path / "report" / "gate.png").width > 5 * 192
    out = capsys.readouterr().out
    assert "recommendation" in out and "together" in out
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["gate.html", "gate.json", "gate.png"]
    page = (tmp_path / "report" / "gate.html").read_text()
    assert page.count("<img ") == 1 + 5 and "up-level1-upsampler-out" in page


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("cany", "did you mean 'canny'"),
        ("lora", "lora needs a value"),
        ("cfg=much", "cfg must be a number, not 'much'"),
        ("lora=nowhere.safetensors", "There is no file nowhere.safetensors"),
        ("cfg=3", "Add Denoise"),
    ],
)
def test_words_that_are_wrong_are_named(word: str, message: str, tmp_path: Path, capsys: Any) -> None:
    photo().save(tmp_path / "photo.png")
    model = save_sd15(tmp_path / "sd")
    code = main(["gate", str(tmp_path / "photo.png"), "--model", str(model), "--technique", word, "--steps", "1"])
    assert code == 2
    assert message in capsys.readouterr().err
