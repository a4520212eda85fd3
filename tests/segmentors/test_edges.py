"""Labels brought to the edges of an image: PAMR and the CRF against loops in float64."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_features import FeatureExtractor
from segmentors import Method, TrainingFreeSegmentor
from segmentors.evaluation import evaluate, open_dataset
from segmentors.training_free.crf import dense_crf
from segmentors.training_free.edges import to_edges
from segmentors.training_free.pamr import pamr
from tests.released import seeded
from tests.tiny import sd15_pipe

HEIGHT, WIDTH = 6, 8


def naive_pamr(scores: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The equations of arXiv 2005.08104, pixel by pixel, with the 0.1 σ of its program."""
    height, width = image.shape[1:]

    def around(y: int, x: int, d: int) -> list[tuple[int, int]]:
        return [(min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1))
                for dy in (-d, 0, d) for dx in (-d, 0, d)]  # fmt: skip

    found = scores
    for _ in range(10):
        before, found = found, np.zeros_like(found)
        for y, x in np.ndindex(height, width):
            every = [place for d in (1, 2, 4, 8, 12, 24) for place in around(y, x, d)]
            sigma = np.stack([image[:, v, u] for v, u in every]).std(axis=0, ddof=1)
            others = [place for i, place in enumerate(every) if i % 9 != 4]
            near = np.array([np.mean(-np.abs(image[:, y, x] - image[:, v, u]) / (0.1 * sigma)) for v, u in others])
            alpha = np.exp(near) / np.exp(near).sum()
            found[:, y, x] = sum(a * before[:, v, u] for a, (v, u) in zip(alpha, others, strict=True))
    return found


def test_pamr_equals_its_equations() -> None:
    scores, image = seeded("s", 2, HEIGHT, WIDTH).double().sigmoid(), seeded("i", 3, HEIGHT, WIDTH).double()
    expected = naive_pamr(scores.numpy(), image.numpy())
    assert np.allclose(pamr(scores, image).numpy(), expected, atol=1e-9)
    assert np.allclose(pamr(scores.float(), image.float()).numpy(), expected, atol=1e-3)


def halves(height: int = 40, width: int = 48) -> tuple[Tensor, Tensor]:
    """An image that is dark and bright, with its border in the middle; and scores whose border is 5 pixels beside."""
    image = torch.full((3, height, width), -0.8)
    image[:, :, width // 2 :] = 0.8
    image += seeded("noise", 3, height, width) * 0.02
    ramp = torch.sigmoid((torch.arange(width) - (width // 2 + 5)) / 4).expand(height, width)
    return image, torch.stack([1 - ramp, ramp])


def border(scores: Tensor) -> Tensor:
    """The first column of class 1 in each row."""
    return scores.argmax(0).argmax(1)


def test_pamr_moves_a_border_to_the_edge() -> None:
    image, scores = halves()
    assert (border(scores) - 24).abs().min() >= 5
    assert (border(pamr(scores, image)) - 24).abs().max() <= 1
    constant = pamr(scores, torch.zeros_like(image))
    assert torch.isfinite(constant).all() and constant.min() >= 0 and constant.max() <= 1


def naive_crf(scores: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Mean field of arXiv 1210.5644 with all pairs of pixels; kernels normalised as the library has it."""
    classes, height, width = scores.shape
    places = np.stack(np.mgrid[:height, :width], -1).reshape(-1, 2).astype(float)
    colours = image.transpose(1, 2, 0).reshape(-1, 3)

    def kernel(*features: np.ndarray) -> np.ndarray:
        joined = np.concatenate(features, 1)
        k = np.exp(-0.5 * ((joined[:, None] - joined[None]) ** 2).sum(-1))
        root = 1 / np.sqrt(k.sum(1))
        return root[:, None] * k * root[None]

    together = 3 * kernel(places) + 4 * kernel(places / 67, colours / 3)
    unary = -np.log(scores / scores.sum(0)).reshape(classes, -1)

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(0))
        return e / e.sum(0)

    q = softmax(-unary)
    for _ in range(10):
        q = softmax(-unary + q @ together)
    return q.reshape(classes, height, width)


def test_the_crf_is_that_of_its_equations() -> None:
    pytest.importorskip("pydensecrf")
    image, scores = halves(24, 32)
    colours = ((image + 1) * 127.5).round().numpy().astype(float)
    found = dense_crf(scores, image)
    assert torch.allclose(found.sum(0), torch.ones(24, 32), atol=1e-4)
    # the library filters on a permutohedral lattice, which approximates the kernels
    assert np.abs(found.numpy() - naive_crf(scores.numpy(), colours)).mean() < 0.02
    assert (border(found) - 16).abs().max() == 0


def test_without_the_library_a_crf_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, fx: FeatureExtractor) -> None:
    def missing(name: str) -> Any:
        raise ImportError("No module named 'pydensecrf'")

    monkeypatch.setattr(importlib.import_module("segmentors.training_free.crf"), "import_module", missing)
    with pytest.raises(ImportError, match="needs pydensecrf, which is not installed: pip install pydensecrf2"):
        TrainingFreeSegmentor(fx, method=Method(edges="crf"))


def test_without_edges_nothing_changes() -> None:
    image, scores = halves()
    assert to_edges(scores, image, "none") is scores
    with pytest.raises(ValueError, match="edges are none, pamr, crf, not 'canny'"):
        to_edges(scores, image, "canny")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fx() -> FeatureExtractor:
    return FeatureExtractor.from_pipe(sd15_pipe())


def test_a_segmentor_finds_edges_at_the_size_it_works_at(fx: FeatureExtractor) -> None:
    image, _ = halves(64, 96)
    plain, edged = (
        TrainingFreeSegmentor(fx, method=Method(edges=how))(image, ["cat", "dog"], ["grass"], size=(32, 48))
        for how in ("none", "pamr")
    )
    assert edged.scores.shape == plain.scores.shape == (3, 64, 96)  # type: ignore[union-attr]
    small = torch.nn.functional.interpolate(image[None], (32, 48), mode="area")[0]
    fine = torch.nn.functional.interpolate(plain.scores[None], (32, 48), mode="area")[0]  # type: ignore[union-attr]
    expected = torch.nn.functional.interpolate(pamr(fine, small)[None], (64, 96), mode="bilinear")[0]
    # resizing back and forth leaves some difference, much smaller than what PAMR does
    done, left = (edged.scores - plain.scores).abs().mean(), (edged.scores - expected).abs().mean()  # type: ignore[union-attr]
    assert left < 0.25 * done


def test_a_threshold_is_not_swept_behind_a_crf(monkeypatch: pytest.MonkeyPatch, fx: FeatureExtractor) -> None:
    monkeypatch.setattr(importlib.import_module("segmentors.training_free.segmentor"), "densecrf", lambda: None)
    segmentor = TrainingFreeSegmentor(fx, method=Method(edges="crf"))
    with pytest.raises(ValueError, match="a CRF must know beforehand"):
        evaluate(segmentor, open_dataset("embedded-objects", "validation"), "as-released", limit=1)
