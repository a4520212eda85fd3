"""Renders the training scenes once, so that training never waits for the renderer.

``python training/scenes.py`` writes ``runs/embedded/{name}_images.npy`` (uint8 [N, S, S, 3]) and
``runs/embedded/{name}_captions.json`` (N lists of captions) for each entry of ``SETS``.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from diffusion_features.embedded.world import TRAIN_SEED, VALIDATION_SEED, render  # noqa: E402

RUNS = ROOT / "runs" / "embedded"
#: Several captions for each scene keep the text encoder from learning scenes by heart.
CAPTIONS = 4


@dataclass(frozen=True)
class SceneSet:
    """``count`` scenes from ``seed`` on, ``size`` pixels square, with the renderer's options."""

    seed: int
    count: int
    size: int
    max_objects: int = 5
    zoom: float = 1.0
    supersample: int = 2


SETS: dict[str, SceneSet] = {
    "large": SceneSet(TRAIN_SEED, 10_240, 128),
    "small": SceneSet(TRAIN_SEED + 1_000_000, 24_576, 64, max_objects=2, zoom=1.5, supersample=3),
    "validation": SceneSet(VALIDATION_SEED, 64, 128),
}


def _one(job: tuple[SceneSet, int]) -> tuple[np.ndarray, list[str]]:
    """Render one scene: its pixels and its captions."""
    spec, seed = job
    scene = render(seed, spec.size, max_objects=spec.max_objects, zoom=spec.zoom, supersample=spec.supersample)
    rng = np.random.Generator(np.random.PCG64(seed + 1))
    captions = [scene.caption] + [scene.describe(rng) for _ in range(CAPTIONS - 1)]
    return np.asarray(scene.image), captions


def build(name: str) -> None:
    """Render set ``name`` unless it is there."""
    images, texts = RUNS / f"{name}_images.npy", RUNS / f"{name}_captions.json"
    if texts.exists():
        return
    RUNS.mkdir(parents=True, exist_ok=True)
    spec = SETS[name]
    partial = RUNS / f"{name}_images.part.npy"
    out = np.lib.format.open_memmap(partial, "w+", np.uint8, (spec.count, spec.size, spec.size, 3))
    captions = []
    with multiprocessing.Pool() as pool:
        jobs = ((spec, spec.seed + i) for i in range(spec.count))
        for i, (pixels, text) in enumerate(pool.imap(_one, jobs, chunksize=64)):
            out[i] = pixels
            captions.append(text)
    out.flush()
    partial.rename(images)
    texts.write_text(json.dumps(captions))


def load(name: str) -> tuple[np.ndarray, list[list[str]]]:
    """Return the images of set ``name`` (memory-mapped uint8 [N, S, S, 3]) and their captions."""
    build(name)
    return np.load(RUNS / f"{name}_images.npy", mmap_mode="r"), json.loads((RUNS / f"{name}_captions.json").read_text())


if __name__ == "__main__":
    for key in SETS:
        build(key)
