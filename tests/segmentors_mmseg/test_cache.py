"""Features kept on disk: exact, found again, and never those of anything else."""

import pytest
import torch
from mmseg.registry import MODELS

from segmentors.mmseg.cache import FeatureCache


def backbone(model, **options):
    return MODELS.build(dict(type="DiffusionBackbone", model=str(model), **options))


def images(seed=0):
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def never(*_args, **_kwargs):
    raise AssertionError("the model ran")


def test_cached_features_are_the_models_bit_for_bit(sd15, tmp_path):
    plain, cached, x = backbone(sd15), backbone(sd15, cache=str(tmp_path)), images()
    alone = [plain(image[None]) for image in x]
    expected = [torch.cat(level) for level in zip(*alone, strict=True)]
    first = cached(x)
    cached.fx.forward = never
    again = cached(x.flip(0))
    for level in range(3):
        assert torch.equal(first[level], expected[level])
        assert torch.equal(again[level], expected[level].flip(0))
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("change", [
    dict(t=100), dict(seed=1), dict(prompt="a cat"), dict(size=128), dict(activations="legacy"),
    dict(dtype="bfloat16"), dict(cache_dtype="float16"),
])  # fmt: skip
def test_other_settings_are_other_features(sd15, tmp_path, change):
    backbone(sd15, cache=str(tmp_path))(images())
    change = dict(change)
    cache = dict(folder=str(tmp_path), dtype=change.pop("cache_dtype", "float32"))
    other = backbone(sd15, cache=cache, **change)(images())
    assert len(files(tmp_path)) == 4
    fresh = backbone(sd15, **change)(images()[:1])
    tolerance = 1e-2 if cache["dtype"] == "float16" else 0
    torch.testing.assert_close(other[0][:1], fresh[0], rtol=tolerance, atol=tolerance)


def test_other_weights_in_the_same_folder_are_other_features(sd15, tmp_path):
    from diffusion_features import FeatureExtractor
    from segmentors.mmseg.cache import describe

    fx = FeatureExtractor.from_pretrained(sd15)
    before = FeatureCache(tmp_path, describe(fx)).folder
    assert FeatureCache(tmp_path, describe(fx)).folder == before
    with torch.no_grad():
        fx.pipe.vae.encoder.conv_in.bias[0] += 1e-3
    assert FeatureCache(tmp_path, describe(fx)).folder != before


def test_a_changed_pixel_is_another_image(sd15, tmp_path):
    made, x = backbone(sd15, cache=str(tmp_path)), images()
    made(x)
    x[0, 0, 0, 0] += 1e-3
    made(x)
    assert len(files(tmp_path)) == 3


def test_a_damaged_file_is_made_again(sd15, tmp_path):
    made, x = backbone(sd15, cache=str(tmp_path)), images()
    before = made(x)
    for file in files(tmp_path):
        file.write_bytes(file.read_bytes()[:-10])
    assert all(torch.equal(a, b) for a, b in zip(made(x), before, strict=True))


def test_half_precision_states_what_it_cannot_hold(tmp_path):
    cache = FeatureCache(tmp_path, {}, "float16")
    with pytest.raises(FloatingPointError, match="wide has values beyond float16"):
        cache.get(torch.zeros(3, 2, 2), "", lambda: {"wide": torch.tensor([1e6])})
    assert not files(tmp_path)
    with pytest.raises(ValueError, match="float32 or float16, not 'int8'"):
        FeatureCache(tmp_path, {}, "int8")
