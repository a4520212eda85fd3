"""Every shipped config builds, its head fits its backbone, and a loss comes out; tiny weights stand in for big ones."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import DATASETS, MODELS
from mmseg.structures import SegDataSample

from diffusion_features import FeatureExtractor
from tests.segmentors_mmseg.tiny import CONFIGS
from tests.suppression.models import control, save_lora
from tests.tiny import save_sd15

NAMES = sorted(path.name for path in CONFIGS.glob("*.py"))
PROMPT = "a cat"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Hub id → folder of random weights; made when first asked for."""
    from tests import tiny_dits, tiny_families

    root, made = tmp_path_factory.mktemp("stand_ins"), {}

    def tiny():
        return FeatureExtractor.from_pretrained(folder("stable-diffusion-v1-5/stable-diffusion-v1-5"))

    makers = {
        "lllyasviel/sd-controlnet-canny": lambda to: control(tiny()).save_pretrained(to),
        "a LoRA": lambda to: save_lora(tiny(), to),
        "stable-diffusion-v1-5/stable-diffusion-v1-5": save_sd15,
        "stabilityai/stable-diffusion-xl-base-1.0": tiny_families.save_sdxl,
        "playgroundai/playground-v2-1024px-aesthetic": tiny_families.save_playground_v2,
        "stabilityai/stable-diffusion-3.5-medium": lambda to: tiny_dits.build("sd35_medium").save_pretrained(to),
        "black-forest-labs/FLUX.1-dev": lambda to: tiny_dits.build("flux_dev").save_pretrained(to),
    }

    def folder(hub_id):
        if hub_id not in made:
            made[hub_id] = root / hub_id.rpartition("/")[2]
            makers[hub_id](made[hub_id])
        return str(made[hub_id])

    return folder


def small(config, stand_ins):
    """The config's model with tiny weights, and heads that are narrow inside."""
    model = config.model
    for head in filter(None, (model.decode_head, model.get("auxiliary_head"))):
        head.channels = 32
    backbones = model.backbone.get("backbones", [model.backbone])
    for backbone in backbones:
        if "/" in backbone.model:
            # Their tokenizers spell: the config's own prompt would have more tokens than fit at once.
            backbone.update(model=stand_ins(backbone.model), variant=None, size=64, prompt=PROMPT)
        if "dtype" in backbone:
            backbone.dtype = "float32"
        for technique in (one for variant in backbone.get("amalgamate", {}).get("variants", []) for one in variant):
            if technique.type == "ControlNet":
                technique.model = stand_ins(technique.model)
            if technique.type == "LoRA":
                technique.source = stand_ins("a LoRA")
    if "levels" in model.backbone:  # the stand-ins have few blocks
        model.backbone.levels = [["vit-block0-out"], ["vit-block1-out"], ["vit-block1-out"], ["vit-block1-out"]]
    return model


def heavy(name):
    """Those of Cityscapes differ from those of ADE20K in base and numbers alone."""
    return pytest.param(name, marks=pytest.mark.slow) if name.startswith("cityscapes") else name


@pytest.mark.parametrize("name", [heavy(name) for name in NAMES if "training_free" not in name])
def test_a_shipped_config_builds_and_gives_a_loss(name, stand_ins, tmp_path):
    config = Config.fromfile(CONFIGS / name)
    init_default_scope("mmseg")
    small(config, stand_ins)
    if config.model.backbone.get("cache"):
        config.model.backbone.cache = str(tmp_path)
    if "_released" in name:
        fit_raw_channels(config)
    model = MODELS.build(config.model)
    classes = len(DATASETS.get(config.train_dataloader.dataset.type).METAINFO["classes"])
    assert model.decode_head.num_classes == classes
    losses = model.loss(torch.zeros(2, 3, 64, 64), [sample(classes) for _ in range(2)])
    assert all(torch.isfinite(value).all() for key, value in losses.items() if "loss" in key)


def fit_raw_channels(config):
    """The stand-ins have other channels; what must be right in the config itself is that there is one a level."""
    backbone = MODELS.build(config.model.backbone)
    for head in (config.model.decode_head, config.model.auxiliary_head):
        places = [head.in_index] if isinstance(head.in_index, int) else head.in_index
        given = [head.in_channels] if isinstance(head.in_channels, int) else head.in_channels
        assert len(places) == len(given) and all(0 <= place < len(backbone.channels) for place in places)
        right = [backbone.channels[place] for place in places]
        head.in_channels = right[0] if isinstance(head.in_index, int) else right


#: Channels of the activations at full size, coarse to fine (arXiv 2410.03558, and its released configurations).
RELEASED = {
    "sd15_practical": [2560, 640, 320],
    "sd15_legacy": [1280, 1280, 960],
    "sdxl_practical": [2560, 1280],
    "sdxl_legacy": [1280, 960],
}


@pytest.mark.parametrize("data", ["ade20k", "cityscapes"])
@pytest.mark.parametrize("setting", RELEASED)
def test_released_configs_have_the_papers_channels_and_schedule(data, setting):
    config = Config.fromfile(CONFIGS / f"{data}_{setting}_upernet_released.py")
    assert list(config.model.decode_head.in_channels) == RELEASED[setting]
    assert config.model.data_preprocessor.seg_pad_val == 1
    assert config.param_scheduler[0].eta_min == 1e-4
    corrected = Config.fromfile(CONFIGS / f"{data}_{setting}_upernet.py")
    assert list(corrected.model.decode_head.in_index) == sorted(config.model.decode_head.in_index)
    assert corrected.model.data_preprocessor.seg_pad_val == 255
    assert corrected.param_scheduler[0].eta_min == 0


@pytest.mark.parametrize("name", [name for name in NAMES if "training_free" in name])
def test_a_training_free_config_builds_and_labels(name, stand_ins):
    config = Config.fromfile(CONFIGS / name)
    init_default_scope("mmseg")
    if "/" in config.model.model:
        config.model.model = stand_ins(config.model.model)
    config.model.size = 64
    model = MODELS.build(config.model)
    dataset = DATASETS.get(config.test_dataloader.dataset.type)
    assert model.num_classes == len(dataset.METAINFO["classes"])
    if model.num_classes > 30:
        pytest.skip("a stand-in that spells each of many names needs too many passes")
    model.eval()
    (result,) = model.predict(torch.zeros(1, 3, 64, 96), [sample(2, (64, 96))])
    assert result.pred_sem_seg.data.shape == (1, 64, 96)


def sample(classes, shape=(64, 64)):
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, classes, shape))
    made = SegDataSample(gt_sem_seg=PixelData(data=labels[None]))
    made.set_metainfo(dict(prompt=PROMPT, img_shape=shape, ori_shape=shape, img_path="a.png"))
    return made
