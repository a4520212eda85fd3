"""Answers of the page equal those of the segmentor, and the model runs only when it must."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from diffusion_features import FeatureExtractor
from diffusion_features.embedded import CLASSES
from segmentors import Method, TrainingFreeSegmentor
from segmentors.demo.models import Loaded, Models
from segmentors.demo.recent import Recent
from segmentors.demo.scenes import overlap, scene, truth
from segmentors.demo.segmenting import Question, Runs, answer
from segmentors.training_free import PLAIN
from tests.released import seeded
from tests.tiny import save_sd15


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = save_sd15(tmp_path_factory.mktemp("models") / "small")
    return Models([str(folder)])("small")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray((seeded("picture", 40, 60, 3).sigmoid() * 255).to(torch.uint8).numpy())


@pytest.fixture(scope="module")
def direct(loaded: Loaded) -> FeatureExtractor:
    """The same model as a user loads it."""
    return FeatureExtractor.from_pretrained(loaded.fx.model_id)


def runs_of(loaded: Loaded, question: Question, runs: Runs) -> int:
    """How often the model ran to answer."""
    count = []
    handle = loaded.fx.denoiser.register_forward_pre_hook(lambda *_: count.append(1))
    try:
        found = answer(loaded, question, runs)
    finally:
        handle.remove()
    assert found.remembered == (not count)
    return len(count)


METHODS = [
    Method(threshold=0.05),
    Method(heads="average", layers="mse", rescale="max", background="max", threshold=0.3),
    Method(heads="l2", layers="equal", rescale="none", background="average", threshold=0.1),
    Method(edges="pamr", threshold=0.05),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "asked",
    [
        dict(classes=("cat", "dog")),
        dict(classes=("cat", "red dog"), background=("grass",), caption="a photo of the red dog on grass"),
        dict(classes=("cat",), background=(), seed=3),
    ],
)
def test_an_answer_is_the_segmentors(
    loaded: Loaded, direct: FeatureExtractor, picture: Image.Image, method: Method, asked: dict
) -> None:
    found = answer(loaded, Question(picture, **asked, method=method), Recent(4))
    call = (asked["classes"], asked.get("background"))
    options = dict(caption=asked.get("caption"), seed=asked.get("seed", 0))
    expected = TrainingFreeSegmentor(direct, method=method)(picture, *call, **options)
    same = dict(background=method.background, threshold=method.threshold, edges=method.edges)
    before = TrainingFreeSegmentor(direct, method=replace(PLAIN, **same))(picture, *call, **options)
    assert torch.equal(found.labels, expected.labels) and torch.equal(found.scores, expected.scores)
    assert torch.equal(found.plain, before.labels)
    assert found.classes == expected.classes and found.prompts == expected.prompts
    assert found.layer_weights == expected.layer_weights
    assert {*found.head_weights} == {*expected.head_weights} and bool(found.head_weights) == (method.heads != "average")
    for id, maps in expected.head_weights.items():
        assert found.head_weights[id] == pytest.approx([one.double().mean().item() for one in maps], abs=1e-6)


@pytest.mark.parametrize(("t", "k"), [(300, None), (None, 0), (700, 5)])
def test_timestep_and_refinements(
    loaded: Loaded, direct: FeatureExtractor, picture: Image.Image, t: int | None, k: int | None
) -> None:
    found = answer(loaded, Question(picture, ("cat", "dog"), t=t, k=k), Recent(4))
    preset = loaded.segmentor.preset
    preset = replace(preset, t=preset.t if t is None else t, k=preset.k if k is None else k)
    method = Method(refine=preset.k > 0)
    expected = TrainingFreeSegmentor(direct, preset, method)(picture, ("cat", "dog"))
    assert torch.equal(found.scores, expected.scores)


def test_the_model_runs_only_when_it_must(loaded: Loaded, picture: Image.Image) -> None:
    runs: Runs = Recent(8)
    first = Question(picture, ("cat", "dog"), caption="a cat, a dog and grass")
    assert runs_of(loaded, first, runs) == 1
    for same in (
        first,
        replace(first, classes=("grass",)),
        replace(first, classes=("dog",), background=("cat", "grass")),
        replace(first, background=(), method=Method(threshold=0.4, rescale="max", background="max")),
        replace(first, k=0),
        replace(first, k=4),
        replace(first, method=Method(edges="pamr")),
        replace(first, picture=picture.copy()),
    ):
        assert runs_of(loaded, same, runs) == 0
    for other in (
        replace(first, classes=("photo",)),
        replace(first, seed=1),
        replace(first, t=5),
        replace(first, method=Method(heads="l2")),
        replace(first, picture=picture.rotate(180)),
        replace(first, caption="a cat, a dog, and grass"),
    ):
        assert runs_of(loaded, other, runs) == 1


def test_what_was_remembered_is_what_a_run_gives(loaded: Loaded, picture: Image.Image) -> None:
    runs: Runs = Recent(8)
    first = Question(picture, ("cat", "dog"), caption="a cat, a dog and grass")
    changed = replace(first, classes=("grass", "dog"), k=1, method=Method(threshold=0.2), background=())
    answer(loaded, first, runs)
    remembered, fresh = answer(loaded, changed, runs), answer(loaded, changed, Recent(1))
    assert remembered.remembered and not fresh.remembered
    assert torch.equal(remembered.scores, fresh.scores) and torch.equal(remembered.plain, fresh.plain)


def test_the_least_used_is_forgotten_first() -> None:
    made: list[str] = []

    def make(name: str) -> str:
        made.append(name)
        return name

    recent: Recent[str] = Recent(2)
    for name, known in [("a", False), ("b", False), ("a", True), ("c", False), ("a", True), ("b", False)]:
        assert recent(name, lambda name=name: make(name)) == (name, known)
    assert made == ["a", "b", "c", "b"]


def test_models_are_those_named_and_loaded_once(loaded: Loaded) -> None:
    folder = loaded.fx.model_id
    models = Models([folder, "embedded"])
    assert models.names == (loaded.name, "embedded") and "/" not in loaded.name
    assert models(loaded.name) is models(loaded.name)
    for other in (folder, "/etc", None, 3, [loaded.name]):
        with pytest.raises(ValueError, match="This page offers small, embedded, and no other model"):
            models(other)
    for names in ([], ["embedded", "embedded"], [folder, folder]):
        with pytest.raises(ValueError, match="each by another name"):
            Models(names)


def test_no_prompt_is_kept_by_the_model(loaded: Loaded, picture: Image.Image) -> None:
    answer(loaded, Question(picture, ("cat",), caption="a secret of a visitor"), Recent(1))
    assert not loaded.fx._prompts and not loaded.fx._recent


def test_truth_and_overlap_of_a_scene() -> None:
    drawn = scene("test", 5)
    true = truth(drawn)
    named = [[drawn.classes[label] for label in row] for row in true.tolist()]
    assert named == [[CLASSES[label] for label in row] for row in drawn.semantic.tolist()]
    assert overlap(true, true, len(drawn.classes)) == [1.0] * len(drawn.classes)
    predicted = torch.zeros_like(true)
    expected = [((true == 0).sum() / true.numel()).item(), *[0.0] * (len(drawn.classes) - 1)]
    assert overlap(predicted, true, len(drawn.classes)) == pytest.approx(expected)
    for split, number in (("test", -1), ("nowhere", 0), ("test", 10**9)):
        with pytest.raises(ValueError, match="numbered from 0"):
            scene(split, number)
