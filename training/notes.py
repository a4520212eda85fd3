"""Where words were found in the training scenes, as ``teacher.py`` notes it and trainings with ``--taught`` read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from scenes import RUNS
from torch import Generator, Tensor

FOLDER = RUNS / "shown"
#: Captions of each scene that are taught, and words of a caption that tell what is seen, at most.
CAPTIONS, WORDS = 2, 20


def lessons(
    scenes: int, tells: Tensor, rest: int, padding: int
) -> Callable[[tuple[Tensor, Tensor], Tensor, Generator], tuple[Tensor, Tensor]]:
    """Return a function from drawn captions, which of which scenes and their ids, to ``hidden`` ones.

    Args:
        scenes: how many must be noted.
        tells: bool [vocabulary], which tokens tell what is seen.
        rest, padding: see ``hidden``.
    """
    notes = shown(scenes)

    def lesson(which: tuple[Tensor, Tensor], ids: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        return hidden(ids, at_tokens(notes[which], tells[ids]), tells[ids], rest, padding, generator)

    return lesson


def shown(scenes: int, folder: Path = FOLDER) -> Tensor:
    """Return what was noted, uint8 [scenes, CAPTIONS, WORDS, 16, 16], 255 for all attention.

    Raises:
        SystemExit: not all scenes are noted.
    """
    parts = [torch.load(part)["shown"] for part in sorted(folder.glob("*.pt"))]
    if (noted := sum(map(len, parts))) != scenes:
        raise SystemExit(f"{noted} of {scenes} scenes are noted in {folder}: run training/teacher.py to its end.")
    return torch.cat(parts)


def at_tokens(shown: Tensor, tells: Tensor) -> Tensor:
    """Return ``shown``, uint8 [N, WORDS, h, w], as attention to tokens of which some are telling, [N, cells, tokens].

    Shares are squared and made to sum to 1 again: the word that is ahead gets further ahead, so that small errors of a
    learner change fewer labels.
    """
    cells = shares(shown.flatten(2).float().div(255).square().transpose(1, 2)).transpose(1, 2)
    place = (tells.cumsum(dim=1) - 1).clamp(min=0)
    found = cells.gather(1, place[..., None].expand(-1, -1, cells.shape[2]))
    return (found * tells[..., None]).transpose(1, 2)


def shares(maps: Tensor) -> Tensor:
    """Return maps [N, cells, words] that sum to 1 in each cell."""
    return maps / maps.sum(dim=2, keepdim=True).clamp(min=1e-8)


def hidden(
    ids: Tensor, shown: Tensor, tells: Tensor, rest: int, padding: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Hide some phrases of half of the captions; what was theirs then belongs to the token where attention rests.

    So a learner finds what is named also where a prompt does not name all that is there. Without this, each cell would
    learn to divide its attention among whatever words there are, and a word alone would be found everywhere.

    Args:
        ids: int64 [N, tokens], padded at the end.
        shown: [N, cells, tokens], of ``at_tokens``.
        tells: bool [N, tokens]. Those beside one another are a phrase, "red car".
        rest: id of the token where attention rests that finds no word; each caption has one.
        padding: id of padding.

    Returns:
        ids without the phrases, those behind them moved up, and shown likewise.
    """
    number = (tells & ~F.pad(tells, (1, 0))[:, :-1]).cumsum(dim=1)
    kept = (2 * torch.rand(len(ids), 1, generator=generator)).clamp(max=1)  # the share of a caption's phrases
    drop = tells & (torch.rand(ids.shape, generator=generator).gather(1, number) >= kept)
    lost = (shown * drop[:, None]).sum(dim=2, keepdim=True)
    shown = shown * ~drop[:, None] + lost * (ids == rest)[:, None]
    place = drop.int().argsort(dim=1, stable=True)
    return ids.masked_fill(drop, padding).gather(1, place), shown.gather(2, place[:, None].expand_as(shown))
