"""Fine-grained prompts: words of quality, a description by hand, or one by a captioning model."""

from __future__ import annotations

import string
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from ..captioning import Captioner, captioner, captions
from .once import once
from .technique import Call, Technique

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
        described = [""] * len(call.prompts) if self.captioner is None else self._captions(call)
        prompts = [call.prompts] * len(described) if isinstance(call.prompts, str) else call.prompts
        if len(prompts) != len(described):
            raise ValueError(f"{len(prompts)} prompts and {len(described)} captions for the same images")
        filled = [self.text.format(prompt=p, caption=c) for p, c in zip(prompts, described, strict=True)]
        return replace(call, prompts=filled)

    def _captions(self, call: Call) -> list[str]:
        return once(call.pixels, ("caption", self.captioner), lambda: captions(self._describe, call.pixels))

    @cached_property
    def _describe(self) -> Captioner:
        return captioner(self.captioner) if isinstance(self.captioner, str) else self.captioner  # type: ignore[return-value]
