"""GATE: the Laplacian score by hand, the order it puts techniques in, and how often its intervals are wrong."""

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
from scipy.stats import ttest_1samp
from torch import Tensor

from diffusion_features import FeatureExtractor
from diffusion_features.noising import add_noise, is_flow, signal_and_noise
from diffusion_features.suppression import Technique
from diffusion_features.suppression.gate import (
    BASE,
    Gain,
    Spread,
    Trial,
    _verdict,
    as_json,
    closeness,
    distances,
    interval,
    laplacian,
    laplacian_score,
    ranked,
    shown,
    trials,
)
from diffusion_features.suppression.repaint import repaint
from tests.suppression.models import UNET_IDS, extractor, photo
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


def test_intervals_are_those_of_a_t_test_over_images_and_not_their_seeds() -> None:
    values = {(image, seed): image**2 / 10 + (seed - 1) * 5 for image in range(5) for seed in range(3)}
    found = interval(values)
    expected = ttest_1samp([image**2 / 10 for image in range(5)], 0).confidence_interval(0.975)
    assert (found.mean, found.low, found.high) == pytest.approx((0.6, expected.low, expected.high))
    alone = interval({(7, seed): gain for seed, gain in enumerate((0.1, 0.5, 0.4, 0.2))})
    expected = ttest_1samp([0.1, 0.5, 0.4, 0.2], 0).confidence_interval(0.975)
    assert (alone.mean, alone.low, alone.high) == pytest.approx((0.3, expected.low, expected.high))


def test_without_spread_the_interval_is_the_mean() -> None:
    """As in the Img2Img test of denoising, which has no part in it: every gain is 0."""
    assert interval({(0, seed): 0.0 for seed in range(4)}) == Gain(0.0, 0.0, 0.0)
    assert interval({(0, seed): 0.0 for seed in range(4)}).sign == 0


@pytest.mark.parametrize(("images", "seeds"), [(1, 3), (1, 4), (1, 8), (3, 2), (4, 4), (20, 1)])
def test_a_technique_that_does_nothing_is_seldom_told_to_do_something(images: int, seeds: int) -> None:
    """The claim is 5% (of two independent tests, 1 - 0.975² = 4.9%); of 2000 the standard deviation is 0.5%."""
    random, told, missed, repeats = np.random.default_rng(0), 0, 0, 2000
    for _ in range(repeats):
        found = []
        for image in range(images):
            common = random.normal(size=2) * (images > 1)  # what an image does to all of its seeds
            for seed in range(seeds):
                ssim, score = common + random.normal(size=2)
                found += [trial(BASE, image, seed, 0.0), trial("nothing", image, seed, ssim, score)]
        (row,) = ranked(found)
        told += row.verdict in ("use", "harmful")
        missed += (row.ssim.sign != 0) + (row.laplacian.sign != 0)
    assert 0.033 < told / repeats < 0.066
    assert 0.018 < missed / (2 * repeats) < 0.033  # 2.5%, and a standard deviation of 0.25%


@pytest.mark.parametrize(("images", "seeds"), [(1, 1), (1, 2), (2, 4)])
def test_of_fewer_than_three_images_or_seeds_of_one_nothing_is_told(images: int, seeds: int) -> None:
    found = [
        one for image in range(images) for seed in range(seeds)
        for one in (trial(BASE, image, seed, 0.1), trial("better", image, seed, 0.6 + 0.01 * image + 0.01 * seed, 0.5))
    ]  # fmt: skip
    (row,) = ranked(found)
    assert row.verdict == "too few to tell" and row.ssim.mean == pytest.approx(0.5, abs=0.03)
    assert (row.ssim.low, row.ssim.high, row.ssim.sign) == (None, None, 0)


def test_an_activation_without_edges_leaves_the_score_of_the_others() -> None:
    """Of the tiny UNet at 64 pixels, the middle is a single cell."""
    fx = extractor("unet")
    found = trials(fx, photo(1), {"noise": [Stub(torch.zeros(1, 4, 8, 8))]}, seeds=[3], steps=1)[1]
    assert math.isnan(found.laplacian[UNET_IDS[1]])
    assert found.score == pytest.approx((found.laplacian[UNET_IDS[0]] + found.laplacian[UNET_IDS[2]]) / 2)


def test_what_is_undefined_decides_nothing_and_is_null_in_json() -> None:
    found = []
    for seed in range(4):
        found += [trial(BASE, 0, seed, 0.5, math.nan), trial("better", 0, seed, 0.8 + 0.01 * seed, math.nan)]
    (row,) = rows = ranked(found)
    assert row.verdict == "use" and row.ssim.sign == 1  # by the other gain alone
    assert math.isnan(row.laplacian.mean) and row.laplacian.low is None
    text = json.dumps(as_json(found, rows, {"strength": math.inf}), allow_nan=False)  # raises where there is one
    report = json.loads(text)
    assert report["techniques"][0]["laplacian"] == {"mean": None, "low": None, "high": None}
    assert report["trials"][0]["laplacian"] == {"a": None} and report["settings"] == {"strength": None}
    assert report["techniques"][0]["ssim"]["mean"] == pytest.approx(0.315)
    assert report["distances"]["better"]["score"] == {"mean": None, "deviation": None}
    mixed = [*found, *(trial(name, 1, 0, 0.5, 0.25) for name in (BASE, "better"))]
    assert distances(mixed)["better"]["score"].mean == 0.25  # of the image where it is defined


@pytest.mark.parametrize(
    ("t", "anchor_t", "message"),
    [(0, 0, "above t"), (50, 0, "above t"), (50, 50, "above t"), (50, 1000, "t=1000 is out of range"),
     (-1, 800, "t=-1 is out of range")],
)  # fmt: skip
def test_an_anchor_without_more_shift_is_refused_before_anything_is_computed(
    t: int, anchor_t: int, message: str
) -> None:
    fx = extractor("unet")

    def computed(*_: Any) -> None:
        raise AssertionError("the model was run")

    fx.pipe.vae.encoder.register_forward_pre_hook(computed)
    fx.denoiser.register_forward_pre_hook(computed)
    with pytest.raises(ValueError, match=message):
        trials(fx, photo(), {"nothing": []}, t=t, anchor_t=anchor_t, seeds=[0], steps=1)


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


def test_an_undefined_gain_does_not_count_and_is_said() -> None:
    clear, undefined = interval({(i, 0): 0.2 + 0.01 * i for i in range(5)}), interval({(0, 0): math.nan})
    assert _verdict(clear, undefined) == _verdict(undefined, clear) == "use"
    assert _verdict(undefined, undefined) == "too few to tell"
    assert shown(math.nan) == "undefined" and shown(0.12345) == "0.123"
