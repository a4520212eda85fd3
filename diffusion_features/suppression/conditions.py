"""Condition images for ControlNets: what of an image the model is told without noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Condition: TypeAlias = Callable[[Tensor], Tensor]
"""(B, 3, H, W) in [-1, 1] → (B, 3, H, W) in [0, 1], of the same images."""

DEPTH_MODEL = "Intel/dpt-large"


def canny(images: Tensor, *, low: float = 70.0, high: float = 140.0, sigma: float = 1.0) -> Tensor:
    """Canny edges of each image, white on black: what the published canny ControlNets are given.

    The defaults answer to about the same steps in brightness (25 and 50 of 255) as 100 and 200 do in OpenCV, which
    does not blur first.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        low, high: thresholds of the hysteresis, on the Sobel magnitude of grey values from 0 to 255.
        sigma: of the Gaussian blur before, in pixels.

    Returns:
        (B, 3, H, W), 0 or 1, in the dtype and on the device of ``images``.
    """
    from skimage.feature import canny as find_edges  # slow to import, and needed here alone

    grey = ((images.detach().float().mean(1) + 1) * 127.5).cpu().numpy()
    edges = np.stack([find_edges(g, sigma=sigma, low_threshold=low, high_threshold=high) for g in grey])
    return torch.from_numpy(edges).to(images)[:, None].expand(-1, 3, -1, -1)


def depth(images: Tensor, *, model: str = DEPTH_MODEL) -> Tensor:
    """Estimated depth of each image, near white and far black, each stretched to [0, 1].

    Args:
        images: (B, 3, H, W) in [-1, 1].
        model: hub id or folder of a depth estimator of transformers that gives inverse depth, as DPT (MiDaS) and
            Depth Anything do; loaded on first use, on the CPU.

    Returns:
        (B, 3, H, W) in [0, 1], in the dtype and on the device of ``images``; 0 throughout if the depth is the same
        everywhere.
    """
    estimator = _depth_estimator(model)
    arrays = ((images.detach().float().permute(0, 2, 3, 1) + 1) * 127.5).round().cpu().numpy().astype(np.uint8)
    found = torch.stack([estimator(Image.fromarray(a))["predicted_depth"].float() for a in arrays])
    low, high = found.amin((1, 2), keepdim=True), found.amax((1, 2), keepdim=True)
    near = (found - low) / (high - low).clamp_min(torch.finfo(found.dtype).tiny)
    return near.to(images)[:, None].expand(-1, 3, -1, -1)


@cache
def _depth_estimator(model: str) -> Any:
    from transformers import pipeline

    return pipeline("depth-estimation", model=model, model_kwargs={"use_safetensors": True})


NAMED: dict[str, Condition] = {"canny": canny, "depth": depth}


def precomputed(given: Any, batch: int, size: tuple[int, int]) -> Tensor:
    """Condition images that the caller made.

    Args:
        given: a PIL image or a list of them; or a tensor (3, H, W) or (B, 3, H, W) in [0, 1]. One serves all images.
        batch, size: number, and (height, width), of the images.

    Returns:
        float32 (B, 3, H, W) in [0, 1].

    Raises:
        TypeError: something else.
        ValueError: another number, size or range.
    """
    if isinstance(given, Tensor):
        found = (given if given.ndim == 4 else given[None]).float()
    else:
        several = given if isinstance(given, Sequence) else [given]
        if not several or not all(isinstance(image, Image.Image) for image in several):
            allowed = ", ".join(map(repr, NAMED))
            raise TypeError(f"a condition is {allowed}, a function, a tensor or PIL images, not {given!r}")
        sizes = sorted({(image.height, image.width) for image in several})
        if len(sizes) > 1:
            raise ValueError(f"the condition images differ in size (height x width): {sizes}")
        found = torch.stack([torch.from_numpy(np.array(i.convert("RGB"))).permute(2, 0, 1) for i in several]) / 255
    return checked(found, batch, size)


def checked(found: Tensor, batch: int, size: tuple[int, int]) -> Tensor:
    """``found`` as a condition of ``batch`` images, (B, 3, H, W).

    Raises:
        ValueError: it has another shape, number, size or range than a condition.
    """
    if found.ndim != 4 or found.shape[1] != 3:
        raise ValueError(f"condition images must have shape (B, 3, H, W), not {tuple(found.shape)}")
    if tuple(found.shape[-2:]) != size:
        have, want = "x".join(map(str, found.shape[-2:])), "x".join(map(str, size))
        raise ValueError(f"the condition is {have} (height x width), but the image is {want}: make it of the same size")
    if len(found) not in (1, batch):
        raise ValueError(f"{len(found)} condition images for {batch} images: give one, or one an image")
    if found.min() < 0 or found.max() > 1:
        raise ValueError(
            f"conditions must be in [0, 1]; these go from {float(found.min()):g} to {float(found.max()):g}"
        )
    return found.expand(batch, -1, -1, -1)
