"""The shipped models draw the thing that a prompt names, in its colour, as a classifier of renderings sees it."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusion_features.embedded import OBJECTS, path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import classifier
import embedded as benchmark

pytestmark = pytest.mark.slow
COUNT = 24
#: The least shares of pictures with the right object and with the right colour. Who guesses has less than 0.15; who
#: knows the three colours of a prompt and not whose is which has a third of the colours.
LEAST = {"embedded": (0.5, 0.75), "embedded-dit": (0.5, 0.75), "embedded-dit-small": (0.2, 0.75)}


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
    objects, colours = LEAST[model]
    assert found["generated"]["object"] >= objects and found["generated"]["colour"] >= colours


def test_an_untrained_denoiser_draws_nothing_that_is_named(pipe, judge, model):
    name = "unet" if "unet" in pipe.components else "transformer"
    torch.manual_seed(0)
    blank = copy.copy(pipe)
    setattr(blank, name, type(getattr(pipe, name)).from_config(getattr(pipe, name).config).eval())
    assert benchmark.generation(blank, judge, COUNT)["generated"]["object"] < 3 / len(OBJECTS)
