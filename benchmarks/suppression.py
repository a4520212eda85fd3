"""Measures what techniques against content shift do to features of the embedded model, and whether GATE foresees it.

``python benchmarks/suppression.py`` takes frozen features of labelled scenes at rising t, alone and under each
technique, and measures on them: a linear probe and nearest neighbours (mIoU), matched keypoints (PCK), the agreement of
their edges with those of the labels, and the Laplacian score. Then the rank correlation of the gain in that score with
the gain downstream, over techniques, activations and t, with an interval over images. ``--sharing`` times variants
against separate calls; ``--picture`` draws the shift.

Guidance needs words and steps to act on, so ``cfg`` is to be compared with ``caption, denoise``. The LoRAs have learnt
the style "sketch": ``--style sketch`` measures in their own domain.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from downstream import keypoints, mixture, neighbours, probe
from figures import across, digest, save, shown
from measure import machine, spread, table
from measure import pair as pair_of_costs
from scipy.stats import spearmanr
from torch import Tensor

from diffusion_features import FeatureExtractor
from diffusion_features.correspondence import Pair, embedded_pairs
from diffusion_features.embedded import Scene, path
from diffusion_features.embedded.dataset import seeds, write
from diffusion_features.embedded.world import render
from diffusion_features.suppression import (
    CFG,
    ControlNet,
    Denoise,
    FineGrainedPrompt,
    LoRA,
    Technique,
    loaded,
    variants,
)
from diffusion_features.suppression.amalgamate import averaged, concatenated
from diffusion_features.suppression.gate import laplacian_score
from diffusion_features.suppression.shift import edge_agreement, shift_sheet
from diffusion_features.suppression.words import EMBEDDED_CANNY

ANCHOR_T, DRAWS = 800, 1000
BASE, MIXED = "none", ("none", "caption", "canny", "lora sketch")
WEIGHED = ("canny", "lora sketch", "lora sketch-overfitted")
"""Techniques with trained weights."""
TARGETS = ("probe", "knn", "pck")
Features = dict[str, Tensor]


@dataclass(frozen=True)
class Record:
    """One technique, activation, t and seed, on B test scenes.

    Attributes:
        score, edges: Laplacian score, and agreement of edges with the labels', (B,); no score where the anchor has
            another shape.
        probe, knn: (B, 3, classes): pixels that are right, there, and predicted.
        pck: keypoints that were found, of each pair of scenes.
    """

    technique: str
    activation: str
    t: int
    seed: int
    score: Tensor | None
    edges: Tensor
    probe: Tensor
    knn: Tensor
    pck: Tensor


# ---- features -------------------------------------------------------------------------------------------------------


def scenes_of(split: str, count: int, style: str | None) -> list[Scene]:
    return [render(seed, 128, style=style) for seed in seeds(split, count)]


def pairs_of(split: str, count: int) -> list[Pair]:
    """Pairs of keypoints in the same scenes; where they are does not depend on the style."""
    with tempfile.TemporaryDirectory() as folder:
        write(folder, split, count)
        return embedded_pairs(folder, split)


def techniques(fx: FeatureExtractor, drawn: Sequence[Scene], home: Path) -> dict[str, list[Technique]]:
    """Everything there is to try on these scenes.

    Args:
        home: the folder of ``canny``, a ControlNet, and of ``lora``, with files; what is not there is left out.
    """
    caption = FineGrainedPrompt("{caption}", captioner=lambda images: [s.caption for s in drawn])
    found: dict[str, list[Technique]] = {
        "words": [FineGrainedPrompt("a picture of things, clear, detailed, high quality")],
        "caption": [caption],
        "denoise": [Denoise(10, 2)],
        "caption, denoise": [caption, Denoise(10, 2)],
        "cfg": [caption, CFG(7.5), Denoise(10, 2)],
    }
    if (home / "canny").is_dir():
        found["canny"] = [ControlNet(home / "canny", EMBEDDED_CANNY)]
    for file in sorted((home / "lora").glob("*.safetensors")):
        found[f"lora {file.stem}"] = [LoRA(file)]
    together = [found[name][0] for name in MIXED[1:] if name in found]
    return found | ({"all": together} if len(together) > 1 else {})


def taken(fx: FeatureExtractor, drawn: Sequence[Scene], home: Path, t: int, seed: int) -> dict[str, Features]:
    """Features of all scenes under each technique, and two ways to amalgamate them: name → id → (B, C, h, w)."""
    images, noises = [scene.image for scene in drawn], [seed + i for i in range(len(drawn))]
    found = variants(fx, images, {BASE: [], **techniques(fx, drawn, home)}, t=t, seed=noises)
    mixed = [found[name] for name in MIXED if name in found]
    return found | {"mean": averaged(mixed), "side by side": concatenated(mixed)}


# ---- the measurement ------------------------------------------------------------------------------------------------


def measured(
    fx: FeatureExtractor,
    train: Sequence[Scene],
    test: Sequence[Scene],
    pairs: Sequence[Pair],
    home: Path,
    t: int,
    seed: int,
    steps: int,
) -> list[Record]:
    """One record a technique and activation."""
    fitted, found = taken(fx, train, home, t, seed), taken(fx, test, home, t, seed + len(train))
    known, labels = truth(train), truth(test)
    mixed = [name for name in MIXED if name in found]
    learned = {
        id: mixture([fitted[n][id] for n in mixed], known, [found[n][id] for n in mixed], steps, seed)
        for id in found[BASE]
    }
    fitted["learned mixture"], found["learned mixture"] = ({id: m[i] for id, m in learned.items()} for i in (0, 1))
    own = (BASE, *techniques(fx, test, home))  # the features that a reference is compared with are no mixtures
    images, noises = [scene.image for scene in test], [seed + len(train) + i for i in range(len(test))]
    reference, anchor = (fx(images, t=level, seed=noises) for level in (0, ANCHOR_T))

    def record(name: str, id: str, feature: Tensor) -> Record:
        return Record(
            name, id, t, seed,
            laplacian_score(feature, reference[id], anchor[id]).double() if name in own else None,
            torch.tensor([edge_agreement(one, seen) for one, seen in zip(feature, labels, strict=True)]).double(),
            probe(fitted[name][id], known, feature, labels), neighbours(fitted[name][id], known, feature, labels),
            keypoints(feature, pairs),
        )  # fmt: skip

    return [record(name, id, feature) for name, features in found.items() for id, feature in features.items()]


def truth(drawn: Sequence[Scene]) -> Tensor:
    """Labels of all scenes, (B, H, W)."""
    return torch.stack([torch.from_numpy(scene.semantic.astype(np.int64)) for scene in drawn])


# ---- figures --------------------------------------------------------------------------------------------------------


def value(record: Record, target: str, weights: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """A figure of a record under each row of ``weights``, (draws, B): how often each scene counts. (draws,)."""
    if target in ("probe", "knn"):
        counts: Tensor = getattr(record, target)
        right, there, predicted = (weights @ counts.flatten(1)).unflatten(1, (3, -1)).unbind(1)
        return (right / (there + predicted - right)).nanmean(1)
    if target == "pck":
        both = [[int(one.stem) for one in (pair.source, pair.target)] for pair in pairs]
        weights = weights[:, [a for a, _ in both]] * weights[:, [b for _, b in both]]
        points = torch.tensor([float(len(pair.source_points)) for pair in pairs], dtype=torch.float64)
        return weights @ record.pck / (weights @ points)
    each = getattr(record, target)
    return weights @ each / weights.sum(1) if each is not None else torch.full((len(weights),), torch.nan)


def resampled(scenes: int) -> Tensor:
    """How often each scene counts: once, and in ``DRAWS`` more rows as often as it is drawn, with replacement."""
    drawn = torch.randint(scenes, (DRAWS, scenes), generator=torch.Generator().manual_seed(0))
    weights = torch.ones(1 + DRAWS, scenes, dtype=torch.float64)
    weights[1:] = torch.zeros(DRAWS, scenes, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(drawn.shape).double()
    )
    return weights


def gains(records: Sequence[Record], pairs: Sequence[Pair]) -> dict[str, dict[str, Any]]:
    """What each technique adds: its name → target → the difference, with its 95% interval over scenes.

    Means over activations, t and seeds; over the model alone, or over what is named: guidance over the caption and
    the denoising that it needs, all together over each single one.
    """
    weights, names = resampled(len(records[0].edges)), dict.fromkeys(r.technique for r in records)
    pairs_of_names = {name: (name, "caption, denoise" if name == "cfg" else BASE) for name in names if name != BASE}
    if "all" in names:
        pairs_of_names |= {f"all, over {one}": ("all", one) for one in MIXED[1:] if one in names}

    def mean(name: str, target: str) -> Tensor:
        return torch.stack([value(r, target, weights, pairs) for r in records if r.technique == name]).mean(0)

    found: dict[str, dict[str, Any]] = {}
    for name, (own, other) in pairs_of_names.items():
        found[name] = {}
        for target in (*TARGETS, "edges"):
            difference = mean(own, target) - mean(other, target)
            low_high = np.nanpercentile(difference[1:], (2.5, 97.5)).tolist()
            found[name][target] = {"difference": float(difference[0]), "interval": low_high}
    return found


def foreseen(records: Sequence[Record], target: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Spearman's ρ of the gain in Laplacian score with the gain in ``target``, over the model alone.

    Over techniques, activations and t, gains being means over seeds; with the 95% interval when scenes are drawn anew,
    each with all that was measured on it.
    """
    weights = resampled(len(records[0].edges))
    base = {(r.activation, r.t, r.seed): r for r in records if r.technique == BASE}
    changes: dict[tuple[str, str, int], list[Tensor]] = {}
    for r in records:
        if r.technique != BASE and r.score is not None:
            b = base[r.activation, r.t, r.seed]
            both = [value(r, what, weights, pairs) - value(b, what, weights, pairs) for what in ("score", target)]
            changes.setdefault((r.technique, r.activation, r.t), []).append(torch.stack(both))
    x, y = torch.stack([torch.stack(each).mean(0) for each in changes.values()]).unbind(1)  # (gains, 1 + draws)
    rho = [float(spearmanr(x[:, d], y[:, d]).statistic) for d in range(1 + DRAWS)]
    return {"rho": rho[0], "interval": np.nanpercentile(rho[1:], (2.5, 97.5)).tolist(), "gains": len(changes)}


