"""The drawn world on disk: in the layout that mmsegmentation reads, and as pairs of corresponding points.

    root/
      img_dir/test/000000.png       RGB
      ann_dir/test/000000.png       palette PNG, value i is CLASSES[i]
      parts_dir/test/000000.png     palette PNG, value i is PARTS[i - 1], 0 is background
      instances_dir/test/000000.png palette PNG, 0 is background, then objects from far to near
      test.json                     classes, palette, parts; seed, caption, style and keypoints of each image
      test_pairs.json               corresponding keypoints of two images

A split is a range of seeds, so nobody has to download or to store one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .world import (
    CLASSES,
    HELD_OUT_SEED,
    PARTS,
    TEST_SEED,
    TRAIN_SEED,
    VALIDATION_SEED,
    Placed,
    Scene,
    render,
)

SPLITS: Final[dict[str, int]] = {
    "train": TRAIN_SEED, "validation": VALIDATION_SEED, "test": TEST_SEED, "held-out": HELD_OUT_SEED,
}  # fmt: skip
LIMIT: Final[int] = 10_000_000  # seeds in a split
#: One colour for each of ``CLASSES``.
PALETTE: Final[tuple[tuple[int, int, int], ...]] = (
    (135, 196, 240), (98, 168, 74), (28, 94, 156), (232, 200, 132), (226, 236, 248), (104, 106, 116),
    (214, 45, 48), (150, 84, 54), (24, 104, 60), (240, 133, 36), (20, 170, 176), (246, 203, 54),
    (122, 30, 66), (166, 206, 48), (224, 96, 160), (132, 74, 178), (80, 50, 120), (255, 160, 176),
)  # fmt: skip
#: Fewest keypoints that two objects must both show to be a pair.
_SHARED: Final[int] = 3


def scenes(split: str, count: int, size: tuple[int, int] | int = 128) -> Iterator[Scene]:
    """Draw the first ``count`` scenes of a split.

    Args:
        split: "train", "validation", "test" or "held-out".
        size: (width, height) in pixels, or one number for a square.

    Raises:
        ValueError: there is no such split, or it has fewer scenes.
    """
    return (render(seed, size) for seed in seeds(split, count))


def seeds(split: str, count: int) -> range:
    """The seeds of the first ``count`` scenes of a split. Raises ValueError as ``scenes`` does."""
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; there are {', '.join(SPLITS)}")
    if not 0 < count <= LIMIT:
        raise ValueError(f"a split has 1 to {LIMIT} scenes, not {count}")
    return range(SPLITS[split], SPLITS[split] + count)


def write(root: str | os.PathLike[str], split: str, count: int, size: tuple[int, int] | int = 128) -> Path:
    """Write the first ``count`` scenes of a split and their correspondences under ``root``.

    Files that are there already are drawn again, to the same bytes. The two JSON files come last, so a folder that has
    them is whole.

    Returns:
        ``root/{split}.json``.

    Raises:
        ValueError: as ``scenes``; or the folder holds this split in another size.
        RuntimeError: the processes that draw cannot start: in a script, call this from its main block.
    """
    folder, wanted = Path(root), seeds(split, count)
    out = (size, size) if isinstance(size, int) else size
    index = folder / f"{split}.json"
    if index.exists() and (found := json.loads(index.read_text())["size"]) != [*out]:
        raise ValueError(
            f"{index} holds scenes of {found[0]}x{found[1]}, not {out[0]}x{out[1]}; write to another folder"
        )
    for kind in ("img_dir", "ann_dir", "parts_dir", "instances_dir"):
        (folder / kind / split).mkdir(parents=True, exist_ok=True)
    jobs = [(folder, split, seed, out) for seed in wanted]
    try:
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            records = list(pool.map(_write_one, jobs, chunksize=16))
    except BrokenProcessPool as error:
        raise RuntimeError(
            "the processes that draw could not start, or were killed: a script calls this below "
            "`if __name__ == '__main__':`, because each process imports the script"
        ) from error
    about = {"split": split, "size": out, "classes": CLASSES, "palette": PALETTE, "parts": PARTS}
    _write_json(folder / f"{split}_pairs.json", list(_pairs(records)))
    _write_json(index, {**about, "images": records})
    return index


def _write_one(job: tuple[Path, str, int, tuple[int, int]]) -> dict[str, Any]:
    folder, split, seed, size = job
    scene, name = render(seed, size), f"{seed - SPLITS[split]:06d}.png"
    for kind, image in (
        ("img_dir", scene.image),
        ("ann_dir", _paletted(scene.semantic, [*PALETTE])),
        ("parts_dir", _paletted(scene.parts, _colours(len(PARTS)))),
        ("instances_dir", _paletted(scene.instances, _colours(5))),
    ):
        _publish(folder / kind / split / name, lambda part, image=image: image.save(part, format="PNG"))
    return {
        "file": name, "seed": seed, "caption": scene.caption, "style": scene.style, "classes": scene.classes,
        "objects": [_object(found) for found in scene.objects],
    }  # fmt: skip


def _object(found: Placed) -> dict[str, Any]:
    points = {name: [round(p.x, 2), round(p.y, 2), p.visible] for name, p in found.keypoints.items()}
    return {"class": found.name, "colour": found.colour, "box": found.box, "instance": found.instance, "points": points}


def _pairs(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Pair each object with the next one of its class that shows enough of the same keypoints.

    Points are (x, y) in pixels. ``target_box`` is what a percentage of correct keypoints (PCK) is relative to.
    """
    last: dict[str, tuple[str, dict[str, Any]]] = {}
    for record in records:
        for found in record["objects"]:
            name = found["class"]
            if name in last:
                file, source = last[name]
                shared = [k for k, p in found["points"].items() if p[2] and source["points"][k][2]]
                if len(shared) >= _SHARED:
                    yield {
                        "class": name, "source": file, "target": record["file"], "points": shared,
                        "source_points": [source["points"][k][:2] for k in shared],
                        "target_points": [found["points"][k][:2] for k in shared],
                        "source_box": source["box"], "target_box": found["box"],
                    }  # fmt: skip
            last[name] = (record["file"], found)


def _paletted(labels: NDArray[np.uint8], colours: list[tuple[int, int, int]]) -> Image.Image:
    image = Image.fromarray(labels).convert("P")
    image.putpalette([value for colour in colours for value in colour])
    return image


def _colours(count: int) -> list[tuple[int, int, int]]:
    """Black, then ``count`` colours around the wheel, neighbours far apart."""
    turns = [Image.new("HSV", (1, 1), (int(i * 0.382 * 255) % 256, 160 + 40 * (i % 3), 240 - 50 * (i % 2)))
             for i in range(count)]  # fmt: skip
    return [(0, 0, 0), *(turn.convert("RGB").getpixel((0, 0)) for turn in turns)]  # type: ignore[list-item]


def _write_json(path: Path, value: Any) -> None:
    _publish(path, lambda part: part.write_text(json.dumps(value)))


def _publish(path: Path, write_to: Any) -> None:
    """Write through a file beside ``path``, so that a kill leaves no half of it."""
    part = path.with_name(path.name + ".part")
    write_to(part)
    part.replace(path)
