"""Measuring a running model: streamed numbers against those of stored activations; the probe; the choice."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffusion_features import FeatureExtractor
from diffusion_features.activations import Activation
from diffusion_features.atlas import (
    Entry,
    Labelled,
    Limits,
    Properties,
    choose,
    granularity,
    measure,
    place_filter,
    preset,
    probe,
    properties,
    published_filter,
)
from diffusion_features.atlas import probing as probing_module
from diffusion_features.atlas.page import TILE, page, place_and_kind
from diffusion_features.atlas.probing import Ridge, mean_iou
from diffusion_features.cli import main
from diffusion_features.extractor import FeatureInfo
from tests.tiny import save_sd15, sd15_pipe

IDS = ["up-level1-repeat0-res-out", "up-level2-repeat1-vit-block0-cross-q", "up-level3-repeat0-vit-block0-out"]


@pytest.fixture(scope="module")
def fx() -> FeatureExtractor:
    return FeatureExtractor.from_pipe(sd15_pipe(), IDS)


def picture(seed: int, height: int = 64, width: int = 96) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def test_streamed_equals_stored(fx):
    """Of images that are not square; each draw is what a call with its seed gives."""
    images = [picture(1), picture(2)]
    entries = measure(fx, images, fx.activations, ["a cat", "a dog"], t=100, seed=5, draws=3)
    assert [e.activation.id for e in entries] == [a.id for a in fx.activations]
    for entry in entries:
        each = []
        for number, (image, prompt) in enumerate(zip(images, ["a cat", "a dog"], strict=True)):
            draws = [fx(image, prompt, t=100, seed=5 + 3 * number + s)[entry.activation.id][0] for s in range(3)]
            each.append(properties(torch.stack(draws), seed=5))
        truth = np.mean(each, axis=0)
        assert np.allclose(entry.properties, truth, rtol=1e-3, atol=1e-4)


def test_one_forward_an_image_and_no_activation_is_kept(fx):
    calls = []
    handle = fx.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    progress = []
    entries = measure(fx, [picture(1)] * 3, fx.activations, [""] * 3, draws=2, done=lambda: progress.append(1))
    handle.remove()
    assert len(calls) == len(progress) == 3
    assert not any(isinstance(value, torch.Tensor) for entry in entries for value in vars(entry).values())


def test_more_noise_at_a_higher_timestep(fx):
    low, high = (measure(fx, [picture(1)], fx.activations, [""], t=t) for t in (10, 900))
    assert all(a.properties.noise < b.properties.noise for a, b in zip(low, high, strict=True))


def test_nothing_to_measure(fx):
    with pytest.raises(ValueError, match="not 1, 0 and 3"):
        measure(fx, [picture(1)], fx.activations, [])


def test_ridge_against_a_solver_in_float64():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator, dtype=torch.float64) * torch.tensor([1, 5, 0.1, 1, 1, 0.0]) + 3
    y = torch.rand(300, 3, generator=generator, dtype=torch.float64)
    ridge = Ridge()
    for rows in torch.arange(300).split(70):
        ridge.add(x[rows], y[rows])
    ridge.add(torch.full((5, 6), 1e6), torch.zeros(5, 3))  # cells without a label
    weights, bias = ridge.solve()
    scaled = ((x - x.mean(0)) / x.std(0, correction=0))[:, :5]
    left = torch.cat([scaled / 300**0.5, probing_module.RIDGE**0.5 * torch.eye(5)])
    right = torch.cat([(y - y.mean(0)) / 300**0.5, torch.zeros(5, 3)])
    truth = scaled @ torch.linalg.lstsq(left, right).solution + y.mean(0)
    assert torch.allclose(x @ weights + bias, truth, atol=1e-8)


def test_mean_iou_by_hand():
    assert mean_iou(np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]])) == pytest.approx((3 / 6 + 4 / 7) / 2)


class Drawn:
    """An extractor whose activations are known: one shows the labels, one shows them coarsely, one is noise."""

    def stream(self, image, reduce, prompt, *, t, seed, activations, size):
        labels = torch.from_numpy(np.array(image)).float()[None, None]
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        shown = {"good": torch.cat([labels, noise[:, :1].repeat(1, 1, 4, 4)], 1), "noise": noise}
        shown["coarse"] = F.avg_pool2d(shown["good"], 8)
        return {id: reduce(id, shown[id]) for id in activations}


def halves(seed: int) -> Labelled:
    labels = np.zeros((32, 32), np.uint8)
    column = int(np.random.default_rng(seed).integers(6, 26))
    labels[:, column:] = 1
    return Labelled(Image.fromarray(labels), labels)


def test_the_probe_ranks_what_it_should():
    found = probe(
        Drawn(), [halves(i) for i in range(6)], [halves(i) for i in range(6, 10)], ["noise", "coarse", "good"]
    )
    assert found["good"] > 0.98
    assert found["noise"] < 0.6 < found["coarse"] < found["good"]


def test_ignored_pixels_count_nowhere():
    """With wrong labels in the left third turned to 255, the probe is as good as without them."""
    spoiled = []
    for number in range(6):
        labels = halves(number).labels.copy()
        labels[:, :5] = 255
        spoiled.append(Labelled(halves(number).image, labels))
    assert probe(Drawn(), spoiled[:4], spoiled[4:], ["good"])["good"] > 0.98


def entry(id: str, stride: int, *numbers: float) -> Entry:
    activation = Activation(id, "spatial", "m", "output", 8, stride)
    return Entry(activation, Properties(*numbers), Image.new("RGB", (2, 2)), 4 * stride)


ENTRIES = [
    entry("a-clean-out", 4, 0.01, 0.20, 0.1),
    entry("a-poor-out", 4, 0.01, 0.10, 0.1),
    entry("b-noisy-out", 2, 0.50, 0.10, 0.1),
    entry("b-local-q", 2, 0.01, 0.15, 0.9),
    entry("b-fine-out", 2, 0.05, 0.30, 0.2),
    entry("b-kind-out", 2, 0.00, 0.35, 0.0),
]


def test_the_choice_by_hand():
    choice = choose(ENTRIES, Limits(noise=0.1, locality=0.4), {"b-kind-out": "noise: an increment"})
    assert choice.dropped == {
        "b-noisy-out": "noise: 0.500 > 0.1", "b-local-q": "locality: 0.900 > 0.4", "b-kind-out": "noise: an increment",
    }  # fmt: skip
    assert [*choice.shortlist] == ["b-fine-out", "a-clean-out", "a-poor-out"]
    assert choice.shortlist["b-fine-out"] == pytest.approx(0.95 * 0.3 / 8)  # two cells of four pixels
    assert choice.preset == ["a-clean-out", "b-fine-out"]
    assert preset(ENTRIES, {"a-poor-out": 0.5, "a-clean-out": 0.4}) == ["a-poor-out"]
    assert granularity(ENTRIES) == {
        "a-poor-out": 1, "a-clean-out": 2, "b-noisy-out": 1, "b-local-q": 2, "b-fine-out": 3, "b-kind-out": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"the least noise is 0\.000, the least locality 0\.000"):
        choose(ENTRIES, Limits(noise=-1))
    short = choose(ENTRIES, Limits(noise=0.1, locality=0.4), {"b-kind-out": "noise: an increment"}, most=2)
    assert [*short.shortlist] == ["b-fine-out", "a-clean-out"] and short.preset == choice.preset
    assert short.dropped == {**choice.dropped, "a-poor-out": "score: 3 of 3"}
    with pytest.raises(ValueError, match="at least one activation, not 0"):
        choose(ENTRIES, most=0)


class Mixed:
    """An extractor of 24 activations on a grid of labels, of which the share of noise and the blur are known. The best
    is an increment without noise; another increment is all noise, and so is what is late."""

    def __init__(self) -> None:
        places = [f"up-level{level}-repeat{repeat}" for level in (0, 1) for repeat in range(3)]
        self.noise = {f"{place}-res-out": 0.15 + 0.01 * n for n, place in enumerate(places)}
        self.noise |= {f"{place}-res-increment": 0.9 for place in places}
        self.noise |= {f"up-level2-repeat{n}-res-out": 0.9 for n in range(3)}
        self.noise |= {f"down-level0-repeat{n}-res-out": 0.0 for n in range(8)}
        self.noise["up-level1-repeat2-vit-block0-ffn-inner"] = 0.0
        self.best = [*self.noise][-1]
        self.available = [Activation(id, "spatial", "m", "output", 3, 2) for id in self.noise]

    def info(self, activation):
        return FeatureInfo(activation.channels, 4 * activation.stride, activation.kind)

    def stream(self, images, reduce, prompt, *, t, seed, activations, size):
        several = isinstance(images, list)
        seeds = seed if several else [seed]
        labels = torch.from_numpy(np.array(images[0] if several else images)).float()
        shown = torch.stack([(labels == number).float() for number in range(3)])[None]
        for place, id in enumerate(activations):
            draws = [
                torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(10**4 * place + s)) for s in seeds
            ]
            share = self.noise[id]
            blurred = shown if id == self.best else F.avg_pool2d(shown, 7, 1, 3, count_include_pad=False)
            reduce(id, (1 - share) * blurred + share * torch.cat(draws))


def patches(seed: int) -> Labelled:
    labels = np.random.default_rng(seed).integers(0, 3, (5, 5), np.uint8).repeat(7, 0).repeat(7, 1)[:32, :32]
    return Labelled(Image.fromarray(labels), labels)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_full_probing_stays_though_its_kind_is_noisy_by_name(seed):
    fx = Mixed()
    scenes = [patches(100 * seed + n) for n in range(9)]
    truth = probe(fx, scenes[:4], scenes[4:6], [a.id for a in fx.available], seed=seed)
    early = {id: value for id, value in truth.items() if not id.startswith("down-")}
    assert max(early, key=early.__getitem__) == fx.best
    entries = measure(fx, [s.image for s in scenes[6:]], fx.available, [""] * 3, seed=1000 * seed)
    choice = choose(entries, Limits(noise=0.5, locality=1), place_filter(fx.available), most=5)
    assert next(iter(choice.shortlist)) == fx.best and len(choice.shortlist) == 5
    assert all(">" in choice.dropped[id] for id in truth if id.endswith("res-increment"))  # by what was measured
    by_kind = choose(entries, Limits(noise=0.5, locality=1), published_filter(fx.available))
    assert fx.best not in by_kind.shortlist


def test_the_page_has_a_place_for_each():
    assert place_and_kind("up-level1-repeat0-vit-block3-cross-q") == ("up-level1-repeat0-vit-block3", "cross-q")
    assert place_and_kind("up-level1-repeat0-vit-block3-out") == ("up-level1-repeat0-vit-block3", "block-out")
    assert place_and_kind("up-level1-repeat0-vit-out") == ("up-level1-repeat0", "vit-out")
    red = [replace(e, picture=Image.new("RGB", (2, 2), "red")) for e in ENTRIES]
    sheet = np.asarray(page(red, dropped={"b-noisy-out"}, preset=["a-clean-out"]))
    assert ((sheet == (255, 0, 0)).all(-1).sum()) == 5 * TILE**2
    assert ((sheet == (0x12, 0x80, 0x5C)).all(-1)).any()


def test_the_command(tmp_path, capsys):
    model = save_sd15(tmp_path / "model")
    (tmp_path / "photos").mkdir(), (tmp_path / "masks").mkdir()
    for number in range(3):
        picture(number).save(tmp_path / "photos" / f"{number}.png")
        Image.fromarray(halves(number).labels).save(tmp_path / "masks" / f"{number}.png")
    command = ["atlas", tmp_path / "photos", "-o", tmp_path / "out", "--model", model, "--size", "64", "--noise", "1",
               "--locality", "1", "--images", "2", "--masks", tmp_path / "masks"]  # fmt: skip
    command += [part for id in IDS for part in ("--activations", id)]
    assert main([str(part) for part in command]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "atlas.json").read_text())
    assert found["images"] == ["0.png", "1.png"]
    assert [row["id"] for row in found["activations"]] == IDS
    assert [row["stride"] for row in found["activations"]] == [32, 16, 8]  # image pixels
    assert all(0 <= row["probe"] <= 1 and row["id"] in out for row in found["activations"])
    assert json.loads((tmp_path / "out" / "preset.json").read_text()) == found["preset"] == IDS  # one a grid
    assert Image.open(tmp_path / "out" / "atlas.png").width > 100
    assert FeatureExtractor.from_pretrained(model, tmp_path / "out" / "preset.json").activations
    assert not [*(tmp_path / "out").glob("*.part")]

    assert main([*map(str, command[:-6]), "--masks", str(tmp_path / "nowhere")]) == 2
    assert "there is no mask" in capsys.readouterr().err


def test_composed_activations_are_ranked_by_their_own_cells():
    ids = ["attn", "up-level2-repeat1-vit-block0-cross-q"]
    fx = FeatureExtractor.from_pipe(sd15_pipe(), ids)
    measured = {entry.activation.id: entry for entry in measure(fx, [picture(0)], fx.activations, [""], size=64)}
    composed, plain = (measured[id] for id in ids)
    assert (composed.stride, plain.stride) == (8, 16)
    expected = (1 - composed.properties.noise) * composed.properties.frequency / 8
    choice = choose([composed, plain], Limits(1, 1), {}, 2)
    assert choice.shortlist["attn"] == pytest.approx(expected)
    assert granularity([composed, plain]) == dict.fromkeys(ids, 1)  # alone in their grids
    assert preset([composed, plain], choice.shortlist) == ids[::-1]


def test_limits_are_said_as_they_are(capsys):
    with pytest.raises(SystemExit):
        main(["atlas", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    defaults = inspect.signature(Limits).parameters
    for name in ("noise", "locality"):
        assert f"largest {name} that is kept (default: {defaults[name].default:g})" in text