def summary(records: Sequence[Record], pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Per technique and t: means over activations, and their spread over seeds."""
    every = torch.ones(1, len(records[0].edges), dtype=torch.float64)
    rows = []
    for name, t in dict.fromkeys((r.technique, r.t) for r in records):
        mine = [r for r in records if (r.technique, r.t) == (name, t)]
        row: dict[str, Any] = {"technique": name, "t": t}
        for what in (*TARGETS, "edges", "score"):
            each = [
                np.mean([float(value(r, what, every, pairs)) for r in mine if r.seed == seed])
                for seed in dict.fromkeys(r.seed for r in mine)
            ]
            row[what] = None if np.isnan(each).any() else across(map(float, each))
        rows.append(row)
    return rows


# ---- records that outlive a run -----------------------------------------------------------------------------------


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the records of a timestep and seed depend on, beside the code."""
    names = ("split", "style", "train", "scenes", "activations", "steps")
    folders = [path(), options.weights / "canny", options.weights / "lora"]
    return {name: getattr(options, name) for name in names} | {"weights": digest(folders)}


def kept(options: argparse.Namespace) -> list[Record]:
    """The records of an earlier run with the same settings, if ``--records`` names its file.

    Raises:
        SystemExit: the file is of other settings.
    """
    if options.records is None or not options.records.exists():
        return []
    found = torch.load(options.records)
    if found["settings"] != settings(options):
        raise SystemExit(f"{options.records} is of other settings, {found['settings']}: name another file")
    return [Record(**each) for each in found["records"]]


def keep(records: Sequence[Record], options: argparse.Namespace) -> None:
    """Writes the records to ``--records``, so that a kill leaves the old file or the new one."""
    if options.records is None:
        return
    options.records.parent.mkdir(parents=True, exist_ok=True)
    partial = options.records.with_suffix(".part")
    torch.save({"settings": settings(options), "records": [vars(r) for r in records]}, partial)
    partial.replace(options.records)


# ---- cost, picture --------------------------------------------------------------------------------------------------


def sharing(fx: FeatureExtractor, scene: Scene, home: Path, repeats: int) -> dict[str, Any]:
    """What the variants of one image cost together, as a share of as many calls; and with their LoRAs kept loaded.

    In pairs, one right after the other, each order in turn.
    """
    named: dict[str, Any] = {BASE: [], **techniques(fx, [scene], home)}

    def apart() -> None:
        for suppress in named.values():
            fx(scene.image, suppress=suppress)

    def together() -> None:
        variants(fx, scene.image, named)

    def ratios() -> dict[str, Any]:
        found = [pair_of_costs(together, apart, swap=bool(i % 2)) for i in range(repeats)]
        return {
            "time": spread(a.wall / b.wall for a, b in found), "cpu": spread(a.cpu / b.cpu for a, b in found),
            "apart_s": float(np.median([b.wall for _, b in found])),
        }  # fmt: skip

    apart()  # the first call of a technique reads it from the disk
    each_loads = ratios()
    with loaded(fx, [one for techniques in named.values() for one in techniques]):
        return {"variants": len(named), "to separate calls": each_loads, "to separate calls, all loaded": ratios()}


def draw(fx: FeatureExtractor, scene: Scene, home: Path, timesteps: Sequence[int], target: Path) -> None:
    """The shift of one scene as a picture, of the last activation."""
    drawn = {name: one for name, one in techniques(fx, [scene], home).items() if name in ("caption", "canny", "all")}
    named, activation = {BASE: [], **drawn}, fx.activations[-1].id
    found = {t: variants(fx, scene.image, named, seed=0, activations=activation, t=t) for t in timesteps}
    rows = {name: {t: found[t][name][activation][0] for t in timesteps} for name in named}
    target.parent.mkdir(parents=True, exist_ok=True)
    shift_sheet(scene.image, rows, truth([scene])[0]).save(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="test", choices=["validation", "test", "held-out"])
    parser.add_argument("--style", help="draw all scenes in this style (default: each in its own)")
    parser.add_argument("--train", type=int, default=64, help="scenes that probes learn from (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=32, help="scenes they are tested on (default: %(default)s)")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[50, 200, 400, 600])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1000, 2000])
    parser.add_argument("--activations", nargs="+", default=["practical"])
    parser.add_argument(
        "--steps", type=int, default=200, help="of the learned mixture's training (default: %(default)s)"
    )
    parser.add_argument("--weights", type=Path, default=Path(path()).parent, metavar="FOLDER",
                        help="of canny/ and lora/*.safetensors (default: those of the embedded model)")  # fmt: skip
    parser.add_argument(
        "--sharing", type=int, metavar="N", help="time variants against separate calls instead, N times"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the shift of one scene there instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--records", type=Path, metavar="FILE", help="keep each t and seed there, and go on from them")
    options = parser.parse_args()
    fx = FeatureExtractor.from_pretrained("embedded", options.activations)
    test = scenes_of(options.split, options.scenes, options.style)
    there = techniques(fx, test, options.weights)
    if absent := [name for name in WEIGHED if name not in there]:
        print(f"left out, because {options.weights} has no weights for them: {', '.join(absent)}")
    if options.picture:
        draw(fx, test[0], options.weights, options.timesteps, options.picture)
        return
    if options.sharing:
        result: dict[str, Any] = {"sharing": sharing(fx, test[0], options.weights, options.sharing)}
        print(json.dumps(result))
    else:
        result = run(fx, test, options)
    if options.json:
        about = {"machine": machine(), "split": options.split, "style": options.style, "left out": absent}
        save(options.json, {**about, **result})


def run(fx: FeatureExtractor, test: Sequence[Scene], options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints everything."""
    train, pairs = scenes_of("train", options.train, options.style), pairs_of(options.split, options.scenes)
    take = partial(measured, fx, train, test, pairs, options.weights, steps=options.steps)
    records = kept(options)
    for t, seed in itertools.product(options.timesteps, options.seeds):
        if not any((r.t, r.seed) == (t, seed) for r in records):
            records += take(t=t, seed=seed)
            keep(records, options)
        print(f"t = {t}, seed {seed}: measured", flush=True)
    rows, columns = summary(records, pairs), (*TARGETS, "edges", "score")
    cells = [[r["technique"], str(r["t"]), *("" if r[c] is None else shown(r[c]) for c in columns)] for r in rows]
    print(table(["technique", "t", *columns], cells))
    added = gains(records, pairs)
    for name, by_target in added.items():
        print(f"{name}: " + ", ".join(
            f"{target} {found['difference']:+.3f} ({found['interval'][0]:+.3f} to {found['interval'][1]:+.3f})"
            for target, found in by_target.items()
        ))  # fmt: skip
    gate = {target: foreseen(records, target, pairs) for target in TARGETS}
    for target, found in gate.items():
        low, high = found["interval"]
        print(f"score against {target}: rho {found['rho']:.2f} ({low:.2f} to {high:.2f}) over {found['gains']} gains")
    return {
        "rows": rows, "gains": added, "gate": gate, "scenes": len(test), "pairs": len(pairs), "seeds": options.seeds,
    }  # fmt: skip


if __name__ == "__main__":
    main()
