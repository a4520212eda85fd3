"""Fine-grained prompts: words of quality, a description by hand, or one by a captioning model."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from torch import Tensor

from .technique import Call, Technique

Captioner = Callable[[list[Image.Image]], Sequence[str]]
FIELDS = ("prompt", "caption")


@dataclass
class FineGrainedPrompt(Technique):
    """A more detailed prompt, which leaves the model less to imagine (arXiv 2410.06719).

    >>> FineGrainedPrompt("{prompt}, high quality, best quality, highly realistic, masterpiece")
    >>> FineGrainedPrompt("a photo of a tidy and well-designed bedroom")
    >>> FineGrainedPrompt("{prompt}. {caption}", captioner="Salesforce/blip-image-captioning-base")

    Args:
        text: takes the place of each prompt; ``{prompt}`` stands for that prompt, ``{caption}`` for the caption of its
            image. Write ``{{`` and ``}}`` for braces.
        captioner: describes images: a hub id or folder of an image-to-text model, loaded through transformers on first
            use, or a function from a list of PIL images to as many strings.

    Raises:
        ValueError: another field in ``text``; or a caption without a captioner, or the other way round.
    """

    text: str
    captioner: str | Captioner | None = None
    alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        used = {field for _, field, _, _ in string.Formatter().parse(self.text) if field is not None}
        if unknown := used - set(FIELDS):
            raise ValueError(f"{{{min(unknown)}}} is no field of a prompt; there are {{prompt}} and {{caption}}")
        if ("caption" in used) != (self.captioner is not None):
            raise ValueError("{caption} in the text and a captioner go together: give both, or neither")

    def asks(self, call: Call) -> Call:
        """The call with a prompt an image.

        Raises:
            ValueError: the captioner returns another number of captions than there are images.
        """
        if self.captioner is None and isinstance(call.prompts, str):
            return replace(call, prompts=self.text.format(prompt=call.prompts))
        captions = [""] * len(call.prompts) if self.captioner is None else self._captions(call.pixels)
        prompts = [call.prompts] * len(captions) if isinstance(call.prompts, str) else call.prompts
        if len(prompts) != len(captions):
            raise ValueError(f"{len(prompts)} prompts and {len(captions)} captions for the same images")
        filled = [self.text.format(prompt=p, caption=c) for p, c in zip(prompts, captions, strict=True)]
        return replace(call, prompts=filled)

    def _captions(self, pixels: Tensor) -> list[str]:
        arrays = ((pixels.permute(0, 2, 3, 1) + 1) * 127.5).round().cpu().numpy().astype(np.uint8)
        captions = [str(caption).strip() for caption in self._describe([Image.fromarray(a) for a in arrays])]
        if len(captions) != len(pixels):
            raise ValueError(f"the captioner returned {len(captions)} captions for {len(pixels)} images")
        return captions

    @cached_property
    def _describe(self) -> Captioner:
        return _transformers_captioner(self.captioner) if isinstance(self.captioner, str) else self.captioner  # type: ignore[return-value]


def _transformers_captioner(model: str) -> Captioner:
    """An image-to-text model of transformers, greedy, so that the same image has the same caption."""
    from transformers import pipeline

    pipe: Any = pipeline("image-text-to-text", model=model, model_kwargs={"use_safetensors": True})

    def describe(images: list[Image.Image]) -> list[str]:
        return [pipe(image, text="", max_new_tokens=128, do_sample=False)[0]["generated_text"] for image in images]

    return describe
