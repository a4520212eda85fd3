"""The score of the background class (arXiv 2603.06178, and the choices of its released code)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Background: TypeAlias = Literal["offset", "exact", "max", "average", "threshold"]


def background_score(found: Tensor, how: Background, threshold: float) -> Tensor:
    """How much each pixel is background, from ``bg``, the map of what was named as background, and a threshold θ.

    - ``offset``: ``θ + bg``
    - ``exact``: ``bg``
    - ``max``: ``max(θ, bg)``
    - ``average``: ``(θ + bg) / 2``
    - ``threshold``: ``θ``

    Args:
        found: bg, (h, w) in [0, 1]; zero if nothing was named.

    Returns:
        (h, w), clamped to [0, 1].

    Raises:
        ValueError: ``how`` is none of these.
    """
    scores = {
        "offset": threshold + found,
        "exact": found,
        "max": found.clamp(min=threshold),
        "average": (threshold + found) / 2,
        "threshold": torch.full_like(found, threshold),
    }
    if how not in scores:
        raise ValueError(f"a background is {', '.join(scores)}, not {how!r}")
    return scores[how].clamp(0, 1)


def check_background(names: Iterable[str], behind: Iterable[str], how: Background, threshold: float) -> None:
    """Refuse a background that means two things, or nothing.

    With ``exact`` and no words the score is 0 everywhere, for a caller who adds a threshold of their own.

    Args:
        names: of the classes.
        behind: what was named as background.
        how, threshold: as of ``background_score``.

    Raises:
        ValueError: a class is called "background" too; or nothing was named, and there is no threshold either.
    """
    if "background" in (name.lower() for name in names):
        raise ValueError('"background" is nothing to look for, and the background gets a class of that name anyway: '
                         "leave it out of the classes")  # fmt: skip
    constant = how == "threshold" or (how != "exact" and not any(behind))
    if constant and threshold <= 0:
        other = "" if how == "threshold" else ", or name what may be there"
        raise ValueError(
            f"this background scores its threshold, which is {threshold:g}, so that it would never be found: "
            f"give a threshold between 0 and 1{other}"
        )
