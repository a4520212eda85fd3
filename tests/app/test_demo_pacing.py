"""How far a run is, is told to the run that asked, and to no other."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from diffusion_features.embedded import render
from segmentors.demo import pacing
from segmentors.demo.models import Models
from segmentors.demo.pacing import counted, told
from segmentors.demo.recent import Recent
from segmentors.demo.segmenting import Question, answer


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "PAUSE", 0.0)


@pytest.fixture
def chain() -> nn.Module:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    counted(model)
    return model


def test_each_layer_is_a_share(chain: nn.Module) -> None:
    shares: list[float] = []
    with told(chain, shares.append):
        chain(torch.ones(1, 2))
    assert shares == [0.25, 0.5, 0.75, 1.0]
    chain(torch.ones(1, 2))
    with pytest.raises(ZeroDivisionError), told(chain, shares.append):
        raise ZeroDivisionError
    chain(torch.ones(1, 2))
    assert len(shares) == 4, "told after its end"


def test_other_threads_are_not_counted(chain: nn.Module) -> None:
    shares: list[float] = []
    with told(chain, shares.append):
        thread = threading.Thread(target=chain, args=(torch.ones(1, 2),))
        thread.start()
        thread.join()
    assert shares == []


def test_a_segmentation_tells_how_far_it_is(tiny_model: str) -> None:
    models = Models([tiny_model])
    question = Question(render(20_000_000, 64).image, ("cat", "dog"))
    steps: list[tuple[float, str]] = []
    answer(models(models.names[0]), question, Recent(1), lambda done, what: steps.append((done, what)))
    shares = [done for done, what in steps if what == "Running the model (1 of 1)"]
    assert len(shares) > 20 and shares == sorted(shares) and steps[-1] == (0.7, "Making the labels")
    assert shares[0] < 0.1 and 0.6 < shares[-1] < 0.701, "the run seems to end far from its end"
