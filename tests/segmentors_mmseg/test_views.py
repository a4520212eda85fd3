"""Augmentation that comes back, so that its features can be kept."""

import random

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, TRANSFORMS

import segmentors.mmseg  # noqa: F401  registers what the tests build
from tests.segmentors_mmseg.tiny import config

AUGMENT = [
    dict(type="RandomResize", scale=(64, 64), ratio_range=(1.0, 2.0)),
    dict(type="RandomCrop", crop_size=(64, 64)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
]


@pytest.fixture(autouse=True)
def _transforms_of_mmseg():
    """A Runner does this; mmcv has transforms of the same names."""
    init_default_scope("mmseg")


def fixed(**options):
    return TRANSFORMS.build(dict(type="FixedViews", transforms=AUGMENT, **options))


def image(name="a.png", seed=0):
    drawn = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return dict(img=drawn, gt_seg_map=drawn[..., 0], img_path=name, img_shape=(64, 64), seg_fields=["gt_seg_map"])


def distinct(step, count, **which):
    found = [step(image(**which)) for _ in range(count)]
    return {one["img"].tobytes() for one in found}, {one["gt_seg_map"].tobytes() for one in found}


def test_there_are_k_views_of_each_image_and_they_come_back():
    np.random.seed(0)
    pictures, labels = distinct(fixed(views=3), 30)
    assert len(pictures) == len(labels) == 3
    np.random.seed(1)
    assert distinct(fixed(views=3), 30)[0] == pictures  # as in another process
    assert len(distinct(fixed(views=1), 5)[0]) == 1
    assert distinct(fixed(views=3, seed=1), 30)[0].isdisjoint(pictures)
    assert distinct(fixed(views=3), 30, name="b.png")[0].isdisjoint(pictures)  # the same pixels, another image


def test_the_global_generators_advance_by_the_choice_alone():
    step = fixed(views=8)
    np.random.seed(5)
    np.random.randint(8)
    expected = np.random.rand()
    np.random.seed(5), random.seed(5), torch.manual_seed(5)
    python, tensor = random.getstate(), torch.get_rng_state()
    step(image())
    assert np.random.rand() == expected
    assert random.getstate() == python and torch.equal(torch.get_rng_state(), tensor)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        fixed(views=0)


def test_a_cache_is_full_after_images_times_views(sd15, scenes, tmp_path):
    from mmengine.runner import Runner

    made = config(sd15, scenes, tmp_path / "run", cache=str(tmp_path / "features"))
    steps = made.train_dataloader.dataset.pipeline
    made.train_dataloader.dataset.update(
        count=2, pipeline=[*steps[:2], dict(type="FixedViews", views=2, transforms=AUGMENT[:3]), steps[-1]]
    )
    made.train_cfg.update(max_iters=16, val_interval=100)
    Runner.from_cfg(made).train()
    validated = 2  # at the end
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 2 * 2 + validated


def test_labels_turn_with_the_image(scenes):
    steps = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
    flip = dict(type="FixedViews", views=1, transforms=[dict(type="RandomFlip", prob=1.0)])
    options = dict(type="EmbeddedWorldDataset", data_root=str(scenes), size=64, split="test", count=1)
    plain, turned = (DATASETS.build(dict(**options, pipeline=one))[0] for one in (steps, [*steps, flip]))
    for name in ("img", "gt_seg_map"):
        assert np.array_equal(turned[name], plain[name][:, ::-1])
