"""``diffusion-features gate``: what it writes and prints, what it keeps when it ends early, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusion_features.cli import main
from diffusion_features.suppression import gate
from diffusion_features.suppression.words import words_of
from tests.suppression.models import control, extractor, photo, save_lora
from tests.tiny import save_sd15


def test_the_command_writes_a_report_and_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, image = save_sd15(tmp_path / "sd"), tmp_path / "photo.png"
    photo().save(image)
    fx = extractor("unet")
    control(fx).save_pretrained(tmp_path / "control")
    lora = save_lora(fx, tmp_path)
    words = [f"canny={tmp_path / 'control'}@0.5", f"lora={lora}", "prompt={prompt} + the red"]
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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("canny", ["canny"]),
        ("canny + denoise=5 + lora=a@0.5", ["canny", "denoise=5", "lora=a@0.5"]),
        ("prompt=a cat + a dog", ["prompt=a cat + a dog"]),
        ("prompt=a cat + a dog + canny@0.5", ["prompt=a cat + a dog", "canny@0.5"]),
        ("prompt=blur + depth of field", ["prompt=blur + depth of field"]),
        ("lora=a + b.safetensors + cfg=3", ["lora=a + b.safetensors", "cfg=3"]),
        ("prompt=a cat + denois", ["prompt=a cat", "denois"]),
        ("prompt=a cat + styel=3", ["prompt=a cat", "styel=3"]),
        ("prompt=1 + 1 = 2", ["prompt=1 + 1 = 2"]),
        ("cfg=7.5 + a dog", ["cfg=7.5", "a dog"]),
        ("lora=a@0.5 + cany", ["lora=a@0.5", "cany"]),
        ("canny + denois", ["canny", "denois"]),  # no value that it could be part of: named as a mistake
    ],
)
def test_a_plus_in_a_text_is_part_of_it_unless_a_technique_follows(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def folder_of(tmp_path: Path, *seeds: int) -> Path:
    """Images by name and seed, and before, between and behind them files that are none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in seeds:
        photo(seed).save(folder / f"photo{seed}.png")
    for name in ("broken.png", "photo1a.png", "z.png"):
        (folder / name).write_text("no image")
    return folder


def gate_of(tmp_path: Path, *more: str) -> list[str]:
    return [
        "gate", str(tmp_path / "photos"), "--model", str(save_sd15(tmp_path / "sd")), "--technique", "prompt=a cat",
        "--steps", "1", "--seeds", "1", "-o", str(tmp_path / "report"), "--activations", "mid-vit-block0-out", *more,
    ]  # fmt: skip


def test_images_that_cannot_be_read_are_named_and_the_others_measured(tmp_path: Path, capsys: Any) -> None:
    folder_of(tmp_path, 1, 2, 3)
    assert main(gate_of(tmp_path)) == 1
    said = capsys.readouterr()
    assert all(name in said.err for name in ("broken.png", "photo1a.png", "z.png", "3 measured, 3 could not be read"))
    assert "prompt=a cat" in said.out
    report = json.loads((tmp_path / "report" / "gate.json").read_text())
    assert report["settings"]["images"] == ["photo1.png", "photo2.png", "photo3.png"]
    fx, expected = extractor_of(tmp_path), []
    for index in range(3):
        sets = {"prompt=a cat": [{"type": "FineGrainedPrompt", "text": "a cat"}]}
        expected += gate.trials(fx, photo(index + 1), sets, seeds=[0], steps=1, index=index)
    found = [(x["image"], x["technique"], x["ssim"]) for x in report["trials"]]
    assert found == [(x.image, x.technique, pytest.approx(x.ssim)) for x in expected]
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["gate.html", "gate.json", "gate.png"]


def extractor_of(tmp_path: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    from diffusion_features import FeatureExtractor

    return FeatureExtractor.from_pipe(StableDiffusionPipeline.from_pretrained(tmp_path / "sd"), "mid-vit-block0-out")


def test_of_no_readable_image_it_says_so(tmp_path: Path, capsys: Any) -> None:
    folder_of(tmp_path)
    assert main(gate_of(tmp_path)) == 1
    assert "None of the images could be read (3 in all)" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError("no space left"), 2)])
def test_an_early_end_leaves_what_was_measured(
    error: BaseException, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path, 1, 2, 3)
    measure = gate.trials

    def ends(*args: Any, index: int, **options: Any) -> Any:
        if index == 2:
            raise error
        return measure(*args, index=index, **options)

    monkeypatch.setattr(gate, "trials", ends)
    assert main(gate_of(tmp_path)) == code
    report = json.loads((tmp_path / "report" / "gate.json").read_text())
    assert report["settings"]["images"] == ["photo1.png", "photo2.png"] and len(report["trials"]) == 2 * 2
    assert [p.name for p in (tmp_path / "report").iterdir()] == ["gate.json"]


def test_a_kill_while_writing_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path, 1, 2)
    write, calls = Path.write_text, []

    def cut_short(path: Path, text: str, *args: Any, **options: Any) -> int:
        if "gate.json" in path.name:
            calls.append(path)
        if len(calls) == 2:
            write(path, text[: len(text) // 2], *args, **options)
            raise KeyboardInterrupt
        return write(path, text, *args, **options)

    command = gate_of(tmp_path)
    monkeypatch.setattr(Path, "write_text", cut_short)
    assert main(command) == 130
    assert json.loads((tmp_path / "report" / "gate.json").read_text())["settings"]["images"] == ["photo1.png"]


def test_an_anchor_without_more_shift_is_refused_before_the_model_is_loaded(tmp_path: Path, capsys: Any) -> None:
    photo().save(tmp_path / "photo.png")
    call = ["gate", str(tmp_path / "photo.png"), "--model", str(tmp_path / "nowhere"), "--technique", "canny"]
    for t, anchor in (("0", "0"), ("50", "50"), ("900", "800")):
        assert main([*call, "--t", t, "--anchor-t", anchor]) == 2
        assert f"must be above t (--t), but is {anchor} where t is {t}" in capsys.readouterr().err
