"""The styles of a scene: what happens to a clean rendering, at its final size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter

Random = np.random.Generator


def _far(height: int, width: int) -> NDArray[np.float32]:
    """Distance from the middle, 0 there and 1 in the corners: float32 [height, width, 1]."""
    y, x = np.linspace(-1, 1, height, dtype=np.float32), np.linspace(-1, 1, width, dtype=np.float32)
    return np.asarray(np.hypot(y[:, None], x[None, :])[:, :, None] / 2**0.5, np.float32)


def clean(image: Image.Image, rng: Random) -> Image.Image:
    """As drawn."""
    return image


def photo(image: Image.Image, rng: Random) -> Image.Image:
    """A cheap camera: soft focus, a colour cast, falling light towards the corners, grain."""
    soft = image.filter(ImageFilter.BoxBlur(max(image.size) / 220 * rng.uniform(0.3, 0.8)))
    values = np.asarray(soft, np.float32) * rng.uniform(0.85, 1.1, 3).astype(np.float32)
    values *= 1 - np.float32(rng.uniform(0.2, 0.5)) * _far(*values.shape[:2]) ** 2
    values += rng.standard_normal((*values.shape[:2], 1), dtype=np.float32) * np.float32(rng.uniform(5, 11))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def night(image: Image.Image, rng: Random) -> Image.Image:
    """Moonlight: dark, blue, little saturation, bright things glow."""
    values = np.asarray(image, np.float32) / 255
    grey = values.mean(axis=2, keepdims=True)
    values = (grey + (values - grey) * 0.45) ** np.float32(1.5) * np.float32(rng.uniform(0.4, 0.55))
    values = values * np.array([0.6, 0.75, 1.25], np.float32) + np.array([0.02, 0.03, 0.07], np.float32)
    dark = Image.fromarray(np.clip(values * 255, 0, 255).astype(np.uint8))
    lamps = image.point(lambda v: max(0, v - 225) * 5).filter(ImageFilter.BoxBlur(max(image.size) / 90))
    return ImageChops.screen(dark, lamps.point(lambda v: v // 3))


def sketch(image: Image.Image, rng: Random) -> Image.Image:
    """Pencil on paper: the lines of the drawing, a trace of its tones, no colour."""
    grey = image.convert("L")
    blurred = grey.filter(ImageFilter.BoxBlur(max(image.size) / 70))
    values, around = np.asarray(grey, np.float32), np.asarray(blurred, np.float32)
    lines = np.clip(values / np.maximum(around, 1), 0, 1) ** np.float32(3.0)
    tone = 0.78 + 0.22 * values / 255
    grain = 1 + 0.05 * rng.standard_normal(values.shape, dtype=np.float32)
    paper = np.array([250, 246, 236], np.float32)
    return Image.fromarray(np.clip((lines * tone * grain)[:, :, None] * paper, 0, 255).astype(np.uint8))


STYLE: Final[dict[str, Callable[[Image.Image, Random], Image.Image]]] = {
    "clean": clean, "photo": photo, "night": night, "sketch": sketch,
}  # fmt: skip
