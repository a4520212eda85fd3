"""The backbone by itself: levels, prompts, what learns, what is saved, and what is refused."""

import pytest
import torch
from mmengine.runner import load_checkpoint, save_checkpoint
from mmseg.registry import MODELS

from diffusion_features import FeatureExtractor
from segmentors.mmseg.metas import image_metas

NORM = dict(type="GN", num_groups=4)
PRACTICAL = [  # strides 8, 16 and 32 pixels, as arXiv 2410.03558 has them at 64, 32 and 16 cells of 512 pixels
    ["up-level3-repeat0-vit-block0-self-k"],
    ["up-level2-repeat1-vit-block0-cross-q"],
    ["up-level1-repeat1-vit-block0-cross-q", "up-level1-repeat2-res-out"],
]


def backbone(model, **options):
    torch.manual_seed(0)
    return MODELS.build(dict(type="DiffusionBackbone", model=str(model), **options))


def images(batch=2, height=64, width=96):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_levels_go_from_fine_to_coarse_and_are_the_extractors_features(sd15):
    made = backbone(sd15)
    assert [level.stride for level in made.feature_info] == [8, 16, 32]
    assert [list(level.activations) for level in made.feature_info] == PRACTICAL
    x = images()
    expected = FeatureExtractor.from_pretrained(sd15, "practical")(x)
    for level, tensor, ids in zip(made.feature_info, made(x), PRACTICAL, strict=True):
        assert torch.equal(tensor, torch.cat([expected[id] for id in ids], dim=1))
        assert tensor.shape[-2:] == (64 // level.stride, 96 // level.stride)
    assert made.channels == tuple(tensor.shape[1] for tensor in made(x))


def test_levels_may_be_given_and_picked(sd15):
    groups = [["up-level3-repeat0-vit-block0-self-k"], ["up-level3-repeat2-vit-out"], ["mid-vit-out"]]
    made = backbone(sd15, levels=groups, out_indices=[0, -1])
    assert [level.stride for level in made.feature_info] == [8, 64]
    assert [tensor.shape[-1] for tensor in made(images(width=128))] == [16, 2]


def test_attention_is_a_level(sd15):
    options = dict(activations=["up-level1-repeat1-vit-out", "attn"], attention=["down_cross", "up_cross"])
    made = backbone(sd15, prompt="a cat", **options)
    assert [level.activations for level in made.feature_info] == [("attn",), ("up-level1-repeat1-vit-out",)]
    fx = FeatureExtractor.from_pretrained(sd15, options["activations"], attention=options["attention"])
    attention = made(images())[0]
    assert torch.equal(attention, fx(images(), "a cat")["attn"]) and attention.shape[1] == made.channels[0]
    with pytest.raises(
        ValueError, match=rf"attn has \d+ channels, not {attention.shape[1]}: the prompt has more tokens"
    ):
        backbone(sd15, prompt="a cat " * 60, **options)(images())
    learns = backbone(sd15, prompt="a cat", learn_prompt=True, **options)
    learns(images())[0].square().sum().backward()
    assert learns.learnt_prompt.embedding.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(activations=["attn"], attention="up_self"), "how many channels attn has depends on the image"),
        (dict(levels=[["up-level3-repeat2-vit-out", "mid-vit-out"]]), "level 0 mixes strides.*has 64.*has 8;"),
        (dict(levels=[["mid-vit-out"], ["up-level3-repeat2-vit-out"]]), r"strides \[8, 64\], not \[64, 8\]"),
        (dict(activations=["mid-vit-block0-self-map"]), r"mid-vit-block0-self-map \(map\)"),
        (dict(out_indices=[3]), r"out_indices has 3, but the levels are 0 \(stride 8\)"),
        (dict(tune="partly"), "tune must be"),
        (dict(tune="full", cache="somewhere"), "cannot be cached"),
        (dict(tune="full", dtype="float16"), "float32, not float16"),
        (dict(learn_prompt=True, prompt_key="prompt"), "does not go with prompt_key"),
        (dict(dtype="int8"), 'dtype must be "float32"'),
    ],
)
def test_what_does_not_fit_is_refused(sd15, options, message):
    with pytest.raises(ValueError, match=message):
        backbone(sd15, **options)


def test_any_size_and_a_working_size(sd15):
    odd = backbone(sd15)(images(height=61, width=99))
    assert [tuple(t.shape[-2:]) for t in odd] == [(8, 12), (4, 6), (2, 3)]
    larger = backbone(sd15, size=128)(images())
    assert [tuple(t.shape[-2:]) for t in larger] == [(16, 16), (8, 8), (4, 4)]


def test_images_normalised_otherwise_are_refused(sd15):
    with pytest.raises(ValueError, match="normalised otherwise"):
        backbone(sd15)(images() * 2.5)


def test_the_projection_learns_everywhere(sd15):
    made = backbone(sd15, projection=dict(channels=8, norm=NORM))
    assert made.channels == (8, 8, 8)
    sum(tensor.square().sum() for tensor in made(images())).backward()
    parameters = dict(made.named_parameters())
    assert parameters and all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
    assert not any("fx" in name for name in parameters)


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_each_image_has_its_own_prompt(sd15):
    made, x = backbone(sd15, prompt_key="prompt"), images()
    with image_metas([{"prompt": "a cat"}, {"prompt": "a dog on grass"}]):
        both = made(x)
    expected = FeatureExtractor.from_pretrained(sd15, "practical")(x, ["a cat", "a dog on grass"])
    assert torch.equal(both[0], expected[PRACTICAL[0][0]])
    assert not torch.allclose(both[0], backbone(sd15, prompt="a cat")(x)[0])


