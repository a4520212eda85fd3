"""What a figure means: which classes the model is told, how the background is decided, what counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """A way to evaluate.

    Attributes:
        about: what it does, in a sentence.
        own_classes: whether each image's prompt names the classes that the truth says are there, and no others.
        swept: whether the threshold of the background is the best of several on the very images evaluated.
        as_released: whether void pixels count as background, and classes that never occur as an IoU of 0.
    """

    about: str
    own_classes: bool
    swept: bool
    as_released: bool


PROTOCOLS = {
    "full-vocabulary": Protocol(
        "every class of the data set is prompted, and the threshold is fixed beforehand",
        own_classes=False, swept=False, as_released=False,
    ),
    "image-classes": Protocol(
        "each image's own classes, taken from the truth, are prompted, and the threshold is fixed beforehand",
        own_classes=True, swept=False, as_released=False,
    ),
    "as-released": Protocol(
        "as the program released with arXiv 2603.06178: each image's own classes, taken from the truth, are prompted; "
        "the threshold is the best of several on these very images; void counts as background, and a class that never "
        "occurs as an IoU of 0",
        own_classes=True, swept=True, as_released=True,
    ),
}  # fmt: skip

THRESHOLDS = tuple(round(-0.4 + 0.1 * step, 1) for step in range(9))
"""What ``swept`` tries: those of the released program for a background of "offset"."""


def protocol_named(name: str) -> Protocol:
    """Raises ValueError: there is no such protocol."""
    if name not in PROTOCOLS:
        raise ValueError(f"there is no protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
