"""Training an ensemble on pixels that are drawn from features on disk."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

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
SAVED_EVERY = 500
"""Steps after which a training that has a checkpoint writes it."""


def train(
    ensemble: Ensemble,
    features: Callable[[str], Features],
    labels: Mapping[str, np.ndarray],
    steps: int,
    seed: int = 0,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    done: Callable[[], None] = lambda: None,
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
        seed: of everything that is drawn, 0 or more.
        checkpoint: a file that is written now and then, read at the beginning where it exists, and removed at the end:
            called again with the same arguments after a kill, training goes on there, and ends with the bits of an
            uninterrupted one.
        done: called after each step, and at once for those that a checkpoint has.

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
    saved = None if checkpoint is None else Path(checkpoint)
    losses = _resumed(saved, ensemble, optimizer) if saved is not None and saved.is_file() else []
    for _ in losses:
        done()
    batches = _batches(ensemble, features, labels, places, seed, len(losses))
    for step, (pixels, truth) in zip(range(len(losses) + 1, steps + 1), batches, strict=False):
        logits = torch.stack([member(x) for member, x in zip(ensemble.members, pixels, strict=True)])
        loss = F.cross_entropy(logits.flatten(0, 1), truth.flatten())
        optimizer.zero_grad()
        (loss * len(logits)).backward()  # each member's own mean loss
        optimizer.step()
        losses.append(loss.item())
        done()
        if saved is not None and step % SAVED_EVERY == 0:
            _save(saved, ensemble, optimizer, losses)
    if saved is not None:
        saved.unlink(missing_ok=True)
    return losses


def _save(path: Path, ensemble: Ensemble, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    part = path.with_name(path.name + ".part")
    state = {"ensemble": ensemble.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _resumed(path: Path, ensemble: Ensemble, optimizer: torch.optim.Optimizer) -> list[float]:
    """The losses so far; weights and optimizer are brought there."""
    state = torch.load(path, map_location=next(ensemble.parameters()).device, weights_only=True)
    ensemble.load_state_dict(state["ensemble"])
    optimizer.load_state_dict(state["optimizer"])
    losses: list[float] = state["losses"]
    return losses


def _batches(
    ensemble: Ensemble,
    features: Callable[[str], Features],
    labels: Mapping[str, np.ndarray],
    places: Mapping[str, np.ndarray],
    seed: int,
    skip: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (members, BATCH, channels) and labels (members, BATCH), without the first ``skip``."""
    each = max(1, -(-max(BATCH, POOL // ensemble.channels) // len(places)))
    count = sum(min(each, len(found)) for found in places.values())
    starts = range(0, max(1, count - BATCH + 1), BATCH)
    first, skip = divmod(skip, len(starts))
    for number in itertools.count(first):
        generator = np.random.default_rng([seed, number])  # one a pool, so that a later pool can be the first
        pixels, truth = _pool(features, labels, places, each, generator, next(ensemble.parameters()))
        orders = [generator.permutation(len(pixels)) for _ in ensemble.members]
        for start in starts[skip if number == first else 0 :]:
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
