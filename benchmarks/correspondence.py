"""PCK of presets and of a trained head, on pairs of the drawn world or of SPair-71k.

``python benchmarks/correspondence.py`` matches pairs of the embedded model's world. With real weights and data::

    python benchmarks/correspondence.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --spair SPair-71k \\
        --size 512 --head 10000
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

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


def features_of(fx: FeatureExtractor, preset: str, options: argparse.Namespace) -> Callable[[Path], Features]:
    """Features of an image file; those of the last images are kept."""

    @lru_cache(maxsize=options.keep)
    def features(path: Path) -> Features:
        found = fx(
            read_image(path), options.prompt, t=options.t, seed=options.seed, activations=preset, size=options.size
        )
        return {id: tensor[0] for id, tensor in found.items()}

    return features


def interval(measured: Sequence[Measured], threshold: float, relative_to: str) -> list[float]:
    """95% interval of PCK per point when pairs are drawn anew."""
    hits = [m.correct(threshold, relative_to).numpy() for m in measured]
    rng = np.random.default_rng(0)
    draws = [np.concatenate([hits[i] for i in rng.integers(len(hits), size=len(hits))]).mean() for _ in range(500)]
    return [float(v) for v in np.percentile(draws, (2.5, 97.5))]


def report(measured: Sequence[Measured]) -> dict[str, Any]:
    bounds = {f"{where} per point {a:g}": interval(measured, a, where) for where in ("img", "bbox") for a in THRESHOLDS}
    return {"pairs": len(measured), **summary(measured), "interval": bounds}


def with_head(
    fx: FeatureExtractor, preset: str, train: Sequence[Pair], test: Sequence[Pair], options: argparse.Namespace
) -> dict[str, Any]:
    """Train a head on ``train`` and measure it on ``test``."""
    features = features_of(fx, preset, options)
    torch.manual_seed(options.seed)
    channels = sum(tensor.shape[0] for tensor in features(train[0].source).values())
    grid = GRID["spair" if options.spair else "embedded"]
    head = AggregationHead(channels, options.width, grid).to(fx.device)
    losses = train_head(head, train, features, options.head, options.seed)
    with torch.no_grad():
        measured = measure(test, lambda path: head(features(path)), LOCATE[options.locate])
    return {**report(measured), "last losses": float(np.mean(losses[-50:]))}


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
    parser.add_argument("--seed", type=int, default=0)
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
            measured = measure(test, features_of(fx, preset, options), LOCATE[options.locate])
            result[preset] = report(measured)
            show(preset, result[preset])
            if options.head:
                result[f"{preset}, trained head"] = with_head(fx, preset, train, test, options)
                show(f"{preset}, trained head", result[f"{preset}, trained head"])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def show(name: str, found: dict[str, Any]) -> None:
    for kind in ("img per point", "img per image", "bbox per point", "bbox per image"):
        figures = "  ".join(f"@{a} {value:.3f}" for a, value in found[kind].items())
        print(f"{name}: PCK {kind}: {figures}  ({found['pairs']} pairs)", flush=True)


if __name__ == "__main__":
    main()
