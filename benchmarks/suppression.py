"""Measures what techniques against content shift do to features of the embedded model, and whether GATE foresees it.

``python benchmarks/suppression.py`` takes frozen features of labelled scenes at rising t, alone and under each
technique, and measures on them: a linear probe and nearest neighbours (mIoU), the agreement of their edges with those
of the labels, and the Laplacian score. Then the rank correlation of the gain in that score with the gain of the probe,
over techniques, activations and t, with an interval over images. ``--sharing`` times variants against separate calls;
``--picture`` draws the shift.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import machine, table
from scipy.stats import spearmanr
from torch import Tensor

from diffusion_features import FeatureExtractor
from diffusion_features.embedded import CLASSES, Scene, path
from diffusion_features.embedded.dataset import scenes
from diffusion_features.suppression import CFG, Denoise, FineGrainedPrompt, LoRA, Technique, variants
from diffusion_features.suppression.amalgamate import averaged, concatenated
from diffusion_features.suppression.gate import laplacian_score
from diffusion_features.suppression.shift import edge_agreement, shift_sheet
from diffusion_features.suppression.words import known_control

RIDGE, NEIGHBOURS, ANCHOR_T = 1.0, 5, 800
BASE = "none"
Features = dict[str, Tensor]


def techniques(fx: FeatureExtractor, drawn: Sequence[Scene]) -> dict[str, list[Technique]]:
    """Everything there is to try on these scenes; the ControlNet and the LoRAs if they are shipped."""
    found: dict[str, list[Technique]] = {
        "words": [FineGrainedPrompt("a picture of things, clear, detailed, high quality")],
        "caption": [FineGrainedPrompt("{caption}", captioner=lambda images: [s.caption for s in drawn])],
        "cfg": [CFG(7.5), Denoise(10, 2)],
        "denoise": [Denoise(10, 2)],
    }
    home = Path(path()).parent
    if (home / "canny").is_dir():
        found["canny"] = [known_control(fx, "canny")]
    for file in sorted((home / "lora").glob("*.safetensors")):
        found[f"lora {file.stem}"] = [LoRA(file)]
    together = [found[name][0] for name in ("caption", "canny", "lora sketch") if name in found]
    return found | ({"all": together} if len(together) > 1 else {})


def taken(fx: FeatureExtractor, drawn: Sequence[Scene], t: int, seed: int) -> dict[str, Features]:
    """Features of all scenes under each technique, their mean and all side by side: name → id → (B, C, h, w)."""
    images = [scene.image for scene in drawn]
    found = variants(fx, images, {BASE: [], **techniques(fx, drawn)}, t=t, seed=[seed + i for i in range(len(drawn))])
    mixed = [found[name] for name in (BASE, "caption", "canny", "lora sketch") if name in found]
    return found | {"mean of variants": averaged(mixed), "variants side by side": concatenated(mixed)}


# ---- downstream -----------------------------------------------------------------------------------------------------


def truth(drawn: Sequence[Scene]) -> Tensor:
    """Labels of all scenes, (B, H, W)."""
    return torch.stack([torch.from_numpy(scene.semantic.astype(np.int64)) for scene in drawn])


def cells(feature: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Standardised rows of a feature (cells, C), and the most frequent label of each cell."""
    votes = F.adaptive_avg_pool2d(F.one_hot(labels, len(CLASSES)).permute(0, 3, 1, 2).float(), feature.shape[-2:])
    return rows_of(feature), votes.argmax(1).flatten()


