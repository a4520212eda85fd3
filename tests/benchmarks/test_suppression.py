"""Figures of the benchmark of content shift, on records whose figures are known."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from diffusion_features.correspondence import Pair

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import suppression as benchmark


def pair(source: int, target: int, points: int) -> Pair:
    at, box = ((1.0, 1.0),) * points, (0.0, 0.0, 8.0, 8.0)
    return Pair("cat", Path(f"{source:06d}.png"), Path(f"{target:06d}.png"), at, at, box, box, (8, 8), (8, 8))


PAIRS = [pair(0, 1, 4), pair(1, 2, 3), pair(2, 3, 5)]


def record(technique: str, activation: str, quality: float, seed: int = 0, score: bool = True) -> Any:
    """Of 4 scenes with 3 classes: the higher the quality, the better every figure of every scene."""
    rng = np.random.default_rng(3)
    there = torch.from_numpy(rng.integers(20, 40, (4, 3)).astype(float))
    counts = torch.stack([there * quality, there, there], dim=1)
    return benchmark.Record(
        technique, activation, 50, seed, torch.full((4,), quality).double() if score else None,
        torch.full((4,), quality).double(), counts, counts, torch.tensor([4.0, 3.0, 5.0]).double() * quality,
    )  # fmt: skip


def test_figures_of_weighted_scenes_are_those_of_repeated_ones() -> None:
    one = record("a", "x", 0.5)
    weights = torch.tensor([[1, 1, 1, 1], [2, 0, 1, 1]]).double()
    right, there, predicted = one.probe[[0, 0, 2, 3]].sum(0)
    expected = float((right / (there + predicted - right)).mean())
    assert float(benchmark.value(one, "probe", weights, PAIRS)[1]) == pytest.approx(expected)
    # of the pairs, (0, 1) and (1, 2) go with scene 1, and (2, 3) stays
    one.pck[:] = torch.tensor([4.0, 0.0, 1.0])
    assert benchmark.value(one, "pck", weights, PAIRS).tolist() == pytest.approx([5 / 12, 1 / 5])
    assert float(benchmark.value(one, "edges", weights, PAIRS)[1]) == 0.5


def test_the_rank_correlation_is_of_gains_over_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "DRAWS", 20)
    qualities = {
        ("none", "x"): 0.5,
        ("none", "y"): 0.3,
        ("a", "x"): 0.7,
        ("a", "y"): 0.4,
        ("b", "x"): 0.2,
        ("b", "y"): 0.6,
    }
    records = [record(*key, quality) for key, quality in qualities.items()]
    records.append(record("mean", "x", 0.9, score=False))  # has no score, and no part
    for target in ("probe", "knn", "pck"):
        found = benchmark.foreseen(records, target, PAIRS)
        assert found["rho"] == pytest.approx(1.0) and found["gains"] == 4 and found["interval"] == pytest.approx([1, 1])
    scores = [0.1, 0.4, 0.2, 0.3]
    for one, score in zip(records[2:6], scores, strict=True):
        one.score[:] = score
    gains = [q - base for q, base in zip(scores, (0.5, 0.3, 0.5, 0.3), strict=True)]
    expected = spearmanr(gains, [0.2, 0.1, -0.3, 0.3]).statistic
    assert benchmark.foreseen(records, "pck", PAIRS)["rho"] == pytest.approx(expected)


def test_the_spread_is_over_seeds() -> None:
    records = [record("a", id, q + 0.1 * s, s) for id, q in (("x", 0.2), ("y", 0.4)) for s in (0, 1)]
    (row,) = benchmark.summary(records, PAIRS)
    assert row["edges"]["mean"] == pytest.approx(0.35) and row["edges"]["spread"] == pytest.approx(0.1 / np.sqrt(2))
    mixtures = [record("mean", "x", 0.5, seed, score=False) for seed in (0, 1)]
    assert benchmark.summary(mixtures, PAIRS)[0]["score"] is None


def test_gains_are_over_what_they_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "DRAWS", 20)
    qualities = {"none": 0.5, "caption, denoise": 0.4, "cfg": 0.45, "canny": 0.6, "all": 0.7}
    records = [
        record(name, id, q + off, seed) for name, q in qualities.items() for id, off in (("x", 0), ("y", 0.1))
        for seed in (0, 1)
    ]  # fmt: skip
    found = benchmark.gains(records, PAIRS)
    assert [*found] == ["caption, denoise", "cfg", "canny", "all", "all, over canny"]
    expected = {"caption, denoise": -0.1, "cfg": 0.05, "canny": 0.1, "all": 0.2, "all, over canny": 0.1}
    for target in ("pck", "edges"):
        assert {name: by[target]["difference"] for name, by in found.items()} == pytest.approx(expected)
        assert all(by[target]["interval"] == pytest.approx([expected[name]] * 2) for name, by in found.items())
    assert found["canny"]["probe"]["interval"][0] > 0


def test_the_interval_is_over_scenes() -> None:
    base, other = record("none", "x", 0.5), record("canny", "x", 0.5)
    other.edges[:] = torch.tensor([0.9, 0.5, 0.5, 0.5])
    found = benchmark.gains([base, other], PAIRS)["canny"]["edges"]
    assert found["difference"] == pytest.approx(0.1) and found["interval"] == pytest.approx([0, 0.3])


def options(records: Path, **changed: Any) -> Namespace:
    known = {"split": "test", "style": None, "train": 2, "scenes": 4, "activations": ["practical"], "steps": 5}
    return Namespace(**{**known, "weights": Path("here"), "records": records, **changed})


def test_records_outlive_a_run(tmp_path: Path) -> None:
    wanted, file = [record("a", "x", 0.5), record("none", "x", 0.3, seed=7, score=False)], tmp_path / "records.pt"
    assert benchmark.kept(options(file)) == []
    benchmark.keep(wanted, options(file))
    for found, original in zip(benchmark.kept(options(file)), wanted, strict=True):
        for name, value in vars(original).items():
            same = torch.equal(vars(found)[name], value) if isinstance(value, torch.Tensor) else None
            assert same or vars(found)[name] == value
    assert [file] == list(tmp_path.iterdir())


def test_records_of_other_settings_are_refused(tmp_path: Path) -> None:
    benchmark.keep([record("a", "x", 0.5)], options(tmp_path / "records.pt"))
    with pytest.raises(SystemExit, match="of other settings"):
        benchmark.kept(options(tmp_path / "records.pt", train=64))
