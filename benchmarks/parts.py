"""Segmentation of parts from a few labelled images, by the ensemble of pixel classifiers; several random splits.

``python benchmarks/parts.py`` uses the embedded model and the parts of its world. With real weights and data (the
folder holds ``0.png`` and ``0.npy``, train and test images of DatasetDDPM's Horse-21 together)::

    python benchmarks/parts.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --folder horse_21 --train 30 \\
        --size 512 --prompt "a photo of a horse" --steps 20000
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import across, save, shown

from diffusion_features.atlas.probing import confusion_matrix, mean_iou
from diffusion_features.cli import main as command
from diffusion_features.embedded.dataset import write
from diffusion_features.sampling import Features
from diffusion_features.store import Store
from segmentors.pixel_classifier import Ensemble, ddpm_labels, drawn_parts, train

SIDE = 256
"""Label maps of DatasetDDPM are compared at this size, as published."""


def extracted(images: Path, preset: str, options: argparse.Namespace, folder: Path) -> Store:
    """The features of a folder's images, written by ``diffusion-features extract``."""
    arguments = ["extract", str(images), "-o", str(folder), "--model", options.model, "--activations", preset]
    arguments += ["--t", str(options.t), "--prompt", options.prompt]
    arguments += ["--size", str(options.size)] if options.size else []
    if command(arguments):
        raise SystemExit(1)
    return Store.open(folder)


def one(
    features: Callable[[str], Features],
    learn: dict[str, np.ndarray],
    test: dict[str, np.ndarray],
    seed: int,
    options: argparse.Namespace,
) -> float:
    """mIoU of an ensemble that ``learn`` has trained, on ``test``; label maps by the image that ``features`` takes."""
    classes = 1 + max(int(m[m != 255].max(initial=0)) for m in [*learn.values(), *test.values()])
    channels = sum(tensor.shape[0] for tensor in features(next(iter(learn))).values())
    ensemble = Ensemble(channels, classes, seed=seed).to(options.device)
    train(ensemble, features, learn, options.steps, seed)
    together = np.zeros((classes, classes), np.int64)
    for key, labels in test.items():
        size = (labels.shape[0], labels.shape[1])
        together += confusion_matrix(labels, ensemble.predict(features(key), size).labels.cpu().numpy(), classes)
    return mean_iou(together)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--presets", nargs="+", default=["practical", "legacy"])
    parser.add_argument("--folder", type=Path, help="images with labels beside them; without it, drawn scenes")
    parser.add_argument("--train", type=int, default=30, help="labelled images (default: %(default)s)")
    parser.add_argument("--test", type=int, default=60, help="drawn scenes that test (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="each splits the images anew (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4000, help="batches for each member (default: %(default)s)")
    parser.add_argument("--t", type=int, default=50)
    parser.add_argument("--size", type=int, help="of the images that the model sees")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    result: dict[str, Any] = {"steps": options.steps, "train": options.train, "t": options.t}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        if options.folder:
            images = options.folder
            whole = ddpm_labels(images, SIDE, training=False)
            rare = ddpm_labels(images, SIDE)
        else:
            write(root / "world", "validation", options.train + options.test)
            images = root / "world" / "img_dir" / "validation"
            whole = rare = drawn_parts(root / "world", "validation")
        for number, preset in enumerate(options.presets):
            store = extracted(images, preset, options, root / str(number))
            figures = []
            for seed in range(options.seeds):
                keys = [[*whole][i] for i in np.random.default_rng(seed).permutation(len(whole))]
                learn = {key: rare[key] for key in keys[: options.train]}
                test = {key: whole[key] for key in keys[options.train :]}
                figures.append(one(store.read, learn, test, seed, options))
                print(f"{preset}, seed {seed}: mIoU {figures[-1]:.3f}", flush=True)
            result[preset] = across(figures)
            print(f"{preset}: mIoU {shown(result[preset])}", flush=True)
    if options.json:
        save(options.json, result)


if __name__ == "__main__":
    main()
