"""Augmentation that comes back: a few fixed views of each image, whose features can be kept."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform, Compose
from mmseg.registry import TRANSFORMS


@TRANSFORMS.register_module()
class FixedViews(BaseTransform):
    """One of K views of each image, drawn anew each time; what a view is, is drawn once, from a seed.

    Crops, flips and colours change features too, so that random ones are never found in a cache. With K views of each
    of N images, a cache is full after N·K features.

    >>> dict(type="FixedViews", views=4, transforms=[dict(type="RandomFlip", prob=0.5)])
    """

    def __init__(self, transforms: Sequence[dict[str, Any]], views: int = 4, seed: int = 0) -> None:
        """
        Args:
            transforms: random steps of a pipeline, behind those that load image and labels.
            views: K.
            seed: of what the views are; an image's views depend on it, their number and the name of its file alone.

        Raises:
            ValueError: fewer than one view.
        """
        if views < 1:
            raise ValueError(f"views must be at least 1, not {views}")
        self.transforms, self.views, self.seed = Compose(transforms), views, seed

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        name = f"{self.seed} {np.random.randint(self.views)} {Path(results['img_path']).name}"
        with _drawn_from(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])):
            return self.transforms(results)


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    """All global generators, which transforms draw from, at a seed; as they were before when it is done."""
    before = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        try:
            np.random.seed(seed)
            random.seed(seed)
            torch.manual_seed(seed)
            yield
        finally:
            np.random.set_state(before[0])
            random.setstate(before[1])
