"""Every activation of the papers' SD1.5 list equals what their released code captured on the same small model."""

import json
from pathlib import Path

import pytest
import torch

from diffusion_features import capture
from tests.released import digest, sd15

RELEASED = json.loads((Path(__file__).parent / "data" / "released_captures.json").read_text())["sd15"]["ids"]


@pytest.fixture(scope="module")
def features():
    unet, call = sd15()
    with torch.no_grad(), capture(unet, list(RELEASED)) as found:
        unet(**call)
    return found


def test_there_are_the_published_197():
    assert len(RELEASED) == 197


@pytest.mark.parametrize("id", RELEASED)
def test_equals_released(features, id):
    theirs, ours = RELEASED[id], digest(features[id])
    assert list(features[id].shape) == theirs["shape"]
    tolerance = 2e-3 if id.endswith("map") else 2e-4  # their maps were stored in float16
    assert ours["mean"] == pytest.approx(theirs["mean"], abs=1e-5)
    assert ours["std"] == pytest.approx(theirs["std"], rel=1e-3)
    assert ours["probe"] == pytest.approx(theirs["probe"], rel=tolerance, abs=2e-5)
