"""Figures against loops over pixels, protocols on a segmentor with known answers, data sets on tiny folders."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion_features import FeatureExtractor
from diffusion_features.embedded import CLASSES, OBJECTS
from diffusion_features.embedded.dataset import scenes
from segmentors import Method, Segmentation, TrainingFreeSegmentor
from segmentors.evaluation import Dataset, Sample, count, evaluate, open_dataset, scores
from tests.tiny import sd15_pipe

HEIGHT, WIDTH, K, VOID = 21, 30, 4, 255


def labels(seed: int, ignore: bool = False) -> Tensor:
    """Blocks of 3x5 pixels with one label each."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, K - 1, (HEIGHT // 3, WIDTH // 5), generator=generator)
    large = small.repeat_interleave(3, 0).repeat_interleave(5, 1)
    if ignore:
        large[:3, :10] = VOID
    return large


def naive_boundary(mask: np.ndarray, d: int) -> set[tuple[int, int]]:
    """Pixels of a mask with a pixel outside of it, or outside of the image, at most d away in either axis."""
    height, width = mask.shape
    found = set()
    for y, x in np.argwhere(mask):
        around = [(y + dy, x + dx) for dy in range(-d, d + 1) for dx in range(-d, d + 1)]
        if any(not (0 <= v < height and 0 <= u < width) or not mask[v, u] for v, u in around):
            found.add((int(y), int(x)))
    return found


@pytest.mark.parametrize("ignore", [False, True])
def test_counts_are_those_of_loops(ignore: bool) -> None:
    predicted, truth = labels(0), labels(1, ignore)
    found = count(predicted, truth, K, VOID if ignore else None)
    counted = truth.numpy() != VOID
    d = max(1, round(0.02 * math.hypot(HEIGHT, WIDTH)))
    for k in range(K):
        p, t = (predicted.numpy() == k) & counted, (truth.numpy() == k) & counted
        assert found[:3, k].tolist() == [(p & t).sum(), t.sum(), p.sum()]
        band_p, band_t = naive_boundary(p, d), naive_boundary(t, d)
        assert found[3:, k].tolist() == [len(band_p & band_t), len(band_p | band_t)]
    assert found[:, K - 1].tolist() == [0] * 5  # never occurs


def test_the_boundary_widens_with_the_image() -> None:
    truth = torch.zeros(300, 400, dtype=torch.int64)  # d = 2% of 500 = 10
    truth[:, 200:] = 1
    band = count(truth, truth, 2)[4]
    inner = (300 - 20) * (200 - 20)
    assert band.tolist() == [300 * 200 - inner] * 2


def test_figures_by_hand() -> None:
    truth = torch.tensor([[0, 0, 1, 1]])
    one, other = count(torch.tensor([[0, 1, 1, 1]]), truth, 3), count(truth, truth, 3)
    found = scores(torch.stack([one, other]))
    assert found["iou"][:2] == pytest.approx([3 / 4, 4 / 5]) and math.isnan(found["iou"][2])
    assert found["miou"] == pytest.approx((3 / 4 + 4 / 5) / 2) and found["accuracy"] == pytest.approx(7 / 8)
    assert scores(torch.stack([one, other]), absent_is_zero=True)["miou"] == pytest.approx((3 / 4 + 4 / 5) / 3)
    # drawn with replacement, all images are the first with a chance of 1/4, and all the second with the same
    worst = (1 / 2 + 2 / 3) / 2
    assert found["miou_interval"] == pytest.approx([worst, 1.0])


def test_the_interval_covers_what_it_should() -> None:
    """Of the share of one class in images that are right or wrong as a whole, known to be a half."""
    inside = 0
    for trial in range(60):
        generator = torch.Generator().manual_seed(trial)
        right = torch.rand(60, generator=generator) < 0.5
        truth = torch.zeros(1, 2, dtype=torch.int64)
        counts = torch.stack([count(truth if r else truth + 1, truth, 2) for r in right])
        low, high = scores(counts[:, :, :1])["miou_interval"]
        inside += low <= 0.5 <= high
    assert 52 <= inside <= 60  # 95% of 60 is 57, with a standard deviation of 1.7


def test_labels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\) were predicted for a truth of \(2, 3\)"):
        count(torch.zeros(2, 2), torch.zeros(2, 3), 2)
    with pytest.raises(ValueError, match="beyond its 2 classes"):
        count(torch.zeros(2, 2), torch.full((2, 2), 2), 2)
    with pytest.raises(ValueError, match="labels beyond the 2 classes were predicted"):
        count(torch.full((2, 2), 2), torch.zeros(2, 2), 2)


# ---- protocols ------------------------------------------------------------------------------------------------------


