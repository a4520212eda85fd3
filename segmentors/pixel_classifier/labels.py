"""Label maps by image: of the drawn world's parts, and of Horse-21, Bedroom-28 and their kin."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from .training import IGNORED

FEWEST = 20
"""A class with fewer pixels than this in a training image is ignored there (arXiv 2112.03126)."""


def drawn_parts(folder: str | os.PathLike[str], split: str) -> dict[str, np.ndarray]:
    """Parts of objects in the scenes that ``diffusion-features scenes`` wrote.

    Returns:
        File name (its key in a store made from ``img_dir/<split>``) -> uint8 (H, W); 0 is background, value i the part
        ``PARTS[i - 1]``.

    Raises:
        FileNotFoundError: the folder has no such split; the message says how to make it.
    """
    index = Path(folder) / f"{split}.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} has no {index.name}: make it by 'diffusion-features scenes {folder} --split {split}'"
        )
    files = [record["file"] for record in json.loads(index.read_text(encoding="utf-8"))["images"]]
    return {name: np.asarray(Image.open(Path(folder) / "parts_dir" / split / name)) for name in files}


def masks(folder: str | os.PathLike[str], keys: Iterable[str]) -> dict[str, np.ndarray]:
    """Label maps in a folder, named as the images: ``more/dog.npy`` or ``more/dog.png`` for ``more/dog.jpg``.

    Args:
        folder: a PNG must have one class number a pixel (mode L or P), an array labels (H, W) from 0 to 255.
        keys: names of images, such as those of a store; one without a label map is left out.

    Returns:
        Name of the image -> uint8 (H, W), 255 where nothing is known.

    Raises:
        FileNotFoundError: no image has a label map.
        ValueError: a file is no label map.
    """
    names = [*keys]
    files = {key: file for key in names if (file := _mask_file(Path(folder) / key)) is not None}
    if not files:
        example = f", such as {Path(folder) / names[0]} with the suffix .png or .npy" if names else ""
        raise FileNotFoundError(f"{folder} has no label map for any of the {len(names)} images{example}")
    return {key: _array(file) if file.suffix == ".npy" else _picture(file) for key, file in files.items()}


def _mask_file(image: Path) -> Path | None:
    """An array before a picture: beside ``0.png`` of Horse-21 stands ``0.npy``."""
    return next((file for suffix in (".npy", ".png") if (file := image.with_suffix(suffix)).is_file()), None)


def _picture(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            image.load()
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    if image.mode not in ("L", "P"):
        raise ValueError(f"{path} has mode {image.mode}: a label map has one class number a pixel (mode L or P)")
    return np.asarray(image)


def _array(path: Path) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an array: {error}") from error
    if found.ndim != 2 or not np.issubdtype(found.dtype, np.number) or found.min() < 0 or found.max() > IGNORED:
        raise ValueError(f"{path} must hold labels (H, W) from 0 to 255, not {found.dtype} {found.shape}")
    return np.asarray(found.astype(np.uint8))


def ddpm_labels(folder: str | os.PathLike[str], side: int = 256, training: bool = True) -> dict[str, np.ndarray]:
    """Labels in the layout of DatasetDDPM (Horse-21, Bedroom-28, ...): beside each ``0.png`` a ``0.npy`` of classes.

    Args:
        folder: such as ``horse_21/real/train``.
        side: label maps are resized to a square of so many pixels, without mixing labels.
        training: ignore classes with fewer than 20 pixels in an image there, as the papers do for training images.

    Returns:
        File name of the image -> uint8 (side, side), 255 where ignored.

    Raises:
        FileNotFoundError: the folder has no labelled image.
        ValueError: a label file is no array (H, W) of labels from 0 to 255.
    """
    files = {path.name: path.with_suffix(".npy") for path in sorted(Path(folder).glob("*.png"))}
    labelled = {name: path for name, path in files.items() if path.is_file()}
    if not labelled:
        raise FileNotFoundError(f"{folder} has no image 0.png with labels 0.npy beside it")
    return {name: _ddpm_map(path, side, training) for name, path in labelled.items()}


def _ddpm_map(path: Path, side: int, training: bool) -> np.ndarray:
    map = np.asarray(Image.fromarray(_array(path)).resize((side, side), Image.Resampling.NEAREST)).copy()
    if training:
        values, counts = np.unique(map, return_counts=True)
        map[np.isin(map, values[counts < FEWEST])] = IGNORED
    return map
