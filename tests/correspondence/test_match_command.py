"""``diffusion-features match`` and its picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from diffusion_features.cli import main
from diffusion_features.correspondence.picture import GAP, draw_matches
from tests.tiny import save_sd15

IDS = ["--activations", "up-level2-repeat1-res-out", "--activations", "up-level3-repeat0-vit-block0-out"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("match")
    save_sd15(root / "model")
    noise = np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8)
    image = Image.fromarray(noise).resize((96, 64), Image.Resampling.BICUBIC)
    image.save(root / "a.png")
    image.resize((192, 128)).save(root / "b.png")  # the same, twice as large
    return root


def command(folder, *arguments):
    return main(["match", str(folder / "a.png"), str(folder / "b.png"), "-o", str(folder / "out" / "m.png"),
                 "--model", str(folder / "model"), *IDS, *arguments])  # fmt: skip


def test_given_points_are_found_in_the_pixels_of_the_files(folder, capsys):
    assert command(folder, "--point", "40.5,20.5", "--point", "70,44", "--size", "64x96", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [match["source"] for match in found] == [[40.5, 20.5], [70.0, 44.0]]
    for match in found:
        assert np.abs(np.array(match["target"]) / 2 - match["source"]).max() < 2
        assert match["similarity"] > 0.9
    picture = Image.open(folder / "out" / "m.png")
    assert picture.size == (576 + GAP + 576, 384)
    assert not [*(folder / "out").glob("*.part")]


def test_of_a_list_of_prompts_the_first_is_that_of_the_source(folder, tmp_path, capsys):
    """Here the source, ``b.png``, comes second in the order of names."""
    (tmp_path / "two.txt").write_text("a cat\na dog on grass\n")
    said = {str(folder / "b.png"): "a cat", str(folder / "a.png"): "a dog on grass"}
    (tmp_path / "named.json").write_text(json.dumps(said))
    found = []
    for file in ("two.txt", "named.json"):
        images = [str(folder / "b.png"), str(folder / "a.png"), "-o", str(tmp_path / "m.png")]
        more = ["--prompt-file", str(tmp_path / file), "--count", "5", "--size", "64x96", "--json"]
        assert main(["match", *images, "--model", str(folder / "model"), *IDS, *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]


def test_without_points_a_grid_is_matched_and_checked(folder, capsys):
    assert command(folder, "--count", "7", "--size", "64x96") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    scores = [float(line.split()[-1]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    for line in lines:
        x, y, _, u, v, _ = (float(part.replace("->", "nan")) for part in line.split())
        assert abs(u / 2 - x) < 6 and abs(v / 2 - y) < 6  # back within a step of the grid


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--point", "200,3"], "(200, 3) lies outside the image of 96 x 64 pixels"),
        (["--t", "1", "--t", "2"], "one --t, not 2"),
        (["--count", "0"], "at least 1"),
        (["--activations", "mid-vit-block0-cross-map"], "has no place in the image"),
    ],
)
def test_mistakes_are_one_sentence(folder, arguments, message, capsys):
    assert command(folder, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_point_must_be_two_numbers(folder, capsys):
    with pytest.raises(SystemExit):
        command(folder, "--point", "3")
    assert "write X,Y in pixels" in capsys.readouterr().err


def test_lines_join_the_points():
    a, b = Image.new("RGB", (50, 100)), Image.new("RGB", (200, 100))
    picture = np.asarray(draw_matches(a, b, [(25, 50)], [(150, 20)], height=100)).astype(int)
    assert picture.shape == (100, 50 + GAP + 200, 3)
    for x, y in ((25, 50), (50 + GAP + 150, 20), ((25 + 50 + GAP + 150) / 2, 35)):  # both ends and the middle
        near = picture[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3].reshape(-1, 3)
        assert (near.max(1) - near.min(1)).max() > 60  # a colour
    assert (picture[90, 5] == 0).all()
