"""The trained head: its loss against the paper's full matrix, and that it learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from diffusion_features.correspondence import (
    AggregationHead,
    Pair,
    contrastive_loss,
    match,
    measure,
    summary,
    train_head,
)  # fmt: skip

PAIR = Pair(
    "cat", Path("s"), Path("t"), ((1.0, 1.0), (13.0, 9.0), (7.9, 3.0)), ((3.0, 5.0), (15.9, 11.9), (9.0, 7.0)),
    (0, 0, 16, 12), (0, 0, 16, 12), (12, 16), (12, 16),
)  # fmt: skip


def test_the_loss_is_that_of_all_pairs_of_cells():
    """By the paper: the matrix of all cells against all cells, times exp(ln(1 / 0.07)), cross-entropy both ways."""
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(6, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    here, there = [0, 2 * 4 + 3, 0 * 4 + 1], [1 * 4 + 0, 2 * 4 + 3, 1 * 4 + 2]  # cells of 4 x 4 pixels, by hand
    full = F.normalize(source.flatten(1), dim=0).T @ F.normalize(target.flatten(1), dim=0) / 0.07
    forth = -torch.stack([full[i].log_softmax(0)[j] for i, j in zip(here, there, strict=True)]).mean()
    back = -torch.stack([full[:, j].log_softmax(0)[i] for i, j in zip(here, there, strict=True)]).mean()
    assert torch.allclose(contrastive_loss(source, target, PAIR), (forth + back) / 2, atol=1e-12)


def test_the_head_is_one_convolution_over_the_enlarged_activations():
    torch.manual_seed(0)
    head = AggregationHead(channels=5, grid=(6, 8))
    features = {"a": torch.randn(2, 3, 4), "b": torch.randn(3, 6, 8)}
    (out,) = head(features).values()
    large = torch.cat([F.interpolate(f[None], (6, 8), mode="bilinear") for f in features.values()], dim=1)
    assert torch.allclose(out, F.conv2d(large, head.conv.weight, padding=1)[0], atol=1e-6)
    assert sum(p.numel() for p in head.parameters()) == 5 * 5 * 9
    with pytest.raises(ValueError, match="4 channels together; this head is for 5"):
        head({"a": torch.randn(4, 3, 4)})


def world(seed: int, count: int) -> tuple[list[Pair], dict[str, dict[str, torch.Tensor]]]:
    """Pairs whose cells are alike in 6 channels, two columns further, and drowned in 10 channels of noise."""
    generator = torch.Generator().manual_seed(seed)
    images, pairs = {}, []
    for number in range(count):
        signal = torch.randn(6, 8, 8, generator=generator)
        for name in ("s", "t"):
            noise = torch.randn(10, 8, 8, generator=generator)
            images[f"{name}{number}"] = {"signal": signal.roll(2, -1) if name == "t" else signal, "noise": noise}
        cells = torch.randperm(64, generator=generator)[:8].tolist()
        here = tuple((c % 8 * 8 + 4.0, c // 8 * 8 + 4.0) for c in cells)
        there = tuple(((x + 16) % 64, y) for x, y in here)
        files = {"source": Path(f"s{number}"), "target": Path(f"t{number}")}
        pairs.append(
            Pair("x", **files, source_points=here, target_points=there, source_box=(0, 0, 64, 64),
                 target_box=(0, 0, 64, 64), source_size=(64, 64), target_size=(64, 64))
        )  # fmt: skip
    return pairs, images


@pytest.mark.slow
def test_training_finds_what_corresponds():
    pairs, images = world(0, 220)
    torch.manual_seed(0)
    head = AggregationHead(channels=16, grid=(8, 8))
    losses = train_head(head, pairs[:200], lambda path: images[path.name], steps=200, seed=1)  # each pair once
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    with torch.no_grad():
        before = summary(measure(pairs[200:], lambda path: images[path.name]), [0.1])["img per point"]["0.1"]
        after = summary(measure(pairs[200:], lambda path: head(images[path.name])), [0.1])["img per point"]["0.1"]
    assert after > before + 0.1


def test_training_depends_on_the_seed_alone():
    pairs, images = world(0, 6)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        head = AggregationHead(channels=16, width=4, grid=(8, 8))
        torch.manual_seed(len(runs))  # which must not matter
        runs.append(train_head(head, pairs, lambda path: images[path.name], steps=5, seed=seed))
    assert runs[0] == runs[1] != runs[2]
    with pytest.raises(ValueError, match="no pairs"):
        train_head(head, [], lambda path: images[path.name], steps=5)


def test_matches_can_be_made_with_a_head():
    torch.manual_seed(0)
    head = AggregationHead(channels=8, grid=(6, 8))
    features = {"a": torch.randn(8, 6, 8, generator=torch.Generator().manual_seed(0))}
    points = torch.tensor([[9.5, 5.5]])
    with torch.no_grad():
        found = match(head(features), head(features), points, source_size=(12, 16), target_size=(12, 16))
    assert (found.points - points).abs().max() <= 1
