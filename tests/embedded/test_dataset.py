"""The world on disk, read back by plain Pillow and json."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffusion_features.cli import main
from diffusion_features.embedded import CLASSES, HELD_OUT_SEED, PARTS, TEST_SEED, render
from diffusion_features.embedded.dataset import PALETTE, SPLITS, scenes, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write(root, "test", 30, (96, 64))
    return root


def test_files_are_the_rendered_scenes(folder):
    index = json.loads((folder / "test.json").read_text())
    assert [tuple(pair) for pair in index["parts"]] == [*PARTS] and tuple(index["classes"]) == CLASSES
    assert [record["seed"] for record in index["images"]] == [*range(TEST_SEED, TEST_SEED + 30)]
    for record in index["images"][::7]:
        scene = render(record["seed"], (96, 64))
        for kind, truth in (
            ("img_dir", np.asarray(scene.image)), ("ann_dir", scene.semantic), ("parts_dir", scene.parts),
            ("instances_dir", scene.instances),
        ):  # fmt: skip
            assert (np.asarray(Image.open(folder / kind / "test" / record["file"])) == truth).all()
        assert (record["caption"], tuple(record["classes"])) == (scene.caption, scene.classes)


def test_labels_are_shown_in_the_colours_of_the_palette(folder):
    image = Image.open(folder / "ann_dir" / "test" / "000003.png")
    labels, colours = np.asarray(image), np.asarray(image.convert("RGB"))
    assert (colours == np.array(PALETTE, np.uint8)[labels]).all()
    assert len(set(PALETTE)) == len(CLASSES)


def test_pairs_are_of_one_class_and_lie_on_it(folder):
    pairs = json.loads((folder / "test_pairs.json").read_text())
    assert len(pairs) > 5
    for pair in pairs:
        assert len(pair["points"]) == len(pair["source_points"]) == len(pair["target_points"]) >= 3
        number = CLASSES.index(pair["class"])
        for side in ("source", "target"):
            labels = np.asarray(Image.open(folder / "ann_dir" / "test" / pair[side]))
            assert all(labels[int(y), int(x)] == number for x, y in pair[f"{side}_points"])
            left, top, right, bottom = pair[f"{side}_box"]
            assert all(left <= int(x) < right and top <= int(y) < bottom for x, y in pair[f"{side}_points"])


def test_written_again_the_bytes_are_the_same(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    write(folder, "test", 30, (96, 64))
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_another_size_does_not_overwrite(folder):
    with pytest.raises(ValueError, match="96x64, not 128x128"):
        write(folder, "test", 2)


def test_splits_share_no_seed():
    ranges = sorted(SPLITS.values())
    assert all(b - a >= 10_000_000 for a, b in itertools.pairwise(ranges))


@pytest.mark.parametrize(
    "split, count, message", [("val", 3, "validation, test"), ("test", 0, "1 to"), ("test", 10**8, "1 to")]
)
def test_wrong_splits_are_refused(split, count, message):
    with pytest.raises(ValueError, match=message):
        scenes(split, count)


def test_a_script_without_a_main_block_is_told_so(tmp_path):
    """Each process imports the script, and would start others without end."""
    script = tmp_path / "script.py"
    script.write_text("from diffusion_features.embedded.dataset import write\nwrite('world', 'test', 2)\n")
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert ended.returncode == 1 and "below `if __name__ == '__main__':`" in ended.stderr


def test_the_command_writes_them(tmp_path, capsys):
    assert main(["scenes", str(tmp_path), "--split", "held-out", "--count", "2", "--size", "32x48"]) == 0
    image = Image.open(tmp_path / "img_dir" / "held-out" / "000000.png")
    assert image.size == (48, 32)
    assert image.tobytes() == render(HELD_OUT_SEED, (48, 32)).image.tobytes()
    assert main(["scenes", str(tmp_path), "--split", "held-out", "--size", "64"]) == 2
    assert "another folder" in capsys.readouterr().err