def test_an_image_without_a_prompt_is_named(sd15):
    made, x = backbone(sd15, prompt_key="prompt"), images()
    with pytest.raises(ValueError, match="DiffusionEncoderDecoder"):
        made(x)
    with image_metas([{"prompt": "a cat"}, {"img_path": "b.png"}]):
        with pytest.raises(ValueError, match=r"b\.png has no 'prompt'"):
            made(x)


def test_a_learnt_prompt_begins_as_the_prompt_and_learns(sd15):
    made, x = backbone(sd15, prompt="a cat", learn_prompt=True), images()
    before = made(x)
    for tensor, expected in zip(before, backbone(sd15, prompt="a cat")(x), strict=True):
        torch.testing.assert_close(tensor, expected)
    assert [name for name, p in made.named_parameters() if p.requires_grad] == ["learnt_prompt.embedding"]
    sum(tensor.square().sum() for tensor in before).backward()
    torch.optim.SGD(made.parameters(), lr=1e-2).step()
    assert not torch.allclose(before[0], made(x)[0])


# ---- tuning and checkpoints -----------------------------------------------------------------------------------------


def test_lora_begins_at_nothing_and_trains_adapters_alone(sd15):
    made, x = backbone(sd15, tune=dict(type="lora", r=2, alpha=2)), images()
    before = made(x)
    for tensor, expected in zip(before, backbone(sd15)(x), strict=True):
        torch.testing.assert_close(tensor, expected)
    names = [name for name, p in made.named_parameters() if p.requires_grad]
    assert names and all(name.startswith("lora.") for name in names)
    sum(tensor.square().sum() for tensor in before).backward()
    torch.optim.SGD(made.parameters(), lr=1e-2).step()
    assert not torch.allclose(before[-1], made(x)[-1])


def test_a_fully_trainable_denoiser_gets_gradients(sd15):
    made = backbone(sd15, tune="full")
    sum(tensor.square().sum() for tensor in made(images())).backward()
    assert made.fx.denoiser.conv_in.weight.grad.abs().sum() > 0


MODES = {
    "frozen": dict(projection=dict(channels=8, norm=NORM)),
    "lora": dict(tune=dict(type="lora", r=2, alpha=2)),
    "prompt": dict(learn_prompt=True),
    "full": dict(tune="full"),
}


@pytest.mark.parametrize("mode", MODES)
def test_saved_by_mmengine_and_strictly_reloaded(sd15, tmp_path, mode):
    made, x = backbone(sd15, **MODES[mode]), images()
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    file = str(tmp_path / "backbone.pth")
    save_checkpoint({"state_dict": made.state_dict()}, file)
    twin = backbone(sd15, **MODES[mode])
    load_checkpoint(twin, file, strict=True)
    for tensor, expected in zip(twin(x), made(x), strict=True):
        assert torch.equal(tensor, expected)
    saved = sum(value.numel() for value in torch.load(file, weights_only=True)["state_dict"].values())
    denoiser = sum(p.numel() for p in made.fx.denoiser.parameters())
    assert saved >= denoiser if mode == "full" else saved < denoiser / 4


def test_a_checkpoint_of_another_model_is_refused(sd15, tmp_path):
    file, other = str(tmp_path / "backbone.pth"), tmp_path / "other"
    save_checkpoint({"state_dict": backbone(sd15).state_dict()}, file)
    fx = FeatureExtractor.from_pretrained(sd15)
    with torch.no_grad():
        for p in fx.denoiser.parameters():
            p.mul_(1.5)
    fx.pipe.unet.save_pretrained(other / "unet")
    for folder in sd15.iterdir():
        if folder.name != "unet":
            (other / folder.name).symlink_to(folder)
    with pytest.raises(ValueError, match="another backbone: the weights of the model are others"):
        load_checkpoint(backbone(other), file)
    with pytest.raises(ValueError, match="another backbone: activations were"):
        load_checkpoint(backbone(sd15, activations="legacy"), file)


def test_a_checkpoint_fits_the_same_model_in_half_precision(sd15, tmp_path):
    file = str(tmp_path / "backbone.pth")
    save_checkpoint({"state_dict": backbone(sd15).state_dict()}, file)
    load_checkpoint(backbone(sd15, dtype="bfloat16"), file, strict=True)


def test_several_models_are_joined_by_stride(sd15):
    parts = [
        dict(type="DiffusionBackbone", model=str(sd15)),
        dict(type="DiffusionBackbone", model=str(sd15), activations="up-level2-upsampler-out", t=200),
    ]
    made = MODELS.build(dict(type="DiffusionBackbones", backbones=parts))
    one, two = (MODELS.build(part)(images()) for part in parts)
    joined = made(images())
    assert [level.stride for level in made.feature_info] == [8, 16, 32]
    assert torch.equal(joined[0], torch.cat([one[0], two[0]], dim=1))
    assert torch.equal(joined[2], one[2])
    assert made.channels == tuple(tensor.shape[1] for tensor in joined)
