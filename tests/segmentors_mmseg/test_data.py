"""The drawn world as a dataset, and what a pipeline refuses."""

import json

import numpy as np
import pytest
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, TRANSFORMS
from PIL import Image

import segmentors.mmseg  # noqa: F401  registers what the tests build
from diffusion_features import embedded


@pytest.fixture(autouse=True)
def _transforms_of_mmseg():
    """A Runner does this; mmcv has a LoadAnnotations too."""
    init_default_scope("mmseg")


def dataset(scenes, **options):
    steps = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
    return DATASETS.build(
        dict(type="EmbeddedWorldDataset", data_root=str(scenes), size=64, pipeline=steps, **options)
    )  # fmt: skip


def test_images_labels_and_captions_are_those_of_the_world(scenes):
    made = dataset(scenes, split="test", count=2)
    assert len(made) == 2
    assert tuple(made.metainfo["classes"]) == tuple(embedded.CLASSES)
    for number in range(2):
        scene, found = embedded.render(embedded.TEST_SEED + number, 64), made[number]
        assert np.array_equal(found["img"][..., ::-1], np.asarray(scene.image))
        assert np.array_equal(found["gt_seg_map"], scene.semantic)
        assert found["prompt"] == scene.caption


def test_fewer_scenes_than_are_there_and_a_wrong_split(scenes):
    assert len(dataset(scenes, split="train", count=3)) == 3
    with pytest.raises(ValueError, match="there is no split 'val'; there are train, validation"):
        dataset(scenes, split="val", count=1)


def test_scenes_that_are_missing_are_drawn(tmp_path):
    made = dataset(tmp_path, split="validation", count=1)
    assert made[0]["img"].shape == (64, 64, 3)
    with pytest.raises(ValueError, match="holds scenes of 64x64, not 32x32"):
        DATASETS.build(dict(type="EmbeddedWorldDataset", data_root=str(tmp_path), split="validation", size=32))


@pytest.mark.parametrize(("ids", "message"), [([0, 3], r"\[3\]; allowed are 0 to 2"), ([1, 3], "reduce_zero_label")])
def test_a_mask_with_other_ids_is_refused_by_name(ids, message):
    check = TRANSFORMS.build(dict(type="CheckLabels", num_classes=3))
    good = dict(gt_seg_map=np.array([[0, 2, 255]], dtype=np.uint8))
    assert check(good) is good
    bad = dict(gt_seg_map=np.array([ids], dtype=np.uint8), seg_map_path="masks/a.png")
    with pytest.raises(ValueError, match=f"masks/a.png has the ids .*{message}"):
        check(bad)


def test_prompts_come_from_a_file(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"a.png": "a cat"}))
    load = TRANSFORMS.build(dict(type="LoadPrompt", file=str(file)))
    assert load(dict(img_path="somewhere/a.png"))["prompt"] == "a cat"
    with pytest.raises(ValueError, match=r"has no prompt for b\.png"):
        load(dict(img_path="b.png"))
    file.write_text("[1]")
    with pytest.raises(ValueError, match="must hold one JSON object"):
        TRANSFORMS.build(dict(type="LoadPrompt", file=str(file)))


def test_a_palette_png_is_read_as_ids(scenes):
    (file,) = list((scenes / "ann_dir" / "test").glob("000000.png"))
    assert Image.open(file).mode == "P"
    found = dataset(scenes, split="test", count=1)[0]["gt_seg_map"]
    assert found.shape == (64, 64) and found.max() < len(embedded.CLASSES)
