"""Readers: a folder in the layout of SPair-71k, and scenes of the drawn world."""

from __future__ import annotations

import json

import pytest

from diffusion_features.correspondence import embedded_pairs, spair_pairs
from diffusion_features.embedded import TEST_SEED, render
from diffusion_features.embedded.dataset import write

RECORD = {
    "filename": "000001-a-b:cat", "src_imname": "a.jpg", "trg_imname": "b.jpg", "category": "cat",
    "src_imsize": [500, 334, 3], "trg_imsize": [320, 480, 3],
    "src_bndbox": [10, 20, 300, 250], "trg_bndbox": [0, 5, 200, 400],
    "kps_ids": ["3", "7"], "src_kps": [[12, 30], [200, 100]], "trg_kps": [[7, 9], [100, 300]], "mirror": 0,
}  # fmt: skip


def spair(tmp_path, *records, split="val"):
    folder = tmp_path / "PairAnnotation" / split
    folder.mkdir(parents=True)
    for number, record in enumerate(records):
        (folder / f"{number:06d}-a-b:cat.json").write_text(json.dumps(record))
    return tmp_path


def test_spair(tmp_path):
    root = spair(tmp_path, RECORD, {**RECORD, "category": "dog"})
    first, second = spair_pairs(root, "val")
    assert (first.category, second.category) == ("cat", "dog")
    assert (
        first.source == root / "JPEGImages" / "cat" / "a.jpg" and second.target == root / "JPEGImages" / "dog" / "b.jpg"
    )
    assert first.source_points == ((12.5, 30.5), (200.5, 100.5)) and first.target_points[1] == (100.5, 300.5)
    assert first.source_size == (334, 500) and first.target_size == (480, 320)  # height, width
    assert first.target_box == (0, 5, 200, 400)


def test_spair_refuses_what_it_is_not(tmp_path):
    with pytest.raises(ValueError, match="no split 'train', but trn, val, test; did you mean trn"):
        spair_pairs(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="must be the folder of SPair-71k"):
        spair_pairs(tmp_path, "test")
    root = spair(tmp_path, {name: value for name, value in RECORD.items() if name != "trg_kps"})
    with pytest.raises(ValueError, match=r"0{6}-a-b:cat\.json is no pair of SPair-71k: KeyError"):
        spair_pairs(root, "val")
    spair(tmp_path, {**RECORD, "trg_kps": [[7, 9]]}, split="trn")
    with pytest.raises(ValueError, match="2 keypoints in its source and 1 in its target"):
        spair_pairs(root, "trn")


def test_embedded_pairs_are_those_of_the_scenes(tmp_path):
    write(tmp_path, "test", 12, (96, 64))
    pairs = embedded_pairs(tmp_path, "test")
    assert pairs
    for pair in pairs:
        scene = render(TEST_SEED + int(pair.target.stem), (96, 64))
        (thing,) = [o for o in scene.objects if o.name == pair.category]
        assert pair.target_size == (64, 96) and pair.target_box == thing.box and pair.target.is_file()
        truth = [(p.x, p.y) for p in thing.keypoints.values()]
        assert all(min(abs(x - a) + abs(y - b) for a, b in truth) < 0.02 for x, y in pair.target_points)


def test_scenes_that_were_never_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"diffusion-features scenes .* --split validation"):
        embedded_pairs(tmp_path, "validation")
