"""Which activations are candidates at all, and the filter by kind that arXiv 2410.03558 publishes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..activations import Activation

PUBLISHED_SHARE = 63 / 279
"""Of SDXL's candidates, what the paper's filter leaves."""
INCREMENTS = ("res-increment", "ffn-inner", "self-v")
"""What a residual connection adds: severe high-frequency noise (appendix E.1)."""


def candidates(available: Sequence[Activation]) -> list[Activation]:
    """The activations to compare: 279 of the 612 of SDXL, as in arXiv 2410.03558.

    Spatial ones, without the ends of the model (``unet-...``) and without self-attention values. Of a transformer with
    many blocks, blocks 0, 1, 3, 5, ...: neighbours are alike.
    """
    return [a for a in available if a.kind == "spatial" and not a.id.startswith("unet-") and _sparse(a)]


def _sparse(activation: Activation) -> bool:
    block = re.search(r"(?:^|-)vit-block(\d+)-", activation.id)
    return activation.role != "self-v" and (block is None or int(block[1]) % 2 == 1 or block[1] == "0")


def place_filter(found: Sequence[Activation]) -> dict[str, str]:
    """What the paper's filter drops by its place in the model: rule 1 of ``published_filter``, without the kinds.

    Args:
        found: candidates, in forward order.

    Returns:
        id -> reason, for each candidate that is dropped. Nothing where there is no up-stage.
    """
    finest = _finest(found)
    return {a.id: reason for a in found if (reason := _misplaced(a, finest)) is not None}


def published_filter(found: Sequence[Activation]) -> dict[str, str]:
    """What the paper's filter drops, and why; for SDXL it leaves the 63 candidates of tables 4 and 5.

    1. Diffusion noise: only the early half of the up-stage is clean. Of the finest level nothing is kept, nor of its
       grid (the upsampler into it), except what rule 3 lets through.
    2. Increments of residual connections are noisy.
    3. Self-attention is local and dropped; but where noise returns its locality suppresses that noise, and so its keys
       are kept from the last repeat of the second finest level on.

    The rules are by name: for a UNet of any depth. A model without up-stage has only the kinds dropped.

    Args:
        found: candidates, in forward order.

    Returns:
        id -> reason, for each candidate that is dropped.
    """
    finest = _finest(found)
    return {a.id: reason for a in found if (reason := _misplaced(a, finest) or _unkind(a, found, finest)) is not None}


def _finest(found: Sequence[Activation]) -> int | None:
    """The last level of the up-stage."""
    return max((int(level[1]) for a in found if (level := re.match(r"up-level(\d+)-", a.id))), default=None)


def _misplaced(activation: Activation, finest: int | None) -> str | None:
    if finest is None:
        return None
    place = re.match(r"up-level(\d+)-", activation.id)
    if place is None:
        return "noise: not in the up-stage"
    level, role = int(place[1]), activation.role
    into_finest = level == finest - 1 and role == "upsampler-out"
    if (level == finest or into_finest) and role != "self-k":
        return "noise: the finest level, late in the up-stage"
    return None


def _unkind(activation: Activation, found: Sequence[Activation], finest: int | None) -> str | None:
    if activation.role in INCREMENTS:
        return "noise: an increment"
    late_key = activation.role == "self-k" and finest is not None and _late(activation, found, finest)
    return "locality: self-attention" if activation.role.startswith("self-") and not late_key else None


def _late(activation: Activation, found: Sequence[Activation], finest: int) -> bool:
    """From the last repeat of the second finest level on."""
    place = re.match(r"up-level(\d+)-(?:repeat(\d+))?", activation.id)
    if place is None:
        return False
    level = int(place[1])
    last = max((int(r[1]) for a in found if (r := re.match(rf"up-level{level}-repeat(\d+)", a.id))), default=0)
    return level == finest or (level == finest - 1 and place[2] == str(last))
