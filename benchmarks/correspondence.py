"""PCK of presets and of a trained head, on pairs of the drawn world or of SPair-71k.

``python benchmarks/correspondence.py`` matches pairs of the embedded model's world. With real weights and data::

    python benchmarks/correspondence.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --spair SPair-71k \\
        --size 512 --head 10000
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import across, save, shown
from scipy.stats import bootstrap

from diffusion_features import FeatureExtractor
from diffusion_features.correspondence import (
    THRESHOLDS,
    AggregationHead,
    Measured,
    Pair,
    embedded_pairs,
    measure,
    nearest,
    soft_argmax,
    spair_pairs,
    summary,
    train_head,
)  # fmt: skip
from diffusion_features.correspondence.matching import Features
from diffusion_features.embedded.dataset import write
from diffusion_features.images import read_image

LOCATE = {"nearest": nearest, "soft": soft_argmax}
GRID = {"embedded": (32, 32), "spair": (128, 128)}


def features_of(
    fx: FeatureExtractor, preset: str | list[str], options: argparse.Namespace, seed: int
) -> Callable[[Path], Features]:
    """Features of an image file, under the noise of ``seed``; those of the last images are kept."""

    @lru_cache(maxsize=options.keep)
    def features(path: Path) -> Features:
        found = fx(read_image(path), options.prompt, t=options.t, seed=seed, activations=preset, size=options.size)
        return {id: tensor[0] for id, tensor in found.items()}

    return features


def interval(seeds: Sequence[Sequence[Measured]], threshold: float, relative_to: str) -> list[float]:
    """95% interval of PCK per point when pairs are drawn anew, each with what all seeds measured on it."""
    pairs = zip(*seeds, strict=True)
    hits = [np.concatenate([m.correct(threshold, relative_to).numpy() for m in pair]) for pair in pairs]
    found = bootstrap(
        ([hit.sum() for hit in hits], [len(hit) for hit in hits]),
        lambda right, points, axis: right.sum(axis) / points.sum(axis),
        paired=True, n_resamples=500, method="percentile", rng=0,
    )  # fmt: skip
    return [float(bound) for bound in found.confidence_interval]


def report(seeds: Sequence[Sequence[Measured]]) -> dict[str, Any]:
    """PCK over seeds, of the same pairs: kind -> threshold -> mean and spread."""
    tables = [summary(measured) for measured in seeds]
    whole = {kind: {a: across(table[kind][a] for table in tables) for a in tables[0][kind]} for kind in tables[0]}
    bounds = {f"{where} per point {a:g}": interval(seeds, a, where) for where in ("img", "bbox") for a in THRESHOLDS}
    return {"pairs": len(seeds[0]), **whole, "interval": bounds}


def with_head(
    features: Callable[[Path], Features],
    train: Sequence[Pair],
    test: Sequence[Pair],
    options: argparse.Namespace,
    seed: int,
) -> list[Measured]:
    """Train a head on ``train`` and measure it on ``test``."""
    torch.manual_seed(seed)
    channels = sum(tensor.shape[0] for tensor in features(train[0].source).values())
    grid = GRID["spair" if options.spair else "embedded"]
    device = next(iter(features(train[0].source).values())).device
    head = AggregationHead(channels, options.width, grid).to(device)
    train_head(head, train, features, options.head, seed)
    with torch.no_grad():
        return measure(test, lambda path: head(features(path)), LOCATE[options.locate])


def pairs_of(options: argparse.Namespace, folder: Path) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train a head on, and to measure on."""
    if options.spair:
        wanted = {"train": "trn", "validation": "val", "test": "test"}[options.split]
        return spair_pairs(options.spair, "trn") if options.head else [], spair_pairs(options.spair, wanted)
    for split, count in ((options.split, options.scenes), *((("train", 4 * options.scenes),) if options.head else ())):
        write(folder, split, count)
    return embedded_pairs(folder, "train") if options.head else [], embedded_pairs(folder, options.split)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--presets", nargs="+", default=["practical", "legacy"], help="presets, ids or files of these")
    parser.add_argument("--spair", type=Path, metavar="FOLDER", help="SPair-71k; without it, drawn scenes")
    parser.add_argument("--split", choices=["train", "validation", "test"], default="test")
    parser.add_argument("--scenes", type=int, default=200, help="drawn scenes to pair (default: %(default)s)")
    parser.add_argument("--pairs", type=int, help="measure only the first of the pairs")
    parser.add_argument("--t", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3, help="of the noise and of heads (default: %(default)s)")
    parser.add_argument("--size", type=int, help="of the images that the model sees")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--locate", choices=list(LOCATE), default="nearest")
    parser.add_argument("--head", type=int, default=0, metavar="STEPS", help="train a head too (the paper: 10000)")
    parser.add_argument("--width", type=int, help="channels of the head's result (default: as many as it reads)")
    parser.add_argument("--keep", type=int, default=64, help="images whose features stay in memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    fx = FeatureExtractor.from_pretrained(options.model, options.presets, prompts=options.prompt)
    result: dict[str, Any] = {"t": options.t, "split": options.split, "locate": options.locate}
    with tempfile.TemporaryDirectory() as folder:
        train, test = pairs_of(options, Path(folder))
        test = test[: options.pairs]
        for preset in options.presets:
            plain, trained = [], []
            for seed in range(options.seeds):
                features = features_of(fx, preset, options, seed)
                plain.append(measure(test, features, LOCATE[options.locate]))
                if options.head:
                    trained.append(with_head(features, train, test, options, seed))
            for name, measured in ((preset, plain), (f"{preset}, trained head", trained)):
                if measured:
                    result[name] = report(measured)
                    show(name, result[name])
    if options.json:
        save(options.json, result)


def show(name: str, found: dict[str, Any]) -> None:
    for kind in ("img per point", "img per image", "bbox per point", "bbox per image"):
        figures = "  ".join(f"@{a} {shown(value)}" for a, value in found[kind].items())
        print(f"{name}: PCK {kind}: {figures}  ({found['pairs']} pairs)", flush=True)


if __name__ == "__main__":
    main()
