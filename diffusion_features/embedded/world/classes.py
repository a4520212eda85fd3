"""Names, label numbers, colours, styles and splits of the drawn world."""

from __future__ import annotations

from typing import Final

BACKGROUNDS: Final[tuple[str, ...]] = ("sky", "grass", "sea", "sand", "snow", "road")
OBJECTS: Final[tuple[str, ...]] = (
    "car", "house", "tree", "cat", "fish", "bird", "boat", "apple", "mushroom", "cup", "umbrella", "balloon",
)  # fmt: skip
#: Label ``i`` of a semantic map is ``CLASSES[i]``: the backgrounds first, then the objects.
CLASSES: Final[tuple[str, ...]] = BACKGROUNDS + OBJECTS

RGB = tuple[int, int, int]

COLOURS: Final[dict[str, RGB]] = {
    "red": (214, 45, 48),
    "orange": (240, 133, 36),
    "yellow": (246, 203, 54),
    "green": (62, 160, 72),
    "blue": (50, 104, 206),
    "purple": (132, 74, 178),
    "pink": (240, 128, 170),
    "white": (240, 238, 232),
}

#: Disjoint seed ranges; a seed below ``VALIDATION_SEED`` may have been trained on.
TRAIN_SEED: Final[int] = 0
VALIDATION_SEED: Final[int] = 10_000_000
TEST_SEED: Final[int] = 20_000_000
HELD_OUT_SEED: Final[int] = 30_000_000

#: Objects that never share a scene, except in held-out ones, which all have such a pair.
HELD_OUT_PAIRS: Final[tuple[tuple[str, str], ...]] = (
    ("car", "fish"), ("cat", "boat"), ("apple", "umbrella"), ("house", "balloon"), ("tree", "cup"),
    ("bird", "mushroom"),
)  # fmt: skip
#: Styles of ordinary scenes, with their shares. Those of held-out scenes are the others.
ORDINARY_STYLES: Final[dict[str, float]] = {"clean": 0.85, "photo": 0.15}
HELD_OUT_STYLES: Final[tuple[str, ...]] = ("night", "sketch")
STYLES: Final[tuple[str, ...]] = (*ORDINARY_STYLES, *HELD_OUT_STYLES)


def label(name: str) -> int:
    """Return the number that stands for class ``name`` in a semantic map."""
    return CLASSES.index(name)
