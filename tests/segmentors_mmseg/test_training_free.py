"""The training-free segmentor as a model of mmsegmentation: what it is told, how it goes about it, what it refuses."""

import pytest
import torch
from mmengine.config import Config
from mmseg.registry import DATASETS, MODELS

import segmentors.mmseg  # noqa: F401  registers what the tests build
from diffusion_features import FeatureExtractor
from diffusion_features.embedded import render
from diffusion_features.images import as_tensor
from segmentors import Method
from segmentors import TrainingFreeSegmentor as Segmentor
from segmentors.mmseg.training_free import _names
from tests.segmentors_mmseg.tiny import CONFIGS

FUSED = {"diningtable", "playingfield", "pottedplant", "tvmonitor", "waterdrops"}
NAMES = ["house", "bird", "sea"]


def build(**options):
    return MODELS.build(dict(type="TrainingFreeSegmentor", model="embedded", **options)).eval()


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(path.name for path in CONFIGS.glob("*_training_free.py")))
def test_shipped_configs_tell_the_names_of_their_data_sets_in_words(file):
    config = Config.fromfile(CONFIGS / file)
    told = _names(config.model.classes, "background" in config.model)
    count = len(DATASETS.get(config.test_dataloader.dataset.type).METAINFO["classes"])
    assert len(told) + ("background" in config.model) == count
    assert len({name.lower() for name in told}) == len(told)
    assert all(name and name.replace(" ", "").isalpha() and not FUSED & set(name.split()) for name in told)
    assert not any({"other", "stuff"} & set(name.split()) for name in told)


def test_names_stay_in_the_order_of_their_ids():
    told, ids = _names("COCOStuffDataset", False), DATASETS.get("COCOStuffDataset").METAINFO["classes"]
    words = {"building-other": "building", "wall-brick": "wall brick", "playingfield": "playing field", "cat": "cat"}
    assert {id: told[ids.index(id)] for id in words} == words
    assert _names("PascalVOCDataset", True)[10:] == [
        "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor"
    ]  # fmt: skip


def test_names_of_every_registered_data_set_are_words_and_differ():
    for kind in DATASETS.module_dict.values():
        ids = getattr(kind, "METAINFO", {}).get("classes")
        if ids and "background" not in ids:
            told = _names(kind.__name__, False)
            assert len({name.lower() for name in told if name}) == len(ids), kind
            assert not any(sign in name for name in told for sign in "-_"), kind


@pytest.mark.parametrize(
    ("classes", "message"),
    [([], "at least one class"), (["cat", "Cat"], "twice"), (["very " * 100 + "cat", "dog"], "longer than")],
)
def test_names_that_cannot_be_told_are_refused_before_any_image(classes, message):
    with pytest.raises(ValueError, match=message):
        build(classes=classes)


def test_a_list_of_the_user_is_told_as_it_is():
    given = ["building-other", "pottedplant", "t-shirt"]
    assert _names(given, False) == given
    assert _names({"wall-brick": ["bricks"], "cat": ["cat"]}, False) == {"wall-brick": ["bricks"], "cat": ["cat"]}


# ---- method ---------------------------------------------------------------------------------------------------------


def test_the_method_is_that_of_the_config():
    image = as_tensor(render(seed=3, size=64).image)
    fields = dict(heads="average", rescale="none", refine=False, background="threshold", threshold=0.6)
    fx = FeatureExtractor.from_pretrained("embedded", "*", device="cpu")
    for given in (fields, None):
        found = build(classes=NAMES, background=["sky"], method=given).encode_decode(image)
        direct = Segmentor(fx, method=Method(**(given or {})))(image[0], NAMES, ["sky"])
        torch.testing.assert_close(found[0], direct.scores)
        assert bool((found[0, 0] == 0.6).all()) is (given is fields)  # the background is the threshold alone


def test_a_field_that_a_method_does_not_have_is_refused():
    with pytest.raises(
        ValueError, match=r"made of heads, .*threshold.*, not of 'treshold'; did you mean 'threshold'\?"
    ):
        build(classes=NAMES, method=dict(treshold=0.4))


# ---- one class ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [["house"], {"house": ["house", "hut"]}])
def test_a_single_class_without_background_is_refused(classes):
    with pytest.raises(ValueError, match=r"every pixel would be 'house', the only class: give background=\["):
        build(classes=classes)


def test_a_single_class_with_background_is_labelled():
    made = build(classes=["house"], background=["sky"])
    (result,) = made.predict(torch.zeros(1, 3, 64, 64))
    assert made.num_classes == len(result.seg_logits.data) == 2
