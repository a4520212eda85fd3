"""Names, label numbers, colours and seed ranges of the drawn world."""

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

#: Three disjoint seed ranges; a seed below ``VALIDATION_SEED`` may have been trained on.
TRAIN_SEED: Final[int] = 0
VALIDATION_SEED: Final[int] = 10_000_000
TEST_SEED: Final[int] = 20_000_000


def label(name: str) -> int:
    """Return the number that stands for class ``name`` in a semantic map."""
    return CLASSES.index(name)
