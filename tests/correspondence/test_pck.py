"""PCK on pairs whose answer is worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion_features.correspondence import Measured, Pair, measure, summary

POINTS = ((2.0, 2.0),) * 4
PAIR = Pair("cat", Path("a"), Path("b"), POINTS, POINTS, (0, 0, 10, 10), (5, 5, 45, 25), (50, 50), (80, 200))


def measured(errors: list[float], pair: Pair = PAIR) -> Measured:
    return Measured(pair, torch.tensor(errors))


def test_by_hand():
    """The image's larger side is 200 px, so 0.1, 0.05, 0.01 are 20, 10, 2 px; the box's is 40: 4, 2, 0.4 px."""
    one, two = measured([0.0, 3.0, 9.0, 19.0]), measured([2.0, 30.0])
    table = summary([one, two])
    assert table["img per point"] == pytest.approx({"0.1": 5 / 6, "0.05": 4 / 6, "0.01": 2 / 6})
    assert table["img per image"] == pytest.approx(
        {"0.1": (1 + 1 / 2) / 2, "0.05": (3 / 4 + 1 / 2) / 2, "0.01": (1 / 4 + 1 / 2) / 2}
    )
    assert table["bbox per point"] == pytest.approx({"0.1": 3 / 6, "0.05": 2 / 6, "0.01": 1 / 6})
    assert table["bbox per image"] == pytest.approx(
        {"0.1": (2 / 4 + 1 / 2) / 2, "0.05": (1 / 4 + 1 / 2) / 2, "0.01": 1 / 8}
    )


def test_the_limit_itself_is_correct():
    assert measured([20.0, 20.001]).correct(0.1, "img").tolist() == [True, False]


def test_a_crop_changes_what_pck_is_relative_to_img_and_not_to_bbox():
    crop = replace(PAIR, target_size=(40, 60))
    assert measured([5.0, 7.0]).correct(0.1, "img").all()
    assert measured([5.0, 7.0], crop).correct(0.1, "img").tolist() == [True, False]
    assert measured([3.0], crop).correct(0.1, "bbox").tolist() == measured([3.0]).correct(0.1, "bbox").tolist()


def test_measure_of_a_mirrored_and_cropped_copy():
    """The target is the source without its 16 left pixels, mirrored; one point is annotated 12 px off."""
    source = {"layer": torch.randn(24, 8, 8, generator=torch.Generator().manual_seed(0))}
    target = {"layer": source["layer"][:, :, 2:].flip(-1)}
    points = ((28.5, 12.5), (36.5, 28.5), (44.5, 52.5))
    truth = ((48 - 12.5, 12.5), (48 - 20.5, 28.5), (48 - 28.5, 52.5 - 12))
    pair = Pair("cat", Path("s"), Path("t"), points, truth, (0, 0, 64, 64), (0, 0, 48, 64), (64, 64), (64, 48))
    (found,) = measure([pair], lambda path: {"s": source, "t": target}[path.name])
    assert found.errors.tolist() == [0, 0, 12]
    assert summary([found], [0.1])["bbox per point"]["0.1"] == pytest.approx(2 / 3)


def test_wrong_names_and_nothing_are_refused():
    with pytest.raises(ValueError, match="'img' or 'bbox', not 'box'"):
        measured([1.0]).correct(0.1, "box")
    with pytest.raises(ValueError, match="no pairs"):
        summary([])
