"""The steps of the training-free segmentor against their equations written out in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from diffusion_features import AttentionCall, LazyMap
from segmentors.training_free import heads as heads_module
from segmentors.training_free import layers as layers_module
from segmentors.training_free import refinement as refinement_module
from segmentors.training_free.aggregation import Aggregator
from segmentors.training_free.background import background_score
from segmentors.training_free.heads import aggregate_heads, head_weights
from segmentors.training_free.layers import Affinity, layer_weight, resized_rows
from segmentors.training_free.refinement import refine
from segmentors.training_free.rescaling import entity_maps, normalised, stretched
from tests.released import seeded

B, H, P, D, C, K = 2, 3, 12, 4, 7, 5


@pytest.fixture
def projection() -> nn.Linear:
    layer = nn.Linear(H * D, C)
    with torch.no_grad():
        layer.weight.copy_(seeded("w", C, H * D))
        layer.bias.copy_(seeded("bias", C) * 10)
    return layer


# ---- heads ----------------------------------------------------------------------------------------------------------


def each_head(tensor: Tensor, layer: nn.Linear) -> Tensor:
    """O_h = o_h W_h: (B, H, n, C)."""
    weight = layer.weight.detach().double().unflatten(1, (H, D))
    return torch.einsum("bhnd,chd->bhnc", tensor.double(), weight)


def naive_weights(output: Tensor, value: Tensor, layer: nn.Linear, how: str) -> Tensor:
    outs = each_head(output, layer)
    total = outs.sum(1, keepdim=True)
    dots, norms = (outs * total).sum(-1), outs.norm(dim=-1)
    spectral = torch.linalg.svdvals(each_head(value, layer))[..., :1]
    raw = {
        "dot": dots,
        "dot-clamped": dots.clamp(min=0),
        "cosine": dots / (norms * total.norm(dim=-1)),
        "l2": norms,
        "dot-spectral": dots * spectral,
        "cosine-spectral": dots / (norms * total.norm(dim=-1)) * spectral,
        "average": torch.ones_like(dots),
    }[how]
    return raw / raw.sum(1, keepdim=True)


@pytest.mark.parametrize("how", heads_module.Heads.__args__)
def test_head_weights(projection: nn.Linear, how: str) -> None:
    output, value = seeded("o", B, H, P, D), seeded("v", B, H, K, D)
    with torch.no_grad():
        found = head_weights(output, projection, how, value)
    assert found.shape == (B, H, P)
    assert torch.allclose(found.double(), naive_weights(output, value, projection, how), atol=1e-4, rtol=1e-4)
    assert torch.allclose(found.sum(1), torch.ones(B, P), atol=1e-5)


def test_dot_weights_are_shares_of_the_squared_output(projection: nn.Linear) -> None:
    output = seeded("o", B, H, P, D)
    outs = each_head(output, projection)
    module_output = projection(output.transpose(1, 2).flatten(2)) - projection.bias
    assert torch.allclose(outs.sum(1).float(), module_output, atol=1e-5)
    weights = head_weights(output, projection, "dot")
    squared = outs.sum(1).square().sum(-1)
    assert torch.allclose(weights.double() * squared[:, None], (outs * outs.sum(1, keepdim=True)).sum(-1), atol=1e-4)


def test_heads_that_cancel_out_count_equally(projection: nn.Linear) -> None:
    found = head_weights(torch.zeros(1, H, 2, D), projection, "dot")
    assert torch.allclose(found, torch.full((1, H, 2), 1 / H))


def test_an_unknown_way_to_weigh_heads(projection: nn.Linear) -> None:
    with pytest.raises(ValueError, match=r"dot, dot-clamped.*'dots'"):
        head_weights(seeded("o", B, H, P, D), projection, "dots")


def lazy_map(grid: tuple[int, int], keys: int | None = None, dtype: torch.dtype = torch.float64) -> LazyMap:
    cells = grid[0] * grid[1]
    q, k = seeded("q", B, H, cells, D).to(dtype), seeded("k", B, H, keys or cells, D).to(dtype)
    return LazyMap(q, k, None, D**-0.5, slice(None), grid)


def naive_map(lazy: LazyMap) -> Tensor:
    return (lazy.query.double() @ lazy.key.double().mT / math.sqrt(D)).softmax(-1)


@pytest.mark.parametrize("elements", [1, 100, 2**22])
def test_aggregate_heads(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads_module, "BLOCK_ELEMENTS", elements)
    lazy, weights = lazy_map((3, 4), keys=K), seeded("weights", B, H, P)
    whole = naive_map(lazy)
    assert torch.allclose(
        aggregate_heads(lazy, weights).double(), (weights.double()[..., None] * whole).sum(1), atol=1e-5
    )
    assert torch.allclose(aggregate_heads(lazy).double(), whole.mean(1), atol=1e-6)


# ---- layers ---------------------------------------------------------------------------------------------------------


def bilinear(small: int, large: int) -> Tensor:
    """The matrix of a one-dimensional bilinear resize, cell centres aligned, borders repeated: (large, small)."""
    matrix = torch.zeros(large, small, dtype=torch.float64)
    for i in range(large):
        x = min(max((i + 0.5) * small / large - 0.5, 0), small - 1)
        low = int(x)
        high = min(low + 1, small - 1)
        matrix[i, low] += 1 - (x - low)
        matrix[i, high] += x - low
    return matrix


def nearest(small: int, large: int) -> Tensor:
    matrix = torch.zeros(large, small, dtype=torch.float64)
    for i in range(large):
        matrix[i, i * small // large] = 1
    return matrix


def resized(whole: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """S of (B, cells, cells) on another grid: queries nearest, keys bilinear."""
    rows = torch.kron(nearest(grid[0], wanted[0]), nearest(grid[1], wanted[1]))
    columns = torch.kron(bilinear(grid[0], wanted[0]), bilinear(grid[1], wanted[1]))
    return rows @ whole @ columns.T


def naive_layer(lazy: LazyMap, reference: Tensor, how: str, renormalise: bool) -> Tensor:
    f = reference.double().flatten(2)
    affinity = (f.mT @ f / math.sqrt(f.shape[1])).softmax(-1)
    own = resized(naive_map(lazy).mean(1), lazy.grid, (reference.shape[2], reference.shape[3]))
    own = own / own.sum(-1, keepdim=True) if renormalise else own
    return {
        "dot": (affinity * own).sum((1, 2)),
        "mse": 1 / (affinity - own).norm(dim=-1).sum(-1),
        "iou": torch.minimum(affinity, own).sum((1, 2)) / torch.maximum(affinity, own).sum((1, 2)),
        "equal": torch.ones(B, dtype=torch.float64),
    }[how]


@pytest.mark.parametrize("grid", [(4, 6), (2, 3), (8, 12), (3, 5)], ids=["same", "coarser", "finer", "uneven"])
@pytest.mark.parametrize("how", layers_module.Layers.__args__)
@pytest.mark.parametrize("renormalise", [True, False])
def test_layer_weight(grid, how, renormalise, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy, reference = lazy_map(grid), seeded("f", B, C, 4, 6)
    expected = naive_layer(lazy, reference, how, renormalise)
    for elements, kept in [(1, 0), (100, 0), (100, 2**24), (2**21, 2**24)]:
        monkeypatch.setattr(layers_module, "BLOCK_ELEMENTS", elements)
        monkeypatch.setattr(layers_module, "KEPT_ELEMENTS", kept)
        found = layer_weight(lazy, Affinity(reference), how, renormalise=renormalise)
        assert torch.allclose(found.double(), expected, rtol=1e-5)


def test_as_released_takes_the_first_channel_and_does_not_renormalise() -> None:
    lazy, reference = lazy_map((2, 3)), seeded("f", B, C, 4, 6)
    aggregator = Aggregator(
        {"vit-block0-cross-map": nn.Identity()}, "f", (), (4, 6), heads="average", as_released=True
    )  # fmt: skip
    for id in ("vit-block0-cross-map", "vit-block0-self-map"):
        aggregator(id, AttentionCall(lazy, lazy.key, lazy.query, nn.Identity()))
    aggregator("f", reference)
    (found,) = aggregator.layer_weights.values()
    assert torch.allclose(found.double(), naive_layer(lazy, reference[:, :1], "dot", False), rtol=1e-5)


@pytest.mark.parametrize(("side", "factor"), [(8, 16), (16, 4), (32, 1), (64, 0.25)])
def test_without_renormalising_coarse_layers_are_favoured(side: int, factor: float) -> None:
    """The bias of the released resize, for maps that all say the same: nothing."""
    uniform = LazyMap(
        torch.zeros(1, 1, side**2, 1), torch.zeros(1, 1, side**2, 1), None, 1.0, slice(None), (side, side)
    )
    affinity = Affinity(seeded("f", 1, 4, 32, 32))
    assert layer_weight(uniform, affinity).item() == pytest.approx(1, rel=1e-4)
    assert layer_weight(uniform, affinity, renormalise=False).item() == pytest.approx(factor, rel=1e-4)


# ---- rescaling ------------------------------------------------------------------------------------------------------


def naive_normalised(maps: Tensor) -> np.ndarray:
    blurred = np.stack([
        # truncate: two cells each way; mirror: reflected about the border cell
        ndimage.gaussian_filter(m, 1.1, mode="mirror", truncate=2 / 1.1)
        for m in maps.double().numpy()
    ])  # fmt: skip
    low, high = blurred.min((1, 2), keepdims=True), blurred.max((1, 2), keepdims=True)
    return (blurred - low) / (high - low)


ENTITIES, CONTENT = [[1, 2], [4]], [1, 2, 4, 5]


@pytest.mark.parametrize("how", ["sum", "max", "none", "raw", "sum-raw", "sum-raw-again"])
def test_entity_maps(how: str) -> None:
    tokens = torch.rand(7, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = torch.stack([tokens[[1, 2]].mean(0), tokens[4]])
    share = naive_normalised(means / tokens[CONTENT].sum(0))
    expected = {
        "sum": share,
        "max": naive_normalised(means / tokens[CONTENT].amax(0)),
        "none": naive_normalised(means),
        "raw": means.numpy(),
        "sum-raw": share * means.numpy(),
        "sum-raw-again": naive_normalised(torch.from_numpy(share * means.numpy())),
    }[how]
    assert np.allclose(entity_maps(tokens, ENTITIES, CONTENT, how).numpy(), expected, atol=1e-9)


def test_maps_that_say_nothing_are_zero_not_undefined() -> None:
    assert torch.equal(stretched(torch.full((1, 3, 3), 0.3)), torch.zeros(1, 3, 3))
    assert torch.equal(entity_maps(torch.zeros(3, 4, 4), [[1], [2]], [1, 2], "sum"), torch.zeros(2, 4, 4))
    assert torch.isfinite(normalised(seeded("m", 1, 1, 1))).all()  # a grid of one cell


def test_one_entity_alone_is_not_divided_by_itself() -> None:
    tokens = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(entity_maps(tokens, [[1, 2]], [1, 2], "sum"), entity_maps(tokens, [[1, 2]], [1, 2], "none"))


# ---- refinement -----------------------------------------------------------------------------------------------------


def joint(grid: tuple[int, int], text: int, indexed: bool) -> LazyMap:
    """Attention over a few text tokens and the image, biased in each image of a batch by its own amounts."""
    lazy, cells = lazy_map(grid, keys=text + grid[0] * grid[1]), grid[0] * grid[1]
    columns = torch.arange(text, text + cells).expand(B, -1) if indexed else slice(text, None)
    return replace(lazy, bias=seeded("bias", B, 1, 1, text + cells).double(), columns=columns)


def naive_joint(lazy: LazyMap, text: int) -> Tensor:
    scores = lazy.query.double() @ lazy.key.double().mT / math.sqrt(D) + lazy.bias
    return scores.softmax(-1).mean(1)[..., text:]


@pytest.mark.parametrize(
    ("k", "kept"), [(0, 0), (1, 0), (3, 0), (3, 2**24)], ids=["none", "one", "by attention", "by a matrix"]
)
@pytest.mark.parametrize(("text", "indexed"), [(0, False), (5, False), (5, True)])
def test_refine(k: int, kept: int, text: int, indexed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refinement_module, "KEPT_ELEMENTS", kept)
    monkeypatch.setattr(refinement_module, "BLOCK_ELEMENTS", 5 * 24)  # blocks of five rows, the last of four
    layers = [joint(grid, text, indexed) for grid in [(4, 6), (2, 3), (8, 12)]]
    whole = torch.stack([resized(naive_joint(lazy, text), lazy.grid, (4, 6)) for lazy in layers]).mean(0)
    maps = seeded("m", B, 9, 4, 6).double()
    expected = maps.flatten(2).mT
    for _ in range(k):
        expected = whole @ expected
    assert torch.allclose(refine(maps, layers, k), expected.mT.unflatten(2, (4, 6)), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_matrix_is_exact_for_models_of_half_precision(dtype: torch.dtype) -> None:
    lazy, maps = lazy_map((4, 6), dtype=dtype), seeded("m", B, 9, 4, 6)
    whole = naive_map(lazy).mean(1)
    expected = (maps.double().flatten(2) @ torch.linalg.matrix_power(whole, 3).mT).unflatten(2, (4, 6))
    assert torch.allclose(refine(maps, [lazy], 3).double(), expected, atol=1e-6)


def test_what_is_too_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer finer than the maps counts too; refining then makes no rows of a map."""
    monkeypatch.setattr(layers_module, "KEPT_ELEMENTS", B * 24**2)
    assert Affinity(seeded("f", B, C, 4, 6)).kept and not Affinity(seeded("f", B, C, 5, 6)).kept
    monkeypatch.setattr(refinement_module, "KEPT_ELEMENTS", 24**2)
    for grid, made in [((4, 6), B), ((5, 6), 0)]:
        watched = Mock(wraps=resized_rows)
        monkeypatch.setattr(refinement_module, "resized_rows", watched)
        refine(seeded("m", B, 9, 4, 6), [lazy_map(grid)], 3)
        assert watched.call_count == made


