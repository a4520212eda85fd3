"""``parts train`` and ``parts predict``: from features on disk to label pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion_features.cli import main
from diffusion_features.store import Store
from segmentors.pixel_classifier import load, training
from tests.tiny import save_sd15

SIZE = (12, 18)


def write_store(folder, seed: int, count: int = 4, **settings):
    """Features of which the first channel of "fine" shows a label, and the labels: 1 right of a column, 0 left."""
    info = {id: {"channels": c, "stride": 1, "kind": "spatial"} for id, c in (("fine", 5), ("coarse", 3))}
    generator = torch.Generator().manual_seed(seed)
    rng, labels = np.random.default_rng(seed), {}
    with Store.create(folder, {"model": "m", "t": [50], "activations": info, **settings}) as store:
        for number in range(count):
            key = f"more/{number}.jpg"
            labels[key] = np.zeros(SIZE, np.uint8)
            labels[key][:, int(rng.integers(4, 14)) :] = 1
            fine = torch.randn(5, *SIZE, generator=generator)
            fine[0] = torch.from_numpy(labels[key]).float() * 8 - 4
            coarse = torch.randn(3, 3, 4, generator=generator)
            store.write(key, {"fine": fine, "coarse": coarse}, {"original_size": SIZE, "sha256": f"{seed}{number}"})
    return labels


def write_masks(folder, labels):
    for key, map in labels.items():
        path = (folder / key).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(map).save(path)


@pytest.fixture
def root(tmp_path):
    """Features of four images, of which the first three have labels; and of four others."""
    labels = write_store(tmp_path / "learn", 0)
    write_masks(tmp_path / "labels", {key: labels[key] for key in [*labels][:3]})
    write_masks(tmp_path / "truth", write_store(tmp_path / "other", 1))
    return tmp_path


def train(root, *extra: str, steps: int = 5) -> int:
    return main(["parts", "train", str(root / "learn"), "--masks", str(root / "labels"), "-o", str(root / "c.st"),
                 "--steps", str(steps), *extra])  # fmt: skip


def predict(root, *extra: str) -> int:
    return main(["parts", "predict", str(root / "other"), "--classifier", str(root / "c.st"), "-o", str(root / "out"),
                 *extra])  # fmt: skip


def test_it_learns_what_the_features_show(root, capsys):
    assert train(root, steps=100) == 0
    assert "2 classes, 3 of the 4 images have labels" in capsys.readouterr().err
    assert predict(root, "--masks", str(root / "truth")) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((root / "out" / "predictions.json").read_text())
    right, either = np.zeros(2), np.zeros(2)
    for key in found["doubt"]:
        picture = Image.open(root / "out" / f"{key}.labels.png")
        assert picture.mode == "P" and picture.size == SIZE[::-1]
        truth = np.asarray(Image.open((root / "truth" / key).with_suffix(".png")))
        for number in (0, 1):
            right[number] += ((np.asarray(picture) == number) & (truth == number)).sum()
            either[number] += ((np.asarray(picture) == number) | (truth == number)).sum()
    assert [found["iou"]["0"], found["iou"]["1"]] == pytest.approx(right / either)
    assert found["miou"] == pytest.approx((right / either).mean()) and found["miou"] > 0.9
    doubts = [float(line.split("doubt")[1]) for line in lines[:4]]
    assert doubts == sorted(doubts, reverse=True) and "mean IoU" in lines[-1]


def test_a_killed_training_ends_with_the_same_classifier(root, monkeypatch):
    monkeypatch.setattr(training, "SAVED_EVERY", 4)
    monkeypatch.setattr(training, "POOL", 8 * 64 * 7)  # 6 batches a pool: the checkpoint is in the middle of the second
    assert train(root, steps=14) == 0
    whole = load_file(root / "c.st")
    (root / "c.st").unlink()
    cross_entropy, calls = torch.nn.functional.cross_entropy, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return cross_entropy(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", killed)
        assert train(root, steps=14) == 130
        assert not (root / "c.st").exists() and len([*root.glob(".c.st.*.training")]) == 1
        calls[:] = [1] * 20
        assert train(root, steps=14) == 0
    assert len(calls) - 20 == 14 - 8
    again = load_file(root / "c.st")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not [*root.glob(".c.st*")]


def test_done_is_not_done_again_and_other_settings_are_refused(root, capsys):
    assert train(root) == 0
    before = (root / "c.st").read_bytes()
    assert train(root) == 0 and "is there already" in capsys.readouterr().err
    assert train(root, "--seed", "1") == 2
    assert "trained with other settings (seed)" in capsys.readouterr().err
    assert (root / "c.st").read_bytes() == before
    assert train(root, "--seed", "1", "--overwrite") == 0 and (root / "c.st").read_bytes() != before


def test_predictions_are_resumed_and_made_anew_for_another_classifier(root):
    assert train(root) == 0 and predict(root) == 0
    first, second = (root / "out" / "more" / f"{number}.jpg.labels.png" for number in (0, 1))
    times = first.stat().st_mtime_ns
    doubt = json.loads((root / "out" / "predictions.json").read_text())["doubt"]
    second.unlink()
    assert predict(root) == 0
    assert first.stat().st_mtime_ns == times and second.is_file()
    assert json.loads((root / "out" / "predictions.json").read_text())["doubt"] == doubt
    assert train(root, "--seed", "1", "--overwrite") == 0 and predict(root) == 0
    assert first.stat().st_mtime_ns != times


def test_features_must_be_of_the_same_kind(root, capsys):
    assert train(root) == 0
    for name, change, message in (
        ("a", {"t": [200]}, "features with t [50], but those in"),
        ("b", {"model": "n"}, "features with model m"),
        ("c", {"t": [1, 2]}, "several timesteps"),
    ):
        write_store(root / name, 1, **change)
        arguments = ["parts", "predict", str(root / name), "--classifier", str(root / "c.st"), "-o", str(root / "o")]
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    info = {"fine": {"channels": 7, "stride": 1, "kind": "spatial"}}
    with Store.create(root / "d", {"model": "m", "t": [50], "activations": info}) as store:
        store.write("x.jpg", {"fine": torch.zeros(7, 2, 2)}, {"original_size": SIZE})
    assert main(["parts", "predict", str(root / "d"), "--classifier", str(root / "c.st"), "-o", str(root / "o")]) == 2
    assert "was trained on fine, which" in capsys.readouterr().err
    assert not (root / "o").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda root: [file.unlink() for file in root.glob("labels/more/*")], "no label map for any of the 4 images"),
        (lambda root: Image.new("RGB", (3, 3)).save(root / "labels/more/0.png"), "has mode RGB"),
        (lambda root: (root / "labels/more/0.png").write_bytes(b"no picture"), "cannot be read as a picture"),
        (lambda root: (root / "labels/more/0.npy").write_bytes(b""), "cannot be read as an array"),
        (lambda root: (root / "c.st").write_bytes(b"none"), "is no classifier that"),
        (lambda root: (root / "learn/manifest.json").unlink(), "is no feature store"),
    ],
)
def test_mistakes_are_one_sentence(root, change, message, capsys):
    change(root)
    assert train(root) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_from_photographs_to_labels(tmp_path, capsys):
    """The three commands of the help, on a tiny model; features may have more activations, in another order."""
    model = str(save_sd15(tmp_path / "model"))
    rng = np.random.default_rng(0)
    for number in range(2):
        picture = Image.fromarray(rng.integers(0, 255, (64, 96, 3), np.uint8))
        (tmp_path / "photos").mkdir(exist_ok=True)
        picture.save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "labels").mkdir()
    np.save(tmp_path / "labels" / "0.npy", rng.integers(0, 3, (64, 96)))
    ids = ["up-level1-repeat0-res-out", "up-level2-repeat1-vit-block0-cross-q", "mid-vit-out"]
    for name, chosen in (("learn", ids[:2]), ("test", ids[::-1])):
        wanted = [part for id in chosen for part in ("--activations", id)]
        command = ["extract", str(tmp_path / "photos"), "-o", str(tmp_path / name), "--model", model, *wanted]
        assert main(command) == 0
    assert main(["parts", "train", str(tmp_path / "learn"), "--masks", str(tmp_path / "labels"), "--steps", "2",
                 "-o", str(tmp_path / "c.safetensors")]) == 0  # fmt: skip
    ensemble, about = load(tmp_path / "c.safetensors")
    assert ensemble.classes == 3 and set(about["activations"]) == set(ids[:2])
    pictures = []
    for name in ("learn", "test"):
        assert main(["parts", "predict", str(tmp_path / name), "--classifier", str(tmp_path / "c.safetensors"),
                     "-o", str(tmp_path / f"{name}-out")]) == 0  # fmt: skip
        pictures.append(np.asarray(Image.open(tmp_path / f"{name}-out" / "1.png.labels.png")))
        assert Image.open(tmp_path / f"{name}-out" / "1.png.uncertainty.png").size == (96, 64)
    assert (pictures[0] == pictures[1]).all()
