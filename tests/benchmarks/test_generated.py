"""The shipped models draw the thing that a prompt names, in its colour, as a classifier of renderings sees it."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusion_features.embedded import path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import classifier
import embedded as benchmark

pytestmark = pytest.mark.slow
COUNT = 24
#: The least shares of pictures with the right object, with the right colour, and with both. Who always says the same
#: has a fifth of the objects here; who knows the colours of a prompt and not whose is which, a third of the colours.
LEAST = {"embedded": (0.5, 0.75, 0.45), "embedded-dit": (0.5, 0.75, 0.45), "embedded-dit-small": (0.25, 0.75, 0.15)}


@pytest.fixture(scope="module")
def judge():
    return classifier.train()


@pytest.fixture(params=LEAST)
def model(request) -> str:
    return request.param


@pytest.fixture
def pipe(model):
    return DiffusionPipeline.from_pretrained(path(model), dtype=torch.float32)


def test_what_a_prompt_names_is_drawn_in_its_colour(pipe, judge, model):
    found = benchmark.generation(pipe, judge, COUNT)
    assert min(found["renderings"].values()) > 0.8, "the judge knows renderings"
    for what, least in zip(("object", "colour", "both"), LEAST[model], strict=True):
        assert found["generated"][what] >= least, found["generated"]


def test_an_untrained_denoiser_draws_nothing_that_is_named(pipe, judge, model):
    name = "unet" if "unet" in pipe.components else "transformer"
    torch.manual_seed(0)
    blank = copy.copy(pipe)
    setattr(blank, name, type(getattr(pipe, name)).from_config(getattr(pipe, name).config).eval())
    assert benchmark.generation(blank, judge, COUNT)["generated"]["both"] < 0.1
