"""Results as files, in a folder that never grows beyond its budget."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from segmentors.training_free.pictures import RGB, label_image, overlay

from .segmenting import Answer


class Downloads:
    """Files for visitors to fetch."""

    def __init__(self, folder: Path, budget: int) -> None:
        """
        Args:
            folder: where they go; only this class writes there.
            budget: bytes they may take together; the oldest go first.
        """
        self._folder, self._budget, self._lock = folder, budget, threading.Lock()

    def __call__(self, picture: Image.Image, found: Answer, colours: Sequence[RGB]) -> list[str]:
        """Write ``labels.png``, ``overlay.png`` and ``scores.npy`` of an answer, and return their paths.

        ``labels.png`` is a palette image whose pixel values are the labels; ``scores.npy`` is float32 (K, H, W).
        """
        folder = self._folder / uuid.uuid4().hex
        folder.mkdir(parents=True)
        label_image(found.labels, colours).save(folder / "labels.png")
        overlay(picture, found.labels, found.classes, colours).save(folder / "overlay.png")
        np.save(folder / "scores.npy", found.scores.numpy())
        self._sweep(keep=folder)
        return [str(folder / name) for name in ("labels.png", "overlay.png", "scores.npy")]

    def _sweep(self, keep: Path) -> None:
        with self._lock:
            files = [found for path in self._folder.rglob("*") if (found := _file(path))]
            total = 0
            for _, size, path in sorted(files, key=lambda file: (file[2].parent == keep, file[0]), reverse=True):
                total += size
                if total > self._budget and path.parent != keep:
                    path.unlink(missing_ok=True)


def _file(path: Path) -> tuple[float, int, Path] | None:
    """When it was written, and its bytes; nothing for a folder, or for what the server has removed meanwhile."""
    try:
        about = path.stat()
    except FileNotFoundError:
        return None
    return (about.st_mtime, about.st_size, path) if path.is_file() else None
