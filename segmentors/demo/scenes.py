"""Drawn scenes with their truth, segmented by the page."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffusion_features.embedded import CLASSES, Scene, render
from diffusion_features.embedded.dataset import LIMIT, SPLITS
from segmentors.evaluation import count

SIDE = 128


def scene(split: str, number: int) -> Scene:
    """The scene of a number in a split.

    Raises:
        ValueError: there is no such split or number.
    """
    if split not in SPLITS or not 0 <= number < LIMIT:
        raise ValueError(f"Scenes are numbered from 0 to {LIMIT - 1}, in {', '.join(SPLITS)}.")
    return render(SPLITS[split] + number, SIDE)


def truth(drawn: Scene) -> Tensor:
    """int64 (H, W), indices into ``drawn.classes``."""
    place = np.full(len(CLASSES), -1)
    place[[CLASSES.index(name) for name in drawn.classes]] = range(len(drawn.classes))
    return torch.from_numpy(place[drawn.semantic])


def overlap(predicted: Tensor, true: Tensor, classes: int) -> list[float]:
    """Intersection over union of each class, in [0, 1]; every class is in ``true``."""
    right, there, said = count(predicted, true, classes)[:3].double()
    return (right / (there + said - right)).tolist()
