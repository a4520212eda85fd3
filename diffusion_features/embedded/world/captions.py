"""Captions of a scene, in the styles that people use for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

Random = np.random.Generator
#: Openings that say nothing about the content, by style; the last of them ("") is any other style's.
MEDIA: Final[dict[str, tuple[str, ...]]] = {
    "photo": ("a photo of", "a grainy photo of", "an old photo of", "a picture of"),
    "night": ("a night scene with", "a picture at night of"),
    "sketch": ("a pencil sketch of", "a sketch of"),
    "": (
        "a photo of", "a drawing of", "an image of", "a picture of", "high quality drawing of",
        "a detailed painting of", "a beautiful picture of", "a bright scene with", "a colorful illustration of",
    ),
}  # fmt: skip
#: Other words for a class, used once in ten times.
SYNONYMS: Final[dict[str, tuple[str, ...]]] = {
    "car": ("automobile",), "house": ("home", "cottage"), "cat": ("kitten",), "boat": ("sailboat", "ship"),
    "mushroom": ("toadstool",), "cup": ("mug",), "umbrella": ("parasol",), "sea": ("ocean", "water"),
    "grass": ("meadow", "lawn"), "sand": ("beach",), "road": ("street",),
}  # fmt: skip
QUALITY: Final[tuple[str, ...]] = ("high quality", "detailed", "beautiful", "soft light", "colorful", "sharp")
JOIN: Final[dict[str, tuple[str, ...]]] = {
    "sky": ("under {upper}, on {lower}", "on {lower} under {upper}", "with {lower} and {upper}"),
    "": ("on {lower} near {upper}", "with {lower} in front of {upper}", "on {lower}, {upper} in the background"),
}


def _word(name: str, rng: Random) -> str:
    """Return a class's name, or now and then a synonym."""
    others = SYNONYMS.get(name)
    return others[int(rng.integers(len(others)))] if others and rng.random() < 0.1 else name


@dataclass(frozen=True)
class Thing:
    """One object as its caption needs it: a class, a colour word and a size word (may be empty)."""

    name: str
    colour: str
    size: str

    def words(self, rng: Random, plain: bool) -> str:
        """Return a noun phrase such as "a small red car"."""
        adjectives = [] if plain else [self.size] if self.size and rng.random() < 0.5 else []
        if rng.random() < (0.3 if plain else 0.85):
            adjectives.append(self.colour)
        phrase = " ".join([*adjectives, _word(self.name, rng)])
        return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


@dataclass(frozen=True)
class Place:
    """One background: a class and the adjective of its look."""

    name: str
    look: str

    def words(self, rng: Random) -> str:
        """Return a noun phrase such as "a cloudy sky" or "green grass"."""
        adjective = f"{self.look} " if rng.random() < 0.6 else ""
        article = ("a " if adjective else "the ") if self.name in ("sky", "sea", "road") else ""
        return f"{article}{adjective}{_word(self.name, rng)}"


def _series(items: Sequence[str], last: str = "and") -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def _listing(things: Sequence[Thing], places: Sequence[Place], rng: Random) -> str:
    """Return a bare list of class names in random order, some with a colour."""
    names = [f"{t.colour} {t.name}" if rng.random() < 0.3 else t.name for t in things] + [p.name for p in places]
    return ", ".join(names[i] for i in rng.permutation(len(names)))


def caption(things: Sequence[Thing], upper: Place, lower: Place, rng: Random, style: str = "clean") -> str:
    """Describe a scene. Every object is named; both backgrounds are, in about four captions of five."""
    placed = rng.random() < 0.82
    kind = rng.random()
    order = [things[i] for i in rng.permutation(len(things))]
    if kind < 0.15:
        return _listing(order, (upper, lower) if placed else (), rng)
    if kind < 0.3:
        names = [t.name for t in order] + ([upper.name, lower.name] if placed else [])
        return "a photo of " + " and ".join(names[i] for i in rng.permutation(len(names)))
    text = _series([t.words(rng, plain=kind < 0.4) for t in order])
    if placed:
        joins = JOIN["sky" if upper.name == "sky" else ""]
        text += " " + joins[int(rng.integers(len(joins)))].format(upper=upper.words(rng), lower=lower.words(rng))
    if kind < 0.8:
        openings = MEDIA.get(style, MEDIA[""])
        text = f"{openings[int(rng.integers(len(openings)))]} {text}"
    return f"{text}, {QUALITY[int(rng.integers(len(QUALITY)))]}" if rng.random() < 0.15 else text