class Oracle(TrainingFreeSegmentor):
    """Answers from a table: each class it is asked for has its score in the columns of the image that are its own."""

    asked: list[tuple[list[str], Any]] = []  # noqa: RUF012
    columns = ("sky", "cat", "cat", "void", "dog", "sky")  # the truth
    behind = (0.9, 0.35, 0.0, 0.0, 0.0, 0.9)  # how much background each column looks like
    match = (0.0, 0.6, 0.6, 0.2, 0.6, 0.0)

    def __call__(self, image: Any, classes: Any, background: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        self.asked.append((list(classes), background))
        maps = torch.zeros(len(classes), 2, 6)
        for x, (name, score) in enumerate(zip(self.columns, self.match, strict=True)):
            if name in classes:
                maps[list(classes).index(name), :, x] = score
            elif name == "void":
                maps[0, :, x] = score
        names = tuple(classes)
        if background is not None:
            found = torch.tensor(self.behind).expand(2, 6)
            offset = 0.0 if self.method.background == "exact" else self.method.threshold
            maps, names = torch.cat([(found + offset).clamp(0, 1)[None], maps]), ("background", *names)
        return Segmentation(maps.argmax(0), maps, names, ("",), {}, {}, {})


@pytest.fixture(scope="module")
def fx() -> FeatureExtractor:
    return FeatureExtractor.from_pipe(sd15_pipe())


def columns(numbers: dict[str, int]) -> Dataset:
    truth = torch.tensor([[numbers[name] for name in Oracle.columns]] * 2)
    classes = tuple(name for name, number in numbers.items() if number != VOID)
    image = Image.new("RGB", (6, 2))
    return Dataset("columns", "val", classes, VOID, 1, lambda n: iter([Sample(image, truth)] * n))


def run(fx: FeatureExtractor, dataset: Dataset, protocol: str, **kwargs: Any) -> dict[str, Any]:
    Oracle.asked.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("segmentors.evaluation.evaluate"), "TrainingFreeSegmentor", Oracle)
        return evaluate(Oracle(fx, method=kwargs.pop("method", None)), dataset, protocol, **kwargs)


PLAIN = {"sky": 0, "cat": 1, "dog": 2, "bird": 3, "void": VOID}


def test_full_vocabulary_asks_for_everything_and_leaves_void_out(fx: FeatureExtractor) -> None:
    found = run(fx, columns(PLAIN), "full-vocabulary")
    assert Oracle.asked == [(["sky", "cat", "dog", "bird"], None)]
    assert found["protocol"] == "full-vocabulary" and "every class" in found["about"]
    assert found["per_class"] == {"sky": 1.0, "cat": 1.0, "dog": 1.0, "bird": None}
    assert found["miou"] == 1.0 and found["images"] == 1 and found["threshold"] is None and "swept" not in found


def test_image_classes_asks_for_what_is_there(fx: FeatureExtractor) -> None:
    found = run(fx, columns(PLAIN), "image-classes")
    assert Oracle.asked == [(["sky", "cat", "dog"], None)]
    assert found["miou"] == 1.0


def with_background() -> Dataset:
    made = columns({"sky": 0, "cat": 1, "dog": 2, "bird": 3, "void": VOID})
    return Dataset(made.name, made.split, ("background", *made.classes[1:]), VOID, 1, made.samples)


def test_as_released_sweeps_the_threshold_and_counts_void_and_absent_classes(fx: FeatureExtractor) -> None:
    found = run(fx, with_background(), "as-released")
    assert Oracle.asked == [(["cat", "dog"], [])]
    # the void column is background in truth, and scores 0.2 as a cat: background wins from a threshold of 0.2 on;
    # the second column stops being a cat once 0.35 + threshold reaches 0.6
    assert found["threshold"] == 0.2 and found["per_class"] == {"background": 1.0, "cat": 1.0, "dog": 1.0, "bird": None}
    assert found["miou"] == pytest.approx(3 / 4)  # the bird counts as 0
    assert set(found["swept"]) == {-0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4}
    assert found["swept"][0.4] < found["swept"][0.2] > found["swept"][0.0]


def test_a_fixed_threshold_stays_what_it_is(fx: FeatureExtractor) -> None:
    found = run(fx, with_background(), "image-classes", method=Method(threshold=0.4), background=["sky"])
    assert Oracle.asked == [(["cat", "dog"], ["sky"])]
    assert found["threshold"] == 0.4 and found["background"] == ["sky"]
    assert found["per_class"]["cat"] == 0.5 and found["per_class"]["bird"] is None
    assert found["miou"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)


def test_as_released_makes_void_a_background_where_there_is_none(fx: FeatureExtractor) -> None:
    found = run(fx, columns(PLAIN), "as-released")
    assert [*found["per_class"]] == ["background", "sky", "cat", "dog", "bird"]


def test_what_cannot_be_evaluated(fx: FeatureExtractor) -> None:
    with pytest.raises(ValueError, match="no protocol 'full'; there are full-vocabulary, image-classes, as-released"):
        run(fx, columns(PLAIN), "full")
    with pytest.raises(ValueError, match="0 images"):
        run(fx, columns(PLAIN), "image-classes", limit=0)
    with pytest.raises(ValueError, match="no background class"):
        run(fx, columns(PLAIN), "image-classes", background=["sky"])


