"""Training an ensemble on pixels that are drawn from features on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_features.sampling import Features, at_points

from .ensemble import Ensemble

BATCH, LEARNING_RATE = 64, 1e-3
POOL = 2**26
"""Numbers that are drawn from the files at a time, 256 MiB in float32."""
IGNORED = 255


def train(
    ensemble: Ensemble, features: Callable[[str], Features], labels: Mapping[str, np.ndarray], steps: int, seed: int = 0
) -> list[float]:
    """Train an ensemble in place: Adam, batches of 64 random labelled pixels, each member on batches of its own.

    Only a pool of random pixels is in memory; it is drawn anew, from one image after another, when its pixels have been
    used. A pool has about equally many pixels of each image. The number of steps is fixed: the released code of both
    papers stops when the loss of single batches has not fallen for 50 batches, which is a matter of luck.

    Args:
        ensemble: on the device where it is to be trained.
        features: the activations of an image, id -> (C, h, w), such as ``store.read``.
        labels: image -> uint8 (H, W), 255 where nothing is known. H and W need not be the image's own.
        steps: batches for each member.
        seed: of everything that is drawn.

    Returns:
        The mean loss of the members at each step.

    Raises:
        ValueError: there are fewer than two labelled pixels, or there is a label beyond the classes.
    """
    places = {key: np.argwhere(map != IGNORED) for key, map in labels.items()}
    places = {key: found for key, found in places.items() if len(found)}
    if sum(map(len, places.values())) < 2:
        raise ValueError("fewer than two pixels are labelled, in all images together")
    highest = max(int(map[map != IGNORED].max(initial=0)) for map in labels.values())
    if highest >= ensemble.classes:
        raise ValueError(f"there is a label {highest}, but the ensemble has classes 0 to {ensemble.classes - 1}")
    ensemble.train()
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=LEARNING_RATE)
    losses = []
    batches = _batches(ensemble, features, labels, places, seed)
    for _, (pixels, truth) in zip(range(steps), batches, strict=False):
        logits = torch.stack([member(x) for member, x in zip(ensemble.members, pixels, strict=True)])
        loss = F.cross_entropy(logits.flatten(0, 1), truth.flatten())
        optimizer.zero_grad()
        (loss * len(logits)).backward()  # each member's own mean loss
        optimizer.step()
        losses.append(loss.item())
    return losses


def _batches(
    ensemble: Ensemble,
    features: Callable[[str], Features],
    labels: Mapping[str, np.ndarray],
    places: Mapping[str, np.ndarray],
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (members, BATCH, channels) and labels (members, BATCH)."""
    generator = np.random.default_rng(seed)
    each = max(1, -(-max(BATCH, POOL // ensemble.channels) // len(places)))
    while True:
        pixels, truth = _pool(features, labels, places, each, generator, next(ensemble.parameters()))
        orders = [generator.permutation(len(pixels)) for _ in ensemble.members]
        for start in range(0, max(1, len(pixels) - BATCH + 1), BATCH):
            rows = torch.from_numpy(np.stack([order[start : start + BATCH] for order in orders])).to(pixels.device)
            yield pixels[rows], truth[rows]


def _pool(
    features: Callable[[str], Features],
    labels: Mapping[str, np.ndarray],
    places: Mapping[str, np.ndarray],
    each: int,
    generator: np.random.Generator,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """Up to ``each`` random labelled pixels of every image: (n, channels) and int64 (n,), on the device of ``like``."""
    pixels, truth = [], []
    for key, found in places.items():
        chosen = found[generator.permutation(len(found))[:each]]
        points = torch.from_numpy(chosen[:, ::-1].copy()).double() + 0.5
        size = (labels[key].shape[0], labels[key].shape[1])
        pixels.append(torch.cat([*at_points(features(key), points, size).values()], dim=1).to(like))
        truth.append(torch.from_numpy(labels[key][chosen[:, 0], chosen[:, 1]].astype(np.int64)))
    return torch.cat(pixels), torch.cat(truth).to(like.device)
