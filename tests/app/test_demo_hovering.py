"""What the browser draws from, against cosines written out."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from segmentors.demo.hovering import MOST, cell_similarities, grid_of, hover
from segmentors.demo.looking import grouped
from tests.released import seeded

ONE = {"fine": seeded("fine", 5, 4, 6), "coarse": seeded("coarse", 7, 2, 3)}
TWO = {"fine": seeded("other", 5, 6, 4), "coarse": seeded("another", 7, 3, 2)}


def naive(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cosines of the concatenated features, all enlarged to the grid of the fine one, in float64."""

    def cells(found: dict[str, torch.Tensor]) -> torch.Tensor:
        size = found["fine"].shape[-2:]
        large = [F.interpolate(x[None].double(), size, mode="bilinear")[0] for x in found.values()]
        return F.normalize(torch.cat(large).flatten(1).T, dim=1)

    return cells(source) @ cells(target).T


def test_similarities_are_cosines() -> None:
    assert grid_of(ONE) == (4, 6) and grid_of(TWO) == (6, 4)
    for target, there in ((ONE, (4, 6)), (TWO, (6, 4))):
        found = cell_similarities(ONE, target, (4, 6), there)
        assert torch.allclose(found.double(), naive(ONE, target), atol=1e-5)


def test_large_features_are_reduced() -> None:
    assert grid_of({"x": torch.zeros(1, 64, 128)}) == (MOST // 2, MOST)
    assert cell_similarities(
        {"x": seeded("large", 3, 64, 64)}, {"x": seeded("large", 3, 64, 64)}, (4, 4), (4, 4)
    ).shape == (16, 16)


def decoded(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def test_what_is_sent_can_be_read_back() -> None:
    pictures = Image.new("RGB", (60, 40), "red"), Image.new("RGB", (40, 60), "blue")
    sent = json.loads(hover(ONE, pictures[0], (TWO, pictures[1])))
    assert [one["grid"] for one in sent] == [[6, 4], [4, 6]] and [one["size"] for one in sent] == [[60, 40], [40, 60]]
    for one, target, picture in zip(sent, (ONE, TWO), pictures, strict=True):
        grey = decoded(one["similar"])
        assert grey.mode == "L" and grey.size == (24, 24)
        values = np.asarray(grey).astype(float) / 127.5 - 1
        assert np.abs(values - naive(ONE, target).numpy()).max() < 0.5 / 127.5 + 1e-4
        assert decoded(one["picture"]).getpixel((3, 3)) == picture.getpixel((3, 3))
    assert len(json.loads(hover(ONE, pictures[0]))) == 1
    larger = json.loads(hover(ONE, pictures[0], (TWO, pictures[1]), [(600, 400), (80, 120)]))
    assert [one["size"] for one in larger] == [[600, 400], [80, 120]]


def test_activations_are_grouped_by_their_place() -> None:
    ids = [
        "unet-in", "down-level0-repeat1-res-out", "down-level0-repeat1-vit-block0-self-q",
        "down-level0-downsampler-out", "mid-repeat1-res-out", "mid-vit-block0-self-k", "up-level2-upsampler-out",
        "vit-block3-out", "vit-block12-self-q",
    ]  # fmt: skip
    assert {place: len(found) for place, found in grouped(ids).items()} == {
        "unet": 1, "down-level0-repeat1": 2, "down-level0": 1, "mid": 2, "up-level2": 1, "vit-block3": 1,
        "vit-block12": 1,
    }  # fmt: skip
    assert [id for found in grouped(ids).values() for id in found] == ids
