"""Does the atlas find what full probing finds?

``python benchmarks/atlas.py`` compares, over several seeds, the atlas with a linear probe of every candidate: the rank
correlation within the shortlist, whether the best candidate stays in it, and the time that measuring took. It uses an
embedded model and its world: scenes of the validation split for measuring and for training the probes, others of the
chosen split for testing them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from figures import across, save, shown
from scipy.stats import spearmanr

from diffusion_features import FeatureExtractor
from diffusion_features.atlas import (
    PUBLISHED_SHARE,
    Labelled,
    candidates,
    choose,
    measure,
    place_filter,
    probe,
    published_filter,
)
from diffusion_features.embedded.dataset import SPLITS
from diffusion_features.embedded.world import render

FIGURES = (
    "candidates",
    "kept",
    "spearman",
    "best_is_kept",
    "best_miou",
    "best_kept_miou",
    "best_by_kind_miou",
    "seconds",
)
APART = 1_000_000
"""Test scenes begin so far into their split, beyond those that are measured and trained on."""


def labelled(split: str, first: int, count: int) -> list[Labelled]:
    scenes = (render(SPLITS[split] + first + i) for i in range(count))
    return [Labelled(s.image, s.semantic, s.caption) for s in scenes]


def one(fx: FeatureExtractor, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Everything for one seed: other images, other noise."""
    chosen = candidates(fx.available)
    offset = seed * (options.images + options.train)
    images = labelled("validation", offset, options.images)
    begin = time.perf_counter()
    entries = measure(
        fx, [s.image for s in images], chosen, [s.prompt for s in images], t=options.t, seed=seed, draws=options.draws
    )
    seconds = time.perf_counter() - begin
    choice = choose(entries, by_name=place_filter(chosen), most=round(PUBLISHED_SHARE * len(chosen)))
    truth = probe(
        fx, labelled("validation", offset + options.images, options.train),
        labelled(options.split, APART + seed * options.test, options.test), [a.id for a in chosen],
        t=options.t, seed=seed,
    )  # fmt: skip
    best = max(truth, key=truth.__getitem__)
    kept, by_kind = [*choice.shortlist], choose(entries, by_name=published_filter(chosen)).shortlist
    best_kept, best_by_kind = max(kept, key=truth.__getitem__), max(by_kind, key=truth.__getitem__)
    return {
        "seed": seed, "seconds": seconds, "forwards": options.images, "candidates": len(chosen), "kept": len(kept),
        "spearman": float(spearmanr([choice.shortlist[id] for id in kept], [truth[id] for id in kept]).statistic),
        "best": best, "best_miou": truth[best], "best_is_kept": best in choice.shortlist,
        "best_kept": best_kept, "best_kept_miou": truth[best_kept],
        "best_by_kind": best_by_kind, "best_by_kind_miou": truth[best_by_kind],
        "better_than_all_kept": sum(value > truth[best_kept] for value in truth.values()), "preset": choice.preset,
        "properties": {e.activation.id: e.properties._asdict() for e in entries}, "probe": truth,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="a pipeline that knows the drawn world (default: embedded)")
    parser.add_argument("--split", choices=["validation", "test", "held-out"], default="validation")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--images", type=int, default=8, help="measured (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=4, help="of the noise for each (default: %(default)s)")
    parser.add_argument("--train", type=int, default=48, help="images that train a probe (default: %(default)s)")
    parser.add_argument("--test", type=int, default=24, help="images that test it (default: %(default)s)")
    parser.add_argument("--t", type=int, default=50)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    fx = FeatureExtractor.from_pretrained(options.model, activations="*")
    results = []
    for seed in range(options.first, options.first + options.seeds):
        results.append(one(fx, options, seed))
        brief = {key: value for key, value in results[-1].items() if key not in ("properties", "probe")}
        print(json.dumps(brief, indent=1), flush=True)
    whole = {name: across(r[name] for r in results) for name in FIGURES}
    for name, figure in whole.items():
        print(f"{name}, {len(results)} seeds: {shown(figure)}")
    if options.json:
        about = {"model": options.model, "threads": torch.get_num_threads(), "t": options.t, "split": options.split}
        save(options.json, {**about, **whole, "seeds": results})


if __name__ == "__main__":
    main()