# ---- background -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"),
    [("offset", [0.3, 1.0]), ("exact", [0.0, 0.9]), ("max", [0.3, 0.9]), ("average", [0.15, 0.6]),
     ("threshold", [0.3, 0.3])],
)  # fmt: skip
def test_background_score(how: str, expected: list[float]) -> None:
    assert background_score(torch.tensor([[0.0, 0.9]]), how, 0.3).tolist() == [pytest.approx(expected)]


def test_unknown_choices_name_those_there_are() -> None:
    with pytest.raises(ValueError, match="offset, exact"):
        background_score(torch.zeros(1, 1), "none", 0)
    with pytest.raises(ValueError, match="dot, mse, iou, equal"):
        layer_weight(lazy_map((2, 2)), Affinity(seeded("f", B, C, 2, 2)), "vanilla")
    with pytest.raises(ValueError, match="sum, max, none"):
        entity_maps(torch.zeros(1, 2, 2), [[0]], [0], "plain")


def test_the_adjoint_is_not_a_resize() -> None:
    """What would be wrong: resizing M to the grid of the layer instead of applying Uᵀ."""
    lazy = lazy_map((2, 3))
    layer = LazyMap(lazy.query[:1], lazy.key[:1], None, lazy.scale, lazy.columns, (2, 3))
    maps = seeded("m", 1, 4, 6).double()
    small = F.interpolate(maps[None], (2, 3), mode="bilinear")[0]
    wrong = (naive_map(layer).mean(1)[0] @ small.flatten()).view(1, 1, 2, 3)
    wrong = F.interpolate(wrong, (4, 6), mode="nearest")[0]
    assert (refine(maps[None], [layer], 1)[0] - wrong).abs().max() > 0.1
