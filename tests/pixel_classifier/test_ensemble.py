"""The ensemble of pixel classifiers: votes and uncertainty by hand, streaming against memory, and that it learns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusion_features.sampling import at_points
from diffusion_features.store import Store
from segmentors.pixel_classifier import Ensemble, ensemble, train, training
from segmentors.pixel_classifier.ensemble import vote


def test_the_vote_by_hand():
    chosen = torch.tensor([[0, 1, 2, 2], [1, 1, 0, 2], [1, 0, 1, 2]])  # members x pixels; the third is a tie
    labels, uncertainty = vote(F.one_hot(chosen, 3).double() * 100)
    assert labels.tolist() == [1, 1, 0, 2]
    assert uncertainty[3] == pytest.approx(0, abs=1e-9)
    assert uncertainty[2] == pytest.approx(math.log(3))  # three certain members, three opinions
    assert uncertainty[0] == pytest.approx(-(1 / 3) * math.log(1 / 3) - (2 / 3) * math.log(2 / 3))


def test_uncertainty_is_the_jensen_shannon_divergence():
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
    entropy = lambda q: -np.sum(q * np.log(q))  # noqa: E731
    truth = entropy(p.mean(0)) - np.mean([entropy(row) for row in p])
    _, uncertainty = vote(torch.from_numpy(np.log(p))[:, None] + 3)
    assert uncertainty.item() == pytest.approx(truth)


def test_members_are_as_published():
    layers = list(Ensemble(50, 7).members[0])
    assert [type(layer) for layer in layers] == [
        nn.Linear, nn.ReLU, nn.BatchNorm1d, nn.Linear, nn.ReLU, nn.BatchNorm1d, nn.Linear,
    ]  # fmt: skip
    assert [layer.out_features for layer in layers if isinstance(layer, nn.Linear)] == [128, 32, 7]
    many = [layer.out_features for layer in Ensemble(50, 30).members[0] if isinstance(layer, nn.Linear)]
    assert many == [256, 128, 30]
    assert layers[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert len(Ensemble(5, 2).members) == 10


def features(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"fine": torch.randn(6, 9, 7, generator=generator), "coarse": torch.randn(4, 3, 5, generator=generator)}


@pytest.mark.parametrize("pixels", [1, 50, 2**14])
def test_prediction_equals_that_of_the_enlarged_features(pixels, monkeypatch):
    monkeypatch.setattr(ensemble, "PIXELS", pixels)
    model = Ensemble(10, 4, members=3).eval()
    found = model.predict(features(0), (21, 16))
    large = torch.cat([F.interpolate(f[None], (21, 16), mode="bilinear")[0] for f in features(0).values()])
    with torch.no_grad():
        labels, uncertainty = vote(model(large.flatten(1).T))
    assert (found.labels.flatten() == labels).float().mean() > 0.99  # but for rounding where members are undecided
    assert torch.allclose(found.uncertainty.flatten(), uncertainty, atol=1e-5)
    assert found.doubt == pytest.approx(uncertainty.sort().values[-33:].mean().item(), abs=1e-4)


def test_pixels_from_disk_are_those_of_the_enlarged_features(tmp_path):
    """Streaming equals in-memory: every pixel of the pool, against the concatenated enlarged features."""
    with Store.create(tmp_path, {}) as store:
        for number in range(3):
            store.write(f"{number}.png", features(number), {})
    labels = {f"{n}.png": np.random.default_rng(n).integers(0, 3, (18, 14)).astype(np.uint8) for n in range(3)}
    labels["1.png"][:9] = 255
    places = {key: np.argwhere(map != 255) for key, map in labels.items()}
    pixels, truth = training._pool(
        store.read, labels, places, 10**6, np.random.default_rng(0), torch.zeros((), dtype=torch.float32)
    )
    rows = []
    for key, map in labels.items():
        layers = store.read(key).values()
        large = torch.cat([F.interpolate(f[None], (18, 14), mode="bilinear")[0] for f in layers]).flatten(1).T
        known = torch.from_numpy(map.flatten() != 255)
        rows.append(torch.cat([large[known], torch.from_numpy(map.flatten())[known][:, None]], dim=1))
    expected, got = torch.cat(rows), torch.cat([pixels, truth[:, None]], dim=1)
    order = [torch.from_numpy(np.lexsort(x.round(decimals=3).T.numpy())) for x in (expected, got)]
    assert torch.allclose(expected[order[0]], got[order[1]], atol=1e-5)


def world(count: int, seed: int) -> tuple[dict, dict]:
    """Images whose two classes differ by a curved boundary in two noisy channels, with wrong labels among the right."""
    generator = torch.Generator().manual_seed(seed)
    found, labels = {}, {}
    for number in range(count):
        x = torch.randn(5, 12, 12, generator=generator)
        found[f"{seed}-{number}"] = {"layer": x}
        truth = (x[0] ** 2 + x[1] > 0.8).numpy().astype(np.uint8)
        labels[f"{seed}-{number}"] = truth
    return found, labels


def accuracy(model: Ensemble, found: dict, labels: dict, members: list[int] | None = None) -> float:
    kept = model.members
    if members is not None:
        model.members = nn.ModuleList([kept[i] for i in members])
    hits = [(model.predict(f, (12, 12)).labels.numpy() == labels[k]).mean() for k, f in found.items()]
    model.members = kept
    return float(np.mean(hits))


def test_the_ensemble_learns_and_beats_its_members_on_average():
    found, labels = world(4, 0)
    noisy = {
        key: np.where(np.random.default_rng(1).random(m.shape) < 0.25, 1 - m, m).astype(np.uint8)
        for key, m in labels.items()
    }
    model = Ensemble(5, 2, members=6)
    train(model, found.__getitem__, noisy, steps=150)
    other, truth = world(6, 5)
    together = accuracy(model, other, truth)
    alone = [accuracy(model, other, truth, [i]) for i in range(6)]
    chance = max(np.mean([m.mean() for m in truth.values()]), 1 - np.mean([m.mean() for m in truth.values()]))
    assert together > chance + 0.05
    assert together > np.mean(alone) + 0.005


def test_training_depends_on_the_seed_alone():
    found, labels = world(2, 0)
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(runs))  # which must not matter
        runs.append(train(Ensemble(5, 2, members=2), found.__getitem__, labels, steps=4, seed=seed))
    assert runs[0] == runs[1] != runs[2]


def test_ignored_pixels_and_wrong_labels():
    found, labels = world(1, 0)
    (key,) = labels
    with pytest.raises(ValueError, match="fewer than two pixels are labelled"):
        train(Ensemble(5, 2), found.__getitem__, {key: np.full((12, 12), 255, np.uint8)}, steps=1)
    with pytest.raises(ValueError, match="a label 2, but the ensemble has classes 0 to 1"):
        train(Ensemble(5, 2), found.__getitem__, {key: labels[key] * 2}, steps=1)
    with pytest.raises(ValueError, match="5 channels together; this ensemble is for 6"):
        Ensemble(6, 2).predict(found[key], (12, 12))
    with pytest.raises(ValueError, match="1 classes"):
        Ensemble(6, 1)


def test_at_points_equals_interpolate():
    found = features(0)
    size = (20, 24)
    points = torch.stack(torch.meshgrid(torch.arange(24) + 0.5, torch.arange(20) + 0.5, indexing="xy"), -1).view(-1, 2)
    for id, rows in at_points(found, points, size).items():
        assert torch.allclose(
            rows.T.view(-1, *size), F.interpolate(found[id][None], size, mode="bilinear")[0], atol=1e-5
        )
