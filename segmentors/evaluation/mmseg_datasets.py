"""Public data sets, read by the dataset classes of mmsegmentation from the layout it documents."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffusion_features.images import read_image

from .labelled import Dataset, Sample

THINGS = 80
"""The first so many classes of COCO-Stuff are things."""
WORDS = {
    "diningtable": "dining table",
    "playingfield": "playing field",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
    "waterdrops": "water drops",
}
"""Names that run words together, and these words."""
IGNORE = 255


class _Place(NamedTuple):
    """Where mmsegmentation expects a data set under its root; ``{}`` is the split."""

    kind: str
    images: str
    labels: str
    listed: str = ""


_PLACES = {
    "voc": _Place("PascalVOCDataset", "JPEGImages", "SegmentationClass", "ImageSets/Segmentation/{}.txt"),
    "context": _Place(
        "PascalContextDataset", "JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext/{}.txt"
    ),
    "coco-object": _Place("COCOStuffDataset", "images/{}2017", "annotations/{}2017"),
    "coco-stuff": _Place("COCOStuffDataset", "images/{}2017", "annotations/{}2017"),
    "cityscapes": _Place("CityscapesDataset", "leftImg8bit/{}", "gtFine/{}"),
    "ade20k": _Place("ADE20KDataset", "images/{}", "annotations/{}"),
}


def open_mmseg(name: str, split: str, root: Path) -> Dataset:
    """A data set of mmsegmentation; see ``open_dataset``.

    ``coco-object`` is COCO-Stuff with all that is no thing as background.
    """
    if split not in ("train", "val"):
        raise ValueError(f"{name} has no split {split!r}; it has train, val")
    try:
        datasets = importlib.import_module("mmseg.datasets")
        transforms = importlib.import_module("mmseg.datasets.transforms")
    except ImportError as error:
        raise ImportError(
            f"{name} is read by mmsegmentation, which is not installed ({error}): "
            "pip install 'diffusion-features[mmseg]'"
        ) from error
    place = _PLACES[name]
    folder = {"train": "training", "val": "validation"}[split] if name == "ade20k" else split
    parts = [part.format(folder) for part in (place.images, place.labels, place.listed)]
    for part in parts:
        if not (root / part).exists():
            raise FileNotFoundError(f"{root} is not a folder of {name} as mmsegmentation documents it: no {part}")
    listed = dict(ann_file=parts[2]) if parts[2] else {}
    found: Any = getattr(datasets, place.kind)(
        data_root=str(root), data_prefix=dict(img_path=parts[0], seg_map_path=parts[1]), pipeline=[], **listed
    )
    load = transforms.LoadAnnotations()
    objects = name == "coco-object"

    def samples(count: int) -> Iterator[Sample]:
        for index in range(count):
            info = found.get_data_info(index)
            truth = torch.from_numpy(load(dict(info, seg_fields=[]))["gt_seg_map"]).long()
            yield Sample(read_image(info["img_path"]), _things(truth) if objects else truth)

    names = tuple(in_words(one) for one in found.metainfo["classes"])
    classes = ("background", *names[:THINGS]) if objects else names
    return Dataset(name, split, classes, IGNORE, len(found), samples)


def _things(truth: torch.Tensor) -> torch.Tensor:
    return torch.where(truth < THINGS, truth + 1, torch.where(truth == IGNORE, IGNORE, 0))


def in_words(name: str) -> str:
    """A class name of a data set as people write it: ``wall-brick`` is "wall brick", ``sky-other`` "sky"."""
    words = name.replace("-", " ").replace("_", " ").split()
    telling = [word for word in words if word not in ("other", "stuff")]
    return WORDS.get(name.strip(), " ".join(telling or words))
