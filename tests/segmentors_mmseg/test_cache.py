"""Features kept on disk: exact, found again, and never those of anything else."""

import pytest
import torch
from mmseg.registry import MODELS

from segmentors.mmseg.cache import FeatureCache
from segmentors.mmseg.compression import Compression


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
    cache = FeatureCache(tmp_path, {}, Compression("float16"))
    with pytest.raises(FloatingPointError, match="wide has values beyond float16"):
        cache.get(torch.zeros(3, 2, 2), "", lambda: {"wide": torch.full((1, 1, 1, 1), 1e6)})
    assert not files(tmp_path)


# ---- what is lost ---------------------------------------------------------------------------------------------------


def feature(seed=0, channels=24, height=8, width=12):
    """Channels of very different scale."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-3, 2, channels)[None, :, None, None]
    return torch.randn(1, channels, height, width, generator=generator) * scales


def lost(compression, kept):
    return compression.unpack(compression.pack({"a": kept}))["a"]


def test_int8_is_off_by_at_most_half_a_step_of_each_channel():
    kept = feature()
    kept[:, 3] = 0
    step = kept.abs().amax((2, 3), keepdim=True) / 127
    assert ((lost(Compression("int8"), kept) - kept).abs() <= step / 2 * (1 + 1e-4)).all()
    assert sum(t.nbytes for t in Compression("int8").pack({"a": kept}).values()) == kept.numel() + 24 * 4


def test_components_are_the_nearest_matrix_of_that_rank():
    kept, k = feature(), 5
    singular = torch.linalg.svdvals(kept[0].flatten(1).double())
    error = (lost(Compression(components=k), kept) - kept).double().norm()
    torch.testing.assert_close(error, singular[k:].square().sum().sqrt(), rtol=1e-4, atol=0)  # Eckart and Young
    low_rank = torch.einsum("ck,kn->cn", kept[0, :, :5, 0], torch.randn(5, 96)).reshape(1, 24, 8, 12)
    torch.testing.assert_close(lost(Compression(components=k), low_rank), low_rank, rtol=1e-4, atol=1e-2)
    assert sum(t.nbytes for t in Compression("int8", k).pack({"a": kept}).values()) == k * (24 + 96) + 2 * k * 4
    assert torch.equal(lost(Compression(components=24), kept), kept)  # factors would be larger than the feature


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(dtype="int4"), "float32, float16, int8, not 'int4'"), (dict(components=0), "a whole number above 0")],
)
def test_other_compressions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Compression(**options)
