"""Pairs of images with corresponding keypoints, from the drawn world and from SPair-71k."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPLITS = ("trn", "val", "test")


@dataclass(frozen=True)
class Pair:
    """Two images of one class, and where the same keypoints are in both.

    Points are (x, y) in pixels from the left and top edges, boxes (left, top, right, bottom), sizes (height, width).
    Point n of the source corresponds to point n of the target.
    """

    category: str
    source: Path
    target: Path
    source_points: tuple[tuple[float, float], ...]
    target_points: tuple[tuple[float, float], ...]
    source_box: tuple[float, float, float, float]
    target_box: tuple[float, float, float, float]
    source_size: tuple[int, int]
    target_size: tuple[int, int]


def embedded_pairs(folder: str | os.PathLike[str], split: str = "test") -> list[Pair]:
    """The pairs that ``diffusion-features scenes`` wrote with a split of the drawn world.

    Raises:
        FileNotFoundError: the folder has no such split; the message says how to make it.
    """
    root = Path(folder)
    index, listed = root / f"{split}.json", root / f"{split}_pairs.json"
    if not (index.is_file() and listed.is_file()):
        raise FileNotFoundError(
            f"{root} has no {listed.name}: make it by 'diffusion-features scenes {root} --split {split}'"
        )
    width, height = json.loads(index.read_text(encoding="utf-8"))["size"]
    images = root / "img_dir" / split
    return [
        Pair(
            found["class"], images / found["source"], images / found["target"],
            _points(found["source_points"]), _points(found["target_points"]),
            _box(found["source_box"]), _box(found["target_box"]), (height, width), (height, width),
        )
        for found in json.loads(listed.read_text(encoding="utf-8"))
    ]  # fmt: skip


def spair_pairs(root: str | os.PathLike[str], split: str = "test") -> list[Pair]:
    """The pairs of SPair-71k (arXiv 1908.10543), in the order of their file names.

    Its keypoints name pixels; here they are the centres of these, half a pixel further.

    Args:
        root: the folder of the data set, with ``PairAnnotation`` and ``JPEGImages``.
        split: ``trn`` (53,340 pairs), ``val`` (5,384) or ``test`` (12,234).

    Raises:
        ValueError: there is no such split, or a pair's file is not as the data set writes it.
        FileNotFoundError: the folder is not that of the data set.
    """
    if split not in SPLITS:
        near = difflib.get_close_matches({"train": "trn"}.get(split, split), SPLITS, n=1, cutoff=0)
        raise ValueError(f"SPair-71k has no split {split!r}, but {', '.join(SPLITS)}; did you mean {near[0]}?")
    folder = Path(root) / "PairAnnotation" / split
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder} has no pairs: {root} must be the folder of SPair-71k")
    return [_spair_pair(Path(root), file) for file in files]


def _spair_pair(root: Path, file: Path) -> Pair:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        images = root / "JPEGImages" / found["category"]
        source_points, target_points = (_points(found[key], 0.5) for key in ("src_kps", "trg_kps"))
        (source_width, source_height), (width, height) = (found[key][:2] for key in ("src_imsize", "trg_imsize"))
        pair = Pair(
            found["category"], images / found["src_imname"], images / found["trg_imname"],
            source_points, target_points, _box(found["src_bndbox"]), _box(found["trg_bndbox"]),
            (source_height, source_width), (height, width),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no pair of SPair-71k: {error!r}") from error
    if len(source_points) != len(target_points) or not source_points:
        raise ValueError(
            f"{file} has {len(source_points)} keypoints in its source and {len(target_points)} in its target"
        )
    return pair


def _points(values: Sequence[Sequence[float]], shift: float = 0.0) -> tuple[tuple[float, float], ...]:
    return tuple((float(x) + shift, float(y) + shift) for x, y in values)


def _box(values: Sequence[float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = values
    return float(left), float(top), float(right), float(bottom)
