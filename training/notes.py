"""Where words were found in the training scenes, as ``teacher.py`` notes it and trainings with ``--taught`` read it."""

from __future__ import annotations

from pathlib import Path

import torch
from scenes import RUNS
from torch import Tensor

FOLDER = RUNS / "shown"
#: Captions of each scene that are taught, and words of a caption that tell what is seen, at most.
CAPTIONS, WORDS = 2, 20


def shown(folder: Path = FOLDER) -> Tensor:
    """Return what was noted, uint8 [scenes, CAPTIONS, WORDS, 16, 16], 255 for all attention.

    Raises:
        SystemExit: nothing was.
    """
    parts = sorted(folder.glob("*.pt"))
    if not parts:
        raise SystemExit(f"{folder} is empty: run training/teacher.py first.")
    return torch.cat([torch.load(part)["shown"] for part in parts])


def at_tokens(shown: Tensor, tells: Tensor) -> Tensor:
    """Return ``shown``, uint8 [N, WORDS, h, w], as attention to tokens of which some are telling, [N, cells, tokens].

    Shares are squared, so that a learner's errors turn fewer of them round, and sum to 1 again.
    """
    cells = shares(shown.flatten(2).float().div(255).square().transpose(1, 2)).transpose(1, 2)
    place = (tells.cumsum(dim=1) - 1).clamp(min=0)
    found = cells.gather(1, place[..., None].expand(-1, -1, cells.shape[2]))
    return (found * tells[..., None]).transpose(1, 2)


def shares(maps: Tensor) -> Tensor:
    """Return maps [N, cells, words] that sum to 1 in each cell."""
    return maps / maps.sum(dim=2, keepdim=True).clamp(min=1e-8)
