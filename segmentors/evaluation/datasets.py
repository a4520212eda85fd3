"""Labelled images to evaluate on, by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

import torch

from diffusion_features.embedded import CLASSES, OBJECTS, label
from diffusion_features.embedded.dataset import LIMIT, SPLITS, scenes

from .labelled import Dataset, Sample


def _embedded(split: str) -> Dataset:
    """The drawn world that ships with this package; every pixel is of one of its classes."""

    def samples(count: int) -> Iterator[Sample]:
        return (Sample(s.image, torch.from_numpy(s.semantic).long()) for s in scenes(split, count))

    return Dataset("embedded", split, CLASSES, None, LIMIT, samples)


def _embedded_objects(split: str) -> Dataset:
    """The same scenes, whose objects alone are classes."""
    table = torch.zeros(len(CLASSES), dtype=torch.int64)
    for number, name in enumerate(OBJECTS, start=1):
        table[label(name)] = number

    def samples(count: int) -> Iterator[Sample]:
        return (Sample(s.image, table[torch.from_numpy(s.semantic).long()]) for s in scenes(split, count))

    return Dataset("embedded-objects", split, ("background", *OBJECTS), None, LIMIT, samples)


_EMBEDDED = {"embedded": _embedded, "embedded-objects": _embedded_objects}
MMSEG = ("voc", "context", "coco-object", "coco-stuff", "cityscapes", "ade20k")
DATASETS = (*_EMBEDDED, *MMSEG)


def open_dataset(name: str, split: str | None = None, root: str | Path | None = None) -> Dataset:
    """A data set by name.

    Args:
        name: ``embedded`` (drawn scenes, shipped with the package), ``embedded-objects`` (the same, but all that is no
            object is background), or one read by mmsegmentation from ``root``: ``voc``, ``context``, ``coco-object``,
            ``coco-stuff``, ``cityscapes``, ``ade20k``.
        split: of the embedded ones train, validation, test (the default) or held-out; of the others train or val (the
            default).
        root: the folder of a data set, in the layout that mmsegmentation documents.

    Raises:
        ValueError: there is no such data set or split, or it needs a root.
        ImportError: it needs mmsegmentation, which is not installed.
        FileNotFoundError: the root does not have the files of the data set.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no data set {name!r}{hint} There are {', '.join(DATASETS)}")
    if name in _EMBEDDED:
        split = split or "test"
        if split not in SPLITS:
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(SPLITS)}")
        return _EMBEDDED[name](split)
    if root is None:
        raise ValueError(f"{name} is not shipped with this package: say in which folder it is, as root")
    from .mmseg_datasets import open_mmseg

    return open_mmseg(name, split or "val", Path(root))
