"""Pictures of features whose principal components are known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_features.visualize import contact_sheet, map_image, pca_image


def low_rank(*strengths: float, channels: int = 12, side: int = 8) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A feature (C, side, side) that is a sum of orthogonal patterns of these strengths, and the patterns."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    patterns = [  # of +1 and -1, orthogonal to each other and to a constant
        (columns < side // 2).double() * 2 - 1,
        (rows < side // 2).double() * 2 - 1,
        (columns % 2 == 0).double() * 2 - 1,
    ]
    axes = torch.linalg.qr(torch.randn(channels, 3, generator=torch.Generator().manual_seed(3)).double()).Q
    axes = axes * torch.sign(axes.gather(0, axes.abs().argmax(0, keepdim=True)))
    feature = sum(s * axes[:, i, None, None] * patterns[i] for i, s in enumerate(strengths))
    assert isinstance(feature, torch.Tensor)
    return feature, patterns


def channel(image: Image.Image, index: int) -> torch.Tensor:
    return torch.from_numpy(np.array(image))[..., index].double() / 127.5 - 1


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_components_come_by_their_strength_and_with_their_sign(order: tuple[int, ...]) -> None:
    strengths = [0.0] * 3
    for rank, index in enumerate(order):
        strengths[index] = (9.0, 4.0, 1.0)[rank]
    feature, patterns = low_rank(*strengths)
    image = pca_image(feature)
    assert image.mode == "RGB" and image.size == (8, 8)
    for rank, index in enumerate(order):
        assert torch.allclose(channel(image, rank), patterns[index], atol=0.01)


def test_the_mean_and_the_caller_s_random_numbers_do_not_matter() -> None:
    feature = torch.randn(20, 6, 9, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first = pca_image(feature)
    state = torch.get_rng_state()
    shifted = pca_image(feature.double() + torch.arange(20)[:, None, None] * 100)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.abs(np.asarray(first, int) - np.asarray(shifted, int)).max() <= 1
    assert first.size == (9, 6)


def test_components_equal_an_exact_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(30, 10, 12, generator=generator).double() * torch.logspace(1, -1, 30)[:, None, None]
    cells = feature.reshape(30, -1).T
    scores = np.linalg.svd((cells - cells.mean(0)).numpy(), full_matrices=False)
    for index in range(3):
        exact = (scores.U[:, index] * scores.S[index]).reshape(10, 12)
        shown = channel(pca_image(feature), index).numpy()
        assert abs(np.corrcoef(exact.ravel(), shown.ravel())[0, 1]) > 0.97  # the percentiles clip 2 % of the cells


def test_what_does_not_vary_is_grey() -> None:
    assert set(pca_image(torch.ones(4, 3, 3)).get_flattened_data()) == {(128, 128, 128)}
    feature, _ = low_rank(2.0)
    image = pca_image(feature)
    assert channel(image, 0).abs().min() > 0.99
    assert channel(image, 1).abs().max() < 0.01 and channel(image, 2).abs().max() < 0.01
    assert pca_image(torch.randn(2, 4, 4)).size == (4, 4) and pca_image(torch.randn(5, 1, 1)).size == (1, 1)


def test_one_extreme_cell_does_not_darken_the_rest() -> None:
    feature, patterns = low_rank(1.0, side=32)
    spiked = feature.clone()
    spiked[:, 0, 0] *= 100
    assert torch.allclose(channel(pca_image(spiked), 0).flatten()[1:], patterns[0].flatten()[1:], atol=0.02)


def test_a_single_cell_stands_out() -> None:
    feature = torch.zeros(3, 20, 20)
    feature[0, 4, 5] = 1
    assert channel(pca_image(feature), 0).argmax() == 4 * 20 + 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_features(dtype: torch.dtype) -> None:
    feature, patterns = low_rank(9.0, 4.0, 1.0)
    assert torch.allclose(channel(pca_image(feature.to(dtype)), 0), patterns[0], atol=0.05)


def test_bad_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(C, h, w\), not \(2, 3\)"):
        pca_image(torch.ones(2, 3))
    with pytest.raises(ValueError, match="not finite"):
        pca_image(torch.full((3, 2, 2), float("inf")))


def test_cross_map_shows_each_key_where_it_is_attended() -> None:
    attention = torch.zeros(2, 6, 4)  # 2 heads, a grid of 2 x 3, 4 keys
    for key in range(4):
        attention[:, key, key] = torch.tensor([0.2, 0.4])
    image = map_image(attention, aspect=1.5, text=True)
    assert image.size == (2 * 3 + 1, 2 * 2 + 1)
    brightness = np.asarray(image.convert("L"), int)
    for key, (top, left) in enumerate(((0, 0), (0, 4), (3, 0), (3, 4))):
        assert brightness[top : top + 2, left : left + 3].argmax() == key


def test_self_map_gives_cells_that_attend_alike_one_colour() -> None:
    side = torch.arange(16) % 4 < 2  # left and right half of a 4 x 4 grid
    attention = (side[:, None] == side[None]).float().expand(3, 16, 16) / 8
    pixels = np.asarray(map_image(attention, aspect=1.0, text=False))
    assert (pixels[:, :2] == pixels[0, 0]).all() and (pixels[:, 2:] == pixels[0, 3]).all()
    assert (pixels[0, 0] != pixels[0, 3]).any()


def test_contact_sheet_holds_image_and_features_side_by_side() -> None:
    feature, patterns = low_rank(9.0, 4.0, 1.0)
    photo = Image.new("RGB", (64, 64), (10, 20, 30))
    features = {"mid-res-out": feature, "batched-out": feature[None].half(), "mid-cross-k": torch.randn(1, 77, 8)}
    sheet = np.asarray(contact_sheet(photo, features, tile=64, columns=3))
    at_photo = np.flatnonzero((sheet == (10, 20, 30)).all(-1).sum(1) >= 64)
    assert len(at_photo) == 64  # one row of three pictures, 64 pixels high
    row = sheet[at_photo[0] : at_photo[0] + 64]
    starts = np.flatnonzero((row[32] != 255).any(-1))[0] + np.arange(3) * (64 + 16)
    picture = row[:, starts[1] : starts[1] + 64]
    assert np.array_equal(picture[4::8, 4::8], np.asarray(pca_image(feature)))
    assert np.array_equal(picture, np.repeat(np.repeat(picture[4::8, 4::8], 8, 0), 8, 1))
    assert patterns[0].shape == picture[4::8, 4::8].shape[:2]


def test_contact_sheet_keeps_the_aspect_and_takes_maps() -> None:
    features = {
        "up-cross-map": torch.rand(1, 4, 32, 77),
        "up-self-map": torch.rand(4, 32, 32),
        "up-text-map": torch.rand(2, 9, 32),
        "up-out  t=50": torch.randn(5, 4, 8),
    }
    sheet = contact_sheet(Image.new("RGB", (128, 64)), features, tile=64, columns=1)
    assert sheet.width == 128 + 2 * 24
    assert contact_sheet(None, {"a-very-long-id-" * 9: torch.randn(5, 4, 8)}, tile=64).width == 128 + 2 * 24


def test_contact_sheet_refuses_what_it_cannot_show() -> None:
    with pytest.raises(ValueError, match="all text-side"):
        contact_sheet(Image.new("RGB", (8, 8)), {"mid-cross-k": torch.randn(77, 8)})
    with pytest.raises(ValueError, match=r"one image at one t"):
        contact_sheet(None, {"mid-out": torch.randn(2, 8, 4, 4)})
