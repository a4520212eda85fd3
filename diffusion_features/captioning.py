"""Descriptions of images, by a captioning model of transformers or by any function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

Captioner: TypeAlias = Callable[[list[Image.Image]], Sequence[str]]
"""From images to as many texts."""

LONGEST = 128
"""Tokens of a caption."""


def captioner(model: str) -> Captioner:
    """A captioning model of transformers (its task "image-text-to-text", such as BLIP), loaded now.

    It is greedy, so that the same image has the same caption. Only safetensors are read.

    Args:
        model: a hub id or a folder.
    """
    from transformers import pipeline

    pipe: Any = pipeline("image-text-to-text", model=model, model_kwargs={"use_safetensors": True})
    options = {"max_new_tokens": LONGEST, "do_sample": False}

    def describe(images: list[Image.Image]) -> list[str]:
        return [pipe(image, text="", generate_kwargs=options)[0]["generated_text"] for image in images]

    return describe


def captions(describe: Captioner, pixels: Tensor) -> list[str]:
    """Captions, without space around them, of (B, 3, H, W) in [-1, 1].

    Raises:
        ValueError: the captioner returns another number of captions than there are images.
    """
    arrays = ((pixels.permute(0, 2, 3, 1) + 1) * 127.5).round().cpu().numpy().astype(np.uint8)
    found = [str(caption).strip() for caption in describe([Image.fromarray(array) for array in arrays])]
    if len(found) != len(pixels):
        raise ValueError(f"the captioner returned {len(found)} captions for {len(pixels)} images")
    return found
