"""What every data set to evaluate on is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image
from torch import Tensor


class Sample(NamedTuple):
    """An image and its labels, int64 (H, W)."""

    image: Image.Image
    truth: Tensor


@dataclass(frozen=True)
class Dataset:
    """Labelled images.

    Attributes:
        name, split: what it is.
        classes: name of label i; "background" first, if there is one.
        ignore: the label of pixels that do not count, if there is one.
        length: how many images there are.
        samples: the first so many images, one by one.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    ignore: int | None
    length: int
    samples: Callable[[int], Iterator[Sample]]

    @property
    def has_background(self) -> bool:
        return self.classes[0] == "background"
