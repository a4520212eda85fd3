"""``segment`` and ``evaluate`` from the command line to the files they write."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion_features.cli import main
from diffusion_features.cli.evaluate import _write_json
from diffusion_features.cli.segment import read_classes
from segmentors.training_free.pictures import label_image, overlay, palette, step_sheet
from tests.released import seeded
from tests.tiny import save_sd15


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_sd15(tmp_path_factory.mktemp("model")))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = (seeded("photo", 40, 60, 3).sigmoid() * 255).to(torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_segment_writes_all_it_says(photo: Path, tmp_path: Path, model: str, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    wanted = ["--classes", "cat", "red dog", "--background", "grass", "--steps", "--model", model, "-o", str(out)]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert main(["segment", str(photo), str(tmp_path / "broken.png"), *wanted]) == 1
    said = capsys.readouterr().err
    assert "broken.png" in said and "1 segmented" in said and "1 could not be read" in said
    ends = ("overlay.png", "labels.png", "scores.safetensors", "json", "steps.png")
    assert {path.name for path in out.iterdir()} == {f"photo.png.{end}" for end in ends}
    about = json.loads((out / "photo.png.json").read_text())
    assert about["classes"] == ["background", "cat", "red dog"] and about["prompts"] == ["cat, red dog, grass"]
    assert sum(about["layer_weights"].values()) == pytest.approx(1)
    scores = load_file(out / "photo.png.scores.safetensors")["scores"]
    labels = Image.open(out / "photo.png.labels.png")
    assert labels.mode == "P" and scores.shape == (3, 40, 60)
    assert np.array_equal(np.array(labels), scores.argmax(0).numpy())
    assert labels.getpalette()[:9] == [value for colour in palette(about["classes"]) for value in colour]  # type: ignore[index]
    assert Image.open(out / "photo.png.overlay.png").width == 60


def test_classes_from_a_file(photo: Path, tmp_path: Path, model: str) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("\n cat , photo\n\n\nred dog\n")
    assert read_classes(file) == {"cat": ["cat", "photo"], "red dog": ["red dog"]}
    command = ["segment", str(photo), "--classes-file", str(file), "--model", model, "-o", str(tmp_path / "out")]
    assert main(command) == 0
    about = json.loads((tmp_path / "out" / "photo.png.json").read_text())
    assert about["classes"] == ["cat", "red dog"] and about["prompts"] == ["cat, photo, red dog"]


@pytest.mark.parametrize(
    ("text", "message"), [("\n  \n,\n", "names no class"), ("cat\ndog\ncat\n", "'cat' is given twice")]
)
def test_bad_classes_files(text: str, message: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "classes.txt"
    file.write_text(text)
    assert main(["segment", str(photo), "--classes-file", str(file), "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_bad_names_are_refused_before_anything_is_written(
    photo: Path, tmp_path: Path, model: str, capsys: pytest.CaptureFixture
) -> None:
    out = ["--model", model, "-o", str(tmp_path / "out")]
    assert main(["segment", str(photo), "--classes", "cat", "cat", *out]) == 2
    assert "'cat' is given twice" in capsys.readouterr().err
    assert main(["segment", str(photo), "--classes", *(f"cat{i}" for i in range(257)), *out]) == 2
    assert "a label image holds 256 classes, not 257" in capsys.readouterr().err
    assert main(["segment", str(photo), "--classes", "cat", "--background", *out]) == 2
    assert "would never be found" in capsys.readouterr().err
    assert main(["segment", str(photo), "--classes", "cat", "--background", "CAT", *out]) == 2
    assert "'CAT' is given twice among classes and background" in capsys.readouterr().err
    assert main(["segment", str(photo), "--classes", "cat", "--size", "30", *out]) == 2
    assert "multiples of 8" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["segment", str(photo), *out])
    assert not (tmp_path / "out").exists()


def test_evaluate_writes_its_figures(tmp_path: Path, model: str, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "new" / "figures.json"
    command = ["evaluate", "--dataset", "embedded", "--split", "held-out", "--limit", "2", "--model", model]
    assert main([*command, "--protocol", "image-classes", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    figures = json.loads(file.read_text())
    assert figures["protocol"] == "image-classes" and figures["images"] == 2 and figures["split"] == "held-out"
    assert 0 <= figures["miou"] <= 1 and len(figures["per_class"]) == 18 and None in figures["per_class"].values()
    assert figures["miou"] == pytest.approx(np.mean([v for v in figures["per_class"].values() if v is not None]))
    assert "protocol image-classes: each image's own classes" in said and f"{figures['miou']:.3f}" in said
    assert [path.name for path in file.parent.iterdir()] == ["figures.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol", "full"], "there is no protocol 'full'"),
        (["--dataset", "embeded"], "did you mean 'embedded'?"),
        (["--split", "val"], "it has train, validation, test, held-out"),
        (["--dataset", "voc"], "say in which folder it is"),
        (["--limit", "0"], "at least one image"),
        (["--background", "sky"], "no background class"),
    ],
)
def test_bad_evaluations(options: list[str], message: str, model: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", "--model", model, *options]) == 2
    assert message in capsys.readouterr().err


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_what_is_undefined_is_null_in_json(tmp_path: Path) -> None:
    _write_json(tmp_path / "f.json", {"miou": math.nan, "miou_interval": [math.nan, 0.5], "swept": {0.1: math.inf}})
    found = json.loads((tmp_path / "f.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found == {"miou": None, "miou_interval": [None, 0.5], "swept": {"0.1": None}}


def test_colours_are_distinct_and_the_background_is_black() -> None:
    names = [f"class {i}" for i in range(150)]
    assert len(set(palette(names))) == 150 and palette(names)[:3] == palette(names[:3])
    assert palette(["background", "cat"]) == [(0, 0, 0), palette(["cat"])[0]]


def test_a_label_image_holds_what_a_byte_holds() -> None:
    labels = torch.tensor([[0, 255], [7, 1]])
    assert np.array(label_image(labels, palette(list(map(str, range(256)))))).tolist() == labels.tolist()
    with pytest.raises(ValueError, match="256 classes, not 257"):
        label_image(labels, palette(list(map(str, range(257)))))


def test_an_overlay_names_the_classes_that_occur() -> None:
    image, labels = Image.new("RGB", (80, 50), (100, 100, 100)), torch.zeros(50, 80, dtype=torch.int64)
    names = ["cat", "a class of a long name", "dog"]
    one = overlay(image, labels, names, palette(names))
    labels[:, 40:] = 2
    both = overlay(image, labels, names, palette(names))
    assert one.getpixel((10, 10)) == both.getpixel((10, 10)) != both.getpixel((60, 10))
    assert both.height >= one.height > 50 and both.width == 80
    expected = [round(0.45 * 100 + 0.55 * value) for value in palette(names)[0]]
    assert np.allclose(one.getpixel((10, 10)), expected, atol=1)


def test_a_sheet_of_steps_has_a_row_for_each_class() -> None:
    image, maps = Image.new("RGB", (40, 20)), {"raw": torch.zeros(3, 4, 8), "refined": torch.ones(3, 4, 8)}
    names = ["cat", "dog", "sky"]
    sheet = step_sheet(image, maps, torch.zeros(20, 40, dtype=torch.int64), names, palette(names), tile=20)
    more = step_sheet(image, {**maps, "x": maps["raw"]}, torch.zeros(20, 40).long(), names, palette(names), tile=20)
    assert more.width > sheet.width and more.height == sheet.height > 3 * 20
