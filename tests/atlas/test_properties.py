"""The three properties on activations whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffusion_features.atlas.properties import properties


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wave(cycles: float, angle: float, size: tuple[int, int], channels: int = 8) -> torch.Tensor:
    """A plane wave of ``cycles`` a cell in a direction, with another phase in each channel: (C, h, w)."""
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    phases = torch.arange(channels, dtype=torch.float64)[:, None, None] / channels
    return torch.sin(2 * math.pi * (cycles * (columns * math.cos(angle) + rows * math.sin(angle)) + phases))


def test_pure_noise_is_noise_and_a_repeated_image_is_none():
    assert properties(randn(4, 32, 24, 20)).noise == pytest.approx(1, abs=0.02)
    assert properties(randn(32, 24, 20).expand(4, -1, -1, -1)).noise == 0
    assert properties(torch.ones(4, 3, 5, 5)).noise == 0  # neither


@pytest.mark.parametrize("draws", [2, 4, 8])
def test_noise_is_its_share_of_the_variance(draws):
    x = 2 * randn(16, 40, 30) + randn(draws, 16, 40, 30, seed=1)
    assert properties(x).noise == pytest.approx(1 / (4 + 1), abs=0.01)


def test_low_frequency_noise_is_noise_too():
    smooth = torch.nn.functional.interpolate(randn(4, 32, 6, 6, seed=1), (36, 36), mode="bicubic")
    x = randn(32, 36, 36) * smooth.std() + smooth
    assert properties(x).noise == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("cycles", [0.05, 0.1, 0.2, 0.35])
def test_frequency_of_a_wave(cycles):
    along = properties(wave(cycles, 0.0, (60, 40)).expand(2, -1, -1, -1)).frequency
    aslant = properties(wave(cycles, math.pi / 3, (60, 60)).expand(2, -1, -1, -1)).frequency
    assert along == pytest.approx(cycles, rel=0.05)
    assert aslant == pytest.approx(cycles, rel=0.05)


def test_noise_leaves_the_frequency_of_the_signal():
    signal = wave(0.08, 0.4, (64, 64), channels=32)
    assert properties(signal + randn(4, 32, 64, 64)).frequency == pytest.approx(0.08, rel=0.1)
    white = properties(randn(32, 64, 64).expand(2, -1, -1, -1)).frequency
    assert white == pytest.approx(math.hypot(0.25, 0.25), rel=0.02)


def test_finer_patterns_have_higher_frequency():
    found = [
        properties(torch.nn.functional.interpolate(randn(1, 16, n, n), (48, 48), mode="bicubic").expand(2, -1, -1, -1))
        for n in (4, 8, 16, 32)
    ]
    frequencies = [p.frequency for p in found]
    assert frequencies == sorted(frequencies)


def position_code(size: tuple[int, int], channels: int = 512, scale: float = 3.0) -> torch.Tensor:
    """Random Fourier features: the similarity of two cells is a Gaussian of their distance, nothing else."""
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    waves, phases = randn(channels, 2) / scale, randn(channels, seed=1) * 100
    return torch.cos(waves[:, :1, None] * rows + waves[:, 1:, None] * columns + phases[:, None, None])


def test_locality_of_pure_position_and_of_none():
    code = position_code((14, 14))
    assert properties(code.expand(2, -1, -1, -1)).locality > 0.9
    shuffled = code.flatten(1)[:, torch.randperm(196, generator=torch.Generator().manual_seed(0))].view_as(code)
    assert abs(properties(shuffled.expand(2, -1, -1, -1)).locality) < 0.02
    assert abs(properties(randn(16, 14, 14).expand(2, -1, -1, -1)).locality) < 0.02


def test_locality_of_two_objects_that_look_alike_far_apart():
    """Stripes: what is alike is as often far as near."""
    stripes = wave(0.25, 0.0, (12, 12), channels=2)
    assert properties(stripes.expand(2, -1, -1, -1)).locality < 0.3


def test_locality_against_a_naive_analysis_of_variance():
    x = position_code((5, 7), channels=12) + 0.5 * randn(12, 5, 7)
    vectors = (x - x.mean(dim=(1, 2), keepdim=True)).flatten(1).T.numpy()
    groups: dict[int, list[float]] = {}
    for i in range(35):
        for j in range(i):
            distance = round(math.hypot(i // 7 - j // 7, i % 7 - j % 7))
            cosine = vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j])
            groups.setdefault(distance, []).append(cosine)
    everything = np.concatenate([*groups.values()])
    inside = sum(np.sum((np.array(g) - np.mean(g)) ** 2) for g in groups.values())
    total = np.sum((everything - everything.mean()) ** 2)
    mean_square = inside / (len(everything) - len(groups))
    truth = (total - inside - (len(groups) - 1) * mean_square) / total
    assert properties(x.expand(2, -1, -1, -1)).locality == pytest.approx(truth, abs=1e-9)


def test_half_precision_and_seeds():
    x = (randn(16, 24, 20) + 0.3 * randn(3, 16, 24, 20, seed=1)).to(torch.float16)
    assert properties(x) == properties(x)  # 480 cells, of which some are drawn
    assert properties(x).noise == pytest.approx(properties(x.double()).noise, abs=1e-3)
    assert properties(x, seed=1).locality != properties(x, seed=2).locality
    assert properties(x, seed=1).noise == properties(x, seed=2).noise


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (3, 4, 4), (2, 3, 1, 1)])
def test_what_cannot_be_measured_is_refused(shape):
    with pytest.raises(ValueError, match="S >= 2"):
        properties(torch.zeros(shape))
    with pytest.raises(ValueError, match="not finite"):
        properties(torch.full((2, 3, 4, 4), torch.nan))
