"""GATE on the page: the numbers are those of the package, and only what is at hand is offered."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffusion_features import FeatureExtractor, embedded
from diffusion_features.images import as_tensor
from diffusion_features.suppression import CFG, Denoise, FineGrainedPrompt, Technique
from diffusion_features.suppression.gate import ranked, trials
from segmentors.demo import shifting
from segmentors.demo.looking import Look
from segmentors.demo.models import Loaded, Models
from segmentors.demo.shifting import DENOISE, EDGES, FINER, GUIDED, finer, offered
from tests.released import seeded
from tests.tiny import save_sd15

LOOK = Look("a photo of a cat", 200, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_sd15(tmp_path_factory.mktemp("models") / "small"))


@pytest.fixture(scope="module")
def loaded(folder: str) -> Loaded:
    return Models([folder])("small")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray((seeded("shifted", 64, 64, 3).sigmoid() * 255).to(torch.uint8).numpy())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps to repaint a picture instead of twenty."""
    monkeypatch.setattr(shifting, "trials", partial(trials, steps=2))


def test_the_table_is_that_of_the_package(loaded: Loaded, folder: str, picture: Image.Image) -> None:
    steps: list[tuple[float, str]] = []
    found = shifting.test(
        loaded, picture, LOOK, [FINER, GUIDED], "sharp", 2, lambda done, what: steps.append((done, what))
    )
    sets: dict[str, list[Technique]] = {
        FINER: [FineGrainedPrompt("{prompt}, sharp")],
        GUIDED: [CFG(7.5), Denoise(by=10, steps=10)],
    }
    fx = FeatureExtractor.from_pipe(StableDiffusionPipeline.from_pretrained(folder), loaded.first_look)
    pixels = as_tensor(picture, size=64, multiple=fx.multiple)
    expected = trials(fx, pixels, sets, LOOK.prompt, t=200, seeds=[3, 4], steps=2)
    rows = ranked(expected)
    assert [row[:2] for row in found.table] == [[row.technique, row.verdict] for row in rows]
    for shown, row in zip(found.table, rows, strict=True):
        for cell, gain in ((shown[2], row.ssim), (shown[3], row.laplacian)):
            assert float(cell.split()[0]) == pytest.approx(gain.mean, abs=6e-5)
    titles = [title for _, title in found.pictures]
    assert titles[0] == "the picture" and titles[1].startswith("the model alone · SSIM ")
    assert [title.split(" · ")[0] for title in titles[2:]] == [FINER, GUIDED]
    first = {trial.technique: trial for trial in expected if trial.seed == 3}
    assert f"SSIM {first[FINER].ssim:.3f}, Laplacian {first[FINER].score:.3f}" in titles[2]
    shares = [done for done, _ in steps]
    assert shares == sorted(shares) and shares[0] == 0 and 0.7 < shares[-1] <= 1
    assert {what for _, what in steps} == {"The model alone", "Finer prompt", "Guidance and denoise"}


def test_what_is_said_follows_from_the_table(loaded: Loaded, picture: Image.Image) -> None:
    found = shifting.test(loaded, picture, LOOK, [DENOISE], "", 1)
    assert "at least three" in found.said and found.table[0][1] == "too few to tell" and "(" not in found.table[0][2]


def test_only_what_is_at_hand_is_offered(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [*offered(loaded)] == [FINER, DENOISE, GUIDED]
    small = Models(["embedded"])("embedded")
    monkeypatch.setattr(embedded, "path", lambda: tmp_path / "sd")
    monkeypatch.setattr("diffusion_features.suppression.words.embedded", lambda: tmp_path / "sd")
    assert [*offered(small)] == [FINER, DENOISE, GUIDED]
    (tmp_path / "canny").mkdir()
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "sketch.safetensors").touch()
    (tmp_path / "lora" / "notes.md").touch()
    assert [*offered(small)] == [FINER, DENOISE, GUIDED, EDGES, "sketch (LoRA)"]


@pytest.mark.parametrize(
    ("chosen", "words", "message"),
    [
        ([], "", "Choose at least one"),
        (["lora=/etc/passwd"], "", "not at hand for this model; there are finer prompt"),
        ([FINER], "", "Write the words"),
    ],
)
def test_what_cannot_be_tested_is_said(
    loaded: Loaded, picture: Image.Image, chosen: list[str], words: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shifting.test(loaded, picture, LOOK, chosen, words, 2)


def test_braces_of_a_visitor_mean_nothing() -> None:
    assert finer("{prompt:>1000000000} {0.__class__}").text.format(prompt="a") == (
        "a, {prompt:>1000000000} {0.__class__}"
    )
