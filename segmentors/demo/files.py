"""Pictures and results as files for visitors, in a folder that never grows beyond its budget.

Gradio would name a picture by its content and write it in place: of two visitors who get the same one at the same
moment, one could be sent half of it. Here each file has a name of its own and is whole before anybody hears of it.
"""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from segmentors.training_free.pictures import RGB, label_image, overlay

from .segmenting import Answer

Titled = list[tuple[str, str]]


class Files:
    """What the page has written for its visitors; safe in threads."""

    def __init__(self, folder: Path, budget: int) -> None:
        """
        Args:
            folder: where they go; only this class writes there.
            budget: bytes they may take together; the oldest go first.
        """
        self._folder, self._budget, self._lock = folder, budget, threading.Lock()
        self._written: deque[tuple[list[Path], int]] = deque()
        self._bytes = 0

    def picture(self, picture: Image.Image) -> str:
        """Write a picture as a photograph is best sent, and return its path."""
        file = self._new() / "picture.webp"
        picture.save(file, quality=90, method=1)
        return self._kept(file)[0]

    def titled(self, pictures: Sequence[tuple[Image.Image, str]]) -> Titled:
        """Write pictures to the pixel, and return the path and the title of each. A ``transparency`` is kept."""
        folder = self._new()
        files = [folder / f"{number}.png" for number in range(len(pictures))]
        for file, (picture, _) in zip(files, pictures, strict=True):
            picture.save(file, compress_level=1)
        return [(file, title) for file, (_, title) in zip(self._kept(*files), pictures, strict=True)]

    def results(self, picture: Image.Image, found: Answer, colours: Sequence[RGB]) -> list[str]:
        """Write ``labels.png``, ``overlay.png`` and ``scores.npy`` of an answer, and return their paths.

        ``labels.png`` is a palette image whose pixel values are the labels; ``scores.npy`` is float32 (K, H, W).
        """
        folder = self._new()
        label_image(found.labels, colours).save(folder / "labels.png")
        overlay(picture, found.labels, found.classes, colours).save(folder / "overlay.png", compress_level=1)
        np.save(folder / "scores.npy", found.scores.numpy())
        return self._kept(*(folder / name for name in ("labels.png", "overlay.png", "scores.npy")))

    def _new(self) -> Path:
        folder = self._folder / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder

    def _kept(self, *files: Path) -> list[str]:
        """Count new files, and remove the oldest beyond the budget. Old ones that are gone already are forgotten."""
        size = sum(file.stat().st_size for file in files)
        with self._lock:
            self._written.append(([*files], size))
            self._bytes += size
            while len(self._written) > 1:
                oldest, freed = self._written[0]
                if self._bytes <= self._budget and any(file.exists() for file in oldest):
                    break
                self._written.popleft()
                self._bytes -= freed
                for file in oldest:
                    file.unlink(missing_ok=True)
        return [*map(str, files)]
