"""Matching against the naive formula: enlarge everything in float64, normalise, multiply."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from diffusion_features.correspondence import match, matching, nearest, returns, similarity, soft_argmax

SIZES = {"source_size": (36, 52), "target_size": (44, 28)}


def features(seed: int, *shapes: tuple[int, int, int], dtype=torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.randn(s, generator=generator, dtype=dtype) for i, s in enumerate(shapes)}


def enlarged(found: dict[str, torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    layers = [F.interpolate(f[None].double(), size, mode="bilinear")[0] for f in found.values()]
    return F.normalize(torch.cat(layers), dim=0)


def centres(size: tuple[int, int], count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    cells = [torch.randint(side, (count,), generator=generator) for side in (size[1], size[0])]
    return torch.stack(cells, dim=1).double() + 0.5


@pytest.mark.parametrize("tile", [1, 2000, 2**24])
def test_equals_the_enlarged_concatenation(tile, monkeypatch):
    monkeypatch.setattr(matching, "TILE", tile)
    source, target = features(0, (5, 9, 13), (7, 4, 6)), features(1, (5, 11, 7), (7, 5, 3))
    points = centres(SIZES["source_size"], 9)
    a, b = enlarged(source, SIZES["source_size"]), enlarged(target, SIZES["target_size"])
    columns, rows = points.long().unbind(1)
    truth = torch.einsum("cn,chw->nhw", a[:, rows, columns], b)

    assert torch.allclose(similarity(source, target, points, **SIZES), truth, atol=1e-12)
    found = match(source, target, points, **SIZES)
    for map, (x, y), score in zip(truth, found.points.tolist(), found.scores.tolist(), strict=True):
        assert (x % 1, y % 1) == (0.5, 0.5)
        assert math.isclose(map[int(y), int(x)], map.max(), abs_tol=1e-12)  # at the border several pixels are alike
        assert math.isclose(score, map.max(), abs_tol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_features_are_multiplied_in_float32(dtype):
    found = features(0, (64, 8, 8), dtype=torch.float32)
    found = {id: (tensor * 30).to(dtype) for id, tensor in found.items()}
    points = centres((32, 32), 5)
    maps = similarity(found, found, points, source_size=(32, 32), target_size=(32, 32))
    a = enlarged(found, (32, 32))
    columns, rows = points.long().unbind(1)
    assert maps.dtype == torch.float32
    assert torch.allclose(maps.double(), torch.einsum("cn,chw->nhw", a[:, rows, columns], a), atol=1e-5)


def test_a_mirrored_image_gives_mirrored_points():
    source = features(3, (32, 12, 16))
    target = {id: tensor.flip(-1) for id, tensor in source.items()}
    points = centres((40, 56), 20) + 4  # away from the border, where several pixels are alike
    found = match(source, target, points, source_size=(48, 64), target_size=(48, 64))
    assert torch.equal(found.points[:, 1], points[:, 1])
    assert torch.equal(found.points[:, 0], 64 - points[:, 0])
    assert torch.allclose(found.scores, torch.ones(20, dtype=torch.float64))


def test_a_cropped_image_gives_shifted_points():
    source = features(4, (32, 12, 16))
    target = {id: tensor[:, 2:10, 5:] for id, tensor in source.items()}  # 4 pixels a cell
    points = torch.tensor([[30.5, 14.5], [50.5, 30.5], [42.5, 20.5]], dtype=torch.float64)
    found = match(source, target, points, source_size=(48, 64), target_size=(32, 44))
    assert torch.equal(found.points, points - torch.tensor([20.0, 8.0]))
    assert torch.allclose(found.scores, torch.ones(3, dtype=torch.float64))


def test_nothing_of_the_size_of_the_enlarged_features_is_made(monkeypatch):
    """The largest tensor while 512 channels are matched at 256 x 256, against 128 MiB of enlarged features."""
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(matching, "TILE", 2**20)
    found = features(0, (512, 16, 16), dtype=torch.float32)
    with Watch():
        match(found, found, centres((256, 256), 40).float(), source_size=(256, 256), target_size=(256, 256))
    assert 256 * 256 <= largest <= 2**20 < 512 * 256 * 256


def gauss(x: float, y: float, size: tuple[int, int], sigma: float = 3.0) -> torch.Tensor:
    rows = torch.arange(size[0], dtype=torch.float64)[:, None] + 0.5
    columns = torch.arange(size[1], dtype=torch.float64) + 0.5
    return -((rows - y) ** 2 + (columns - x) ** 2) / (2 * sigma**2)


def test_soft_argmax_is_the_mean_of_a_softmax():
    """exp of a parabola is a Gaussian, whose mean is known to a fraction of a pixel."""
    maps = torch.stack([gauss(17.8, 11.1, (30, 40)), gauss(20.5, 9.5, (30, 40))])
    assert torch.allclose(
        soft_argmax(maps, temperature=1.0, window=40), torch.tensor([[17.8, 11.1], [20.5, 9.5]]).double(), atol=0.02
    )
    assert nearest(maps).tolist() == [[17.5, 11.5], [20.5, 9.5]]


def test_the_window_keeps_another_peak_out():
    map = torch.maximum(gauss(8.5, 15.5, (30, 60)), gauss(50.5, 15.5, (30, 60)) - 0.01)[None]
    assert torch.allclose(soft_argmax(map, 1.0, window=8), torch.tensor([[8.5, 15.5]]).double(), atol=0.05)
    assert soft_argmax(map, 1.0, window=60)[0, 0] == pytest.approx(29.3, abs=1)  # between the two


def test_soft_argmax_has_a_gradient():
    map = gauss(8.5, 15.5, (30, 60))[None].requires_grad_()
    soft_argmax(map, 1.0)[0, 0].backward()
    assert map.grad is not None and map.grad.abs().sum() > 0


@pytest.mark.parametrize("arguments", [(0.0, 3), (-1.0, 3), (1.0, -1)])
def test_soft_argmax_refuses(arguments):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        soft_argmax(torch.zeros(1, 4, 4), *arguments)


def test_the_mutual_check_keeps_what_comes_back():
    """Two source cells look like one target cell: only the one that it looks like most comes back."""
    one, two, three = torch.eye(3, dtype=torch.float64)
    nearly = F.normalize(one + 0.3 * three, dim=0)
    source = {"layer": torch.stack([one, nearly, two], dim=1)[:, None]}  # one row of three cells
    target = {"layer": torch.stack([one, two, two], dim=1)[:, None]}
    points = torch.tensor([[7.5, 7.5], [22.5, 7.5], [37.5, 7.5]])  # their centres
    sizes = {"source_size": (15, 45), "target_size": (15, 45)}
    found = match(source, target, points, **sizes)
    assert returns(source, target, points, found, **sizes, within=12).tolist() == [True, False, True]


def test_zero_features_give_zero_and_not_nan():
    blank = {"layer": torch.zeros(4, 3, 3)}
    maps = similarity(blank, blank, torch.tensor([[1.0, 1.0]]), source_size=(6, 6), target_size=(6, 6))
    assert torch.equal(maps, torch.zeros(1, 6, 6))


@pytest.mark.parametrize(
    "source, target, points, message",
    [
        ({}, {}, [[1.0, 1.0]], "no features"),
        ({"a": (2, 3, 3)}, {"b": (2, 3, 3)}, [[1.0, 1.0]], "only one of the two images has a, b"),
        ({"a": (2, 3, 3)}, {"a": (4, 3, 3)}, [[1.0, 1.0]], r"a has shapes \(2, 3, 3\) and \(4, 3, 3\)"),
        ({"a": (1, 2, 3, 3)}, {"a": (1, 2, 3, 3)}, [[1.0, 1.0]], "give those of one image"),
        ({"a": (2, 3, 3)}, {"a": (2, 3, 3)}, [[1.0, 7.0]], r"\(1, 7\) lies outside the image of 8 x 6"),
        ({"a": (2, 3, 3)}, {"a": (2, 3, 3)}, [1.0, 1.0], r"points must have shape \(N, 2\)"),
    ],
)
def test_wrong_input_is_named(source, target, points, message):
    make = lambda shapes: {id: torch.ones(shape) for id, shape in shapes.items()}  # noqa: E731
    with pytest.raises(ValueError, match=message):
        match(make(source), make(target), torch.tensor(points), source_size=(6, 8), target_size=(6, 8))
