"""Techniques against content shift as entries of a config, and several sets of them made one."""

import pytest
import torch
from mmseg.registry import MODELS

from diffusion_features import FeatureExtractor
from diffusion_features.suppression import ControlNet, LoRA
from segmentors.mmseg.amalgamation import losses
from segmentors.mmseg.techniques import TechniqueSets
from tests.suppression.models import control, save_lora

IDS = ["up-level2-repeat1-vit-block0-cross-q", "up-level3-repeat0-vit-block0-self-k"]
DENOISE = dict(type="Denoise", by=20, steps=2)
GUIDED = [DENOISE, dict(type="CFG", scale=7.5)]


@pytest.fixture(scope="module")
def weights(sd15, tmp_path_factory):
    """Configurations of a random ControlNet and of a random LoRA of the tiny model."""
    folder = tmp_path_factory.mktemp("techniques")
    fx = FeatureExtractor.from_pretrained(sd15)
    control(fx).save_pretrained(folder / "control")
    return dict(type="ControlNet", model=str(folder / "control")), dict(type="LoRA", source=str(save_lora(fx, folder)))


def backbone(model, **options):
    torch.manual_seed(0)
    return MODELS.build(dict(type="DiffusionBackbone", model=str(model), activations=IDS, **options)).eval()


def images(seed=0):
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def direct(sd15):
    """Techniques → the extractor's own features, finest first."""
    fx = FeatureExtractor.from_pretrained(sd15, IDS)

    def features(suppress):
        found = fx(images(), "a cat", suppress=suppress)
        return [found[id] for id in reversed(IDS)]

    return features


def test_suppressed_features_are_the_extractors(sd15, weights, direct):
    canny, lora = weights
    found = backbone(sd15, prompt="a cat", suppress=[canny, lora])(images())
    expected = direct([ControlNet(canny["model"]), LoRA(lora["source"])])
    for one, other, alone in zip(found, expected, direct([]), strict=True):
        torch.testing.assert_close(one, other)
        assert not torch.allclose(one, alone, rtol=1e-2, atol=1e-2)


def test_variants_side_by_side_and_their_mean(sd15, weights, direct):
    canny, lora = weights
    each = [direct([DENOISE, *one]) for one in ([], [canny], [lora])]
    options = dict(prompt="a cat", suppress=[DENOISE])
    amalgamate = dict(variants=[[], [canny], [lora]], how="concatenated")
    wide = backbone(sd15, amalgamate=amalgamate, **options)
    mean = backbone(sd15, amalgamate=dict(amalgamate, how="averaged"), **options)
    for level, (one, other) in enumerate(zip(wide(images()), mean(images()), strict=True)):
        expected = [features[level] for features in each]
        torch.testing.assert_close(one, torch.cat(expected, dim=1))
        torch.testing.assert_close(other, sum(expected) / 3)
        assert wide.channels[level] == one.shape[1] == 3 * mean.channels[level]


def test_assigned_weights_are_learnt_with_the_loss_of_the_paper(sd15, direct):
    amalgamate = dict(variants=[[], [DENOISE]], assigners=2, sparsity=0.5, diversity=0.25)
    projection = dict(channels=4, norm=dict(type="GN", num_groups=2))
    made = backbone(sd15, prompt="a cat", amalgamate=amalgamate, projection=projection)
    assert losses(made) == {}
    tensors = made(images())
    (extra,) = losses(made).values()
    of_feature = []
    for level, id in enumerate(reversed(IDS)):
        weights = made.amalgamation.assigners[id].weights([direct([])[level], direct([DENOISE])[level]]).double()
        first, second = weights[:, 0], weights[:, 1]  # (image, variant, channel, 1, 1) of each assigner
        lengths = sum(w.pow(2).sum(1).sqrt().mean() for w in (first, second))
        of_feature.append(-0.5 * lengths - 0.25 * (first - second).pow(2).sum(1).sqrt().mean())
    torch.testing.assert_close(extra.double(), sum(of_feature) / 2)
    (extra + sum(tensor.square().sum() for tensor in tensors)).backward()
    learnt = {name: p for name, p in made.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.any() for p in learnt.values())
    assert {name.split(".")[0] for name in learnt} == {"amalgamation", "projections"}


def test_a_checkpoint_of_other_variants_is_refused(sd15):
    made = backbone(sd15, amalgamate=dict(variants=[[], [DENOISE]], how="averaged"))
    with pytest.raises(ValueError, match="amalgamate were"):
        backbone(sd15).load_state_dict(made.state_dict())
    backbone(sd15, suppress=[DENOISE]).load_state_dict(backbone(sd15).state_dict())  # of these only a warning


def test_kept_features_depend_on_the_techniques(sd15, weights, direct, tmp_path):
    canny, lora = weights
    several = dict(variants=[[DENOISE], [lora]], how="averaged")
    options = [{}, dict(suppress=[canny]), dict(suppress=[{**canny, "scale": 0.5}]), dict(amalgamate=several)]
    for one in options:
        made = backbone(sd15, prompt="a cat", cache=str(tmp_path), **one)
        first = made(images())
        made.fx.forward = None  # the model cannot run any more
        for found, expected in zip(made(images()), first, strict=True):
            assert torch.equal(found, expected)
    mean = [(a + b) / 2 for a, b in zip(direct([DENOISE]), direct([lora]), strict=True)]
    for found, expected in zip(first, mean, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(list(tmp_path.iterdir())) == len(options)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2 * len(options)


def test_weights_under_the_same_name_are_told_apart(sd15, tmp_path):
    fx = FeatureExtractor.from_pretrained(sd15)
    sets = TechniqueSets.of([dict(type="LoRA", source=str(save_lora(fx, tmp_path)))], [])
    before = sets.fingerprints()
    assert sets.fingerprints() == before
    save_lora(fx, tmp_path, seed=1)
    assert sets.fingerprints() != before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(suppress=dict(type="Denoise")), TypeError, "techniques of a config are a list"),
        (dict(suppress=[dict(type="Denoize")]), ValueError, "did you mean 'Denoise'"),
        (dict(amalgamate=dict(variants=[[DENOISE]])), ValueError, "there are 1. For one there is suppress"),
        (dict(amalgamate=dict(variants=[[], []], how="assined")), ValueError, "did you mean 'assigned'"),
        (dict(suppress=[dict(type="FineGrainedPrompt", text="sharp")], learn_prompt=True), ValueError, "does not go"),
        (dict(suppress=GUIDED, learn_prompt=True), ValueError, "does not go with CFG, which .* would do nothing"),
        (dict(amalgamate=dict(variants=[[], GUIDED]), learn_prompt=True), ValueError, "does not go with CFG"),
        (dict(suppress=[dict(type="ControlNet", model="a", condition=len)]), TypeError, "options of a config are"),
    ],
)
def test_what_does_not_fit_is_refused(sd15, options, error, message):
    with pytest.raises(error, match=message):
        backbone(sd15, **options)