def test_an_image_without_any_class_is_background(fx: FeatureExtractor) -> None:
    image, truth = Image.new("RGB", (6, 2)), torch.zeros(2, 6, dtype=torch.int64)
    dataset = Dataset("empty", "val", ("background", "cat"), None, 1, lambda n: iter([Sample(image, truth)]))
    found = run(fx, dataset, "image-classes", background=["sky"])
    assert Oracle.asked == [] and found["per_class"] == {"background": 1.0, "cat": None}


def test_a_background_that_nothing_says_is_refused_before_the_first_image(fx: FeatureExtractor) -> None:
    def samples(count: int) -> Iterator[Sample]:
        raise AssertionError("an image was read")

    dataset = Dataset("empty", "val", ("background", "cat"), None, 1, samples)
    for protocol in ("image-classes", "full-vocabulary"):
        with pytest.raises(ValueError, match="would never be found"):
            run(fx, dataset, protocol)


# ---- data sets ------------------------------------------------------------------------------------------------------


def test_embedded_sets() -> None:
    (scene,) = scenes("held-out", 1)
    whole, objects = open_dataset("embedded", "held-out"), open_dataset("embedded-objects", "held-out")
    assert open_dataset("embedded").split == "test" and not whole.has_background and objects.has_background
    (sample,), (reduced,) = whole.samples(1), objects.samples(1)
    assert np.array_equal(sample.truth.numpy(), scene.semantic) and whole.classes == CLASSES
    expected = [[OBJECTS.index(CLASSES[v]) + 1 if CLASSES[v] in OBJECTS else 0 for v in row] for row in scene.semantic]
    assert reduced.truth.tolist() == expected and objects.classes == ("background", *OBJECTS)


def test_unknown_sets_and_splits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no data set 'ade20'; did you mean 'ade20k'\?"):
        open_dataset("ade20")
    with pytest.raises(ValueError, match="no split 'val'; it has train, validation, test, held-out"):
        open_dataset("embedded", "val")
    with pytest.raises(ValueError, match="say in which folder it is"):
        open_dataset("voc")


def test_without_mmsegmentation_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError("No module named 'mmseg'")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"mmsegmentation, which is not installed.*diffusion-features\[mmseg\]"):
        open_dataset("voc", root=tmp_path)


TRUTH = np.array([[0, 1, 255], [2, 1, 255]], np.uint8)
LAYOUTS = {
    "voc": ("JPEGImages/a.jpg", "SegmentationClass/a.png", "ImageSets/Segmentation/val.txt"),
    "context": ("JPEGImages/a.jpg", "SegmentationClassContext/a.png", "ImageSets/SegmentationContext/val.txt"),
    "coco-stuff": ("images/val2017/a.jpg", "annotations/val2017/a_labelTrainIds.png", None),
    "coco-object": ("images/val2017/a.jpg", "annotations/val2017/a_labelTrainIds.png", None),
    "cityscapes": ("leftImg8bit/val/x/a_leftImg8bit.png", "gtFine/val/x/a_gtFine_labelTrainIds.png", None),
    "ade20k": ("images/validation/a.jpg", "annotations/validation/a.png", None),
}
SOME_CLASSES = {
    "voc": {0: "background", 11: "dining table", 16: "potted plant"},
    "context": {0: "background", 1: "aeroplane"},
    "coco-stuff": {0: "person", 9: "traffic light", 80: "banner"},
    "coco-object": {0: "background", 1: "person", 80: "toothbrush"},
    "cityscapes": {0: "road", 18: "bicycle"},
    "ade20k": {0: "wall", 149: "flag"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_public_sets_in_their_layout(name: str, tmp_path: Path) -> None:
    pytest.importorskip("mmseg")
    image, annotation, listed = LAYOUTS[name]
    for part in (image, annotation, *([listed] if listed else [])):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), (250, 10, 10)).save(tmp_path / image)
    Image.fromarray(TRUTH).save(tmp_path / annotation)
    if listed:
        (tmp_path / listed).write_text("a\n")
    dataset = open_dataset(name, root=tmp_path)
    (sample,) = dataset.samples(dataset.length)
    assert dataset.length == 1 and sample.image.size == (3, 2) and sample.image.getpixel((0, 0))[0] > 200  # type: ignore[index]
    expected = {
        "ade20k": [[255, 0, 255], [1, 0, 255]],  # 0 is void there, and labels count from 1
        "coco-object": [[1, 2, 255], [3, 2, 255]],  # things count from 1, behind the background
    }.get(name, TRUTH.tolist())
    assert sample.truth.tolist() == expected
    assert {i: dataset.classes[i] for i in SOME_CLASSES[name]} == SOME_CLASSES[name]
    assert len(set(dataset.classes)) == len(dataset.classes)
    with pytest.raises(FileNotFoundError, match=f"is not a folder of {name}"):
        open_dataset(name, "train", tmp_path / "nowhere")


def test_stuff_is_background_to_coco_object() -> None:
    from segmentors.evaluation.mmseg_datasets import _things

    assert _things(torch.tensor([0, 79, 80, 170, 255])).tolist() == [1, 80, 0, 0, 255]
