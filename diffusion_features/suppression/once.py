"""What several calls about the same images have in common, made once: captions, conditions, embeddings."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass
class _Memory:
    """Results about the images that were asked for first."""

    pixels: Tensor | None = None
    found: dict[Hashable, Any] = field(default_factory=dict)


_MEMORY: ContextVar[_Memory | None] = ContextVar("memory", default=None)


@contextmanager
def remembering() -> Iterator[None]:
    """Inside, ``once`` makes things once. Inside another such context it changes nothing."""
    if _MEMORY.get() is not None:
        yield
        return
    token = _MEMORY.set(_Memory())
    try:
        yield
    finally:
        _MEMORY.reset(token)


def once(pixels: Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` returns; inside ``remembering``, the same object whenever images and key are the same.

    Args:
        pixels: the images that it is about, (B, 3, H, W).
        key: what makes it: all that the result depends on besides the images.
    """
    memory = _MEMORY.get()
    if memory is None:
        return make()
    if memory.pixels is None:
        memory.pixels = pixels
    if memory.pixels is not pixels and not (memory.pixels.shape == pixels.shape and torch.equal(memory.pixels, pixels)):
        return make()
    if key not in memory.found:
        memory.found[key] = make()
    found: T = memory.found[key]
    return found