def rows_of(feature: Tensor) -> Tensor:
    rows = feature.permute(0, 2, 3, 1).flatten(0, 2).double()
    return torch.cat([F.layer_norm(rows, rows.shape[1:]), torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)


def probe(train: Tensor, train_labels: Tensor, test: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (B, H, W) that a ridge regression on the cells of the training scenes gives the test scenes."""
    x, y = cells(train, train_labels)
    gram = x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, x.T @ F.one_hot(y, len(CLASSES)).to(x))
    return upsampled(rows_of(test) @ weights, test, size)


def neighbours(train: Tensor, train_labels: Tensor, test: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (B, H, W) by the vote of the nearest cells of the training scenes, by cosine."""
    x, y = cells(train, train_labels)
    near = (F.normalize(rows_of(test)) @ F.normalize(x).T).topk(NEIGHBOURS, dim=1).indices
    return upsampled(F.one_hot(y[near], len(CLASSES)).double().sum(1), test, size)


def upsampled(scores: Tensor, feature: Tensor, size: tuple[int, int]) -> Tensor:
    grid = scores.reshape(len(feature), *feature.shape[-2:], -1).permute(0, 3, 1, 2)
    return F.interpolate(grid, size, mode="bilinear", align_corners=False).argmax(1)


def confusion(predicted: Tensor, labels: Tensor) -> np.ndarray:
    """(B, classes, classes) of each image, so that images can be resampled."""
    n = len(CLASSES)
    pairs = (labels * n + predicted).flatten(1)
    return np.stack([np.bincount(row.numpy(), minlength=n * n).reshape(n, n) for row in pairs])


def miou(confusions: np.ndarray) -> float:
    """Mean IoU over the classes that occur, of images together."""
    total = confusions.sum(0)
    union = total.sum(0) + total.sum(1) - np.diag(total)
    return float((np.diag(total)[union > 0] / union[union > 0]).mean())


# ---- the measurement ------------------------------------------------------------------------------------------------


def measured(fx: FeatureExtractor, train: Sequence[Scene], test: Sequence[Scene], t: int, seed: int) -> list[dict]:
    """One record a technique and activation: confusions and scores of each test image."""
    fitted, found = taken(fx, train, t, seed), taken(fx, test, t, seed + len(train))
    images, seeds = [s.image for s in test], [seed + len(train) + i for i in range(len(test))]
    reference, anchor = (fx(images, t=level, seed=seeds) for level in (0, ANCHOR_T))
    labels, known = truth(test), truth(train)
    size = (labels.shape[1], labels.shape[2])
    records = []
    for name, features in found.items():
        for id, feature in features.items():
            comparable = feature.shape == reference[id].shape
            score = laplacian_score(feature, reference[id], anchor[id]).tolist() if comparable else None
            records.append({
                "technique": name, "activation": id, "t": t, "seed": seed, "score": score,
                "probe": confusion(probe(fitted[name][id], known, feature, size), labels),
                "knn": confusion(neighbours(fitted[name][id], known, feature, size), labels),
                "edges": [edge_agreement(one, seen) for one, seen in zip(feature, labels, strict=True)],
            })  # fmt: skip
    return records


def rank_correlation(records: Sequence[Mapping[str, Any]], draws: int = 500) -> dict[str, Any]:
    """Spearman's ρ of the gain in score with the gain in mIoU over the model alone, and its interval over images."""
    base = {(r["activation"], r["t"], r["seed"]): r for r in records if r["technique"] == BASE}
    pairs = [(r, base[r["activation"], r["t"], r["seed"]]) for r in records if r["technique"] != BASE and r["score"]]
    count = len(pairs[0][0]["score"])

    def rho(chosen: np.ndarray) -> float:
        scores = [np.mean(np.array(r["score"])[chosen]) - np.mean(np.array(b["score"])[chosen]) for r, b in pairs]
        gains = [miou(r["probe"][chosen]) - miou(b["probe"][chosen]) for r, b in pairs]
        return float(spearmanr(scores, gains).statistic)

    rng = np.random.default_rng(0)
    drawn = [rho(rng.integers(count, size=count)) for _ in range(draws)]
    return {
        "rho": rho(np.arange(count)),
        "interval": np.nanpercentile(drawn, (2.5, 97.5)).tolist(),
        "pairs": len(pairs),
    }


def summary(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per technique and t: means over activations, and the spread over seeds."""
    keys = dict.fromkeys((r["technique"], r["t"]) for r in records)
    rows = []
    for name, t in keys:
        mine = [r for r in records if (r["technique"], r["t"]) == (name, t)]
        row: dict[str, Any] = {"technique": name, "t": t}
        for what, value in (
            ("probe", lambda r: miou(r["probe"])), ("knn", lambda r: miou(r["knn"])),
            ("edges", lambda r: float(np.mean(r["edges"]))),
            ("score", lambda r: float(np.mean(r["score"])) if r["score"] else float("nan")),
        ):  # fmt: skip
            seeds = sorted({r["seed"] for r in mine})
            each = [np.mean([value(r) for r in mine if r["seed"] == seed]) for seed in seeds]
            row[what], row[f"{what}_spread"] = float(np.mean(each)), float(np.std(each))
        rows.append(row)
    return rows


def sharing(fx: FeatureExtractor, drawn: Sequence[Scene], repeats: int = 3) -> dict[str, float]:
    """Seconds of one image's variants together, and in separate calls: the least of several, taken in turn."""
    named = {BASE: [], **techniques(fx, drawn[:1])}
    image, together, apart = drawn[0].image, [], []
    for _ in range(repeats):
        began = time.process_time()
        variants(fx, image, named)
        together.append(time.process_time() - began)
        began = time.process_time()
        for suppress in named.values():
            fx(image, suppress=suppress)
        apart.append(time.process_time() - began)
    return {"variants": len(named), "together_s": min(together), "apart_s": min(apart)}


def draw(fx: FeatureExtractor, scene: Scene, activation: str, timesteps: Sequence[int], target: Path) -> None:
    """The shift of one scene as a picture."""
    drawn = {name: t for name, t in techniques(fx, [scene]).items() if name in ("caption", "canny", "all")}
    named = {BASE: [], **drawn}
    take = partial(variants, fx, scene.image, named, seed=0, activations=activation)
    found = {t: take(t=t) for t in timesteps}
    rows = {name: {t: found[t][name][activation][0] for t in timesteps} for name in named}
    target.parent.mkdir(parents=True, exist_ok=True)
    shift_sheet(scene.image, rows, torch.from_numpy(scene.semantic.astype(np.int64))).save(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="test", choices=["validation", "test", "held-out"])
    parser.add_argument("--train", type=int, default=64, help="scenes that probes learn from (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=32, help="scenes they are tested on (default: %(default)s)")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[50, 200, 400, 600])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1000])
    parser.add_argument("--activations", nargs="+", default=["practical"])
    parser.add_argument("--sharing", action="store_true", help="time variants against separate calls instead")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the shift of one scene there instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    fx = FeatureExtractor.from_pretrained("embedded", options.activations)
    test = list(scenes(options.split, options.scenes))
    if options.picture:
        draw(fx, test[0], fx.activations[-1].id, options.timesteps, options.picture)
        return
    if options.sharing:
        result: dict[str, Any] = {"machine": machine(), "sharing": sharing(fx, test)}
    else:
        train = list(scenes("train", options.train))
        records = [
            record for t in options.timesteps for seed in options.seeds for record in measured(fx, train, test, t, seed)
        ]
        rows = summary(records)
        result = {"machine": machine(), "split": options.split, "rows": rows, "gate": rank_correlation(records)}
        columns = ("probe", "knn", "edges", "score")
        print(table(
            ["technique", "t", *columns],
            [[r["technique"], str(r["t"]), *(f"{r[c]:.3f} ± {r[c + '_spread']:.3f}" for c in columns)] for r in rows],
        ))  # fmt: skip
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
