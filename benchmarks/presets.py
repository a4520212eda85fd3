"""Presets compared on three tasks: practical, legacy, and what the atlas chooses without labels; over several seeds.

``python benchmarks/presets.py`` uses the embedded model and its drawn world. Each seed takes other validation scenes to
choose and to train on, and other noise; all are tested on the same scenes of the test split:

- probe: mean IoU of a linear probe (ridge regression) of all activations together, enlarged to the finest grid;
- pck: keypoints found by nearest neighbour within 0.1 of the object's box, per point;
- parts: mean IoU of parts by the ensemble of pixel classifiers, from a few labelled scenes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import correspondence
import numpy as np
import parts
import torch
import torch.nn.functional as F
from figures import across, save, shown
from PIL import Image

from diffusion_features import FeatureExtractor
from diffusion_features.atlas import PUBLISHED_SHARE, candidates, choose, measure, place_filter
from diffusion_features.atlas.probing import Ridge, confusion_matrix, mean_iou
from diffusion_features.correspondence import embedded_pairs, summary
from diffusion_features.correspondence import measure as match_pairs
from diffusion_features.embedded import CLASSES
from diffusion_features.embedded.dataset import write
from diffusion_features.images import read_image
from diffusion_features.sampling import Features

TASKS = ("probe", "pck", "parts")
CHOSEN = "atlas"


def probed(features: Callable[[Path], Features], train: Sequence[Path], test: Sequence[Path]) -> float:
    """Mean IoU of a linear probe of all activations together."""
    ridge, together = Ridge(), np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    for path in train:
        x = side_by_side(features(path))
        shares = F.one_hot(torch.from_numpy(labels_of(path, "ann_dir")).long(), len(CLASSES)).permute(2, 0, 1).float()
        pooled = F.adaptive_avg_pool2d(shares, (x.shape[-2], x.shape[-1]))
        ridge.add(x.flatten(1).T, pooled.flatten(1).T)
    weights, bias = ridge.solve()
    for path in test:
        truth = labels_of(path, "ann_dir")
        scores = torch.einsum("chw,ck->khw", side_by_side(features(path)).double(), weights) + bias[:, None, None]
        large = F.interpolate(scores[None], truth.shape, mode="bilinear", align_corners=False)[0]
        together += confusion_matrix(truth, large.argmax(dim=0).numpy(), len(CLASSES))
    return mean_iou(together)


def side_by_side(features: Features) -> torch.Tensor:
    """All activations of an image on the finest grid among theirs: (C, h, w), on the CPU."""
    finest = max((tensor.shape[-2:] for tensor in features.values()), key=lambda size: size[0] * size[1])
    large = [F.interpolate(x[None].float(), tuple(finest), mode="bilinear")[0] for x in features.values()]
    return torch.cat(large).cpu()


def labels_of(path: Path, kind: str) -> np.ndarray:
    """The label map of a scene's image, from ``ann_dir`` or ``parts_dir``."""
    folder, split = path.parent.parent.parent, path.parent.name
    return np.array(Image.open(folder / kind / split / path.name))


def one(fx: FeatureExtractor, options: argparse.Namespace, world: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Every preset on every task for one seed."""
    learn = sorted((world / "img_dir" / "validation").iterdir())
    learn = [learn[i] for i in np.random.default_rng(seed).permutation(len(learn))]
    measured, train, few = np.split(np.array(learn), [options.images, options.images + options.train])
    test = sorted((world / "img_dir" / "test").iterdir())
    pairs = embedded_pairs(world, "test")
    images = [read_image(path) for path in measured]
    chosen = candidates(fx.available)
    found = measure(fx, images, chosen, [""] * len(images), t=options.t, seed=seed)
    presets: dict[str, str | list[str]] = {"practical": "practical", "legacy": "legacy"}
    choice = choose(found, by_name=place_filter(chosen), most=round(PUBLISHED_SHARE * len(chosen)))
    presets[CHOSEN] = [*choice.preset]
    results: dict[str, dict[str, Any]] = {}
    for name, preset in presets.items():
        features = correspondence.features_of(fx, preset, options, seed)
        labelled, truth = ({str(p): labels_of(p, "parts_dir") for p in paths} for paths in (few[: options.few], test))
        results[name] = {
            "probe": probed(features, [*train], test),
            "pck": summary(match_pairs(pairs, features))["bbox per point"]["0.1"],
            "parts": parts.one(lambda key, get=features: get(Path(key)), labelled, truth, seed, options),
        }
        print(f"seed {seed}, {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in results[name].items()), flush=True)
    results[CHOSEN]["activations"] = presets[CHOSEN]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--images", type=int, default=8, help="scenes the atlas measures (default: %(default)s)")
    parser.add_argument("--train", type=int, default=96, help="scenes that train a probe (default: %(default)s)")
    parser.add_argument("--few", type=int, default=30, help="scenes with parts to learn from (default: %(default)s)")
    parser.add_argument("--test", type=int, default=96, help="scenes to test on (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="of the pixel classifiers (default: %(default)s)")
    parser.add_argument("--t", type=int, default=50)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    fx = FeatureExtractor.from_pretrained("embedded", "*", prompts="")
    options.prompt, options.size, options.device = "", None, str(fx.device)
    options.keep = options.train + options.few + options.test
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        write(world, "validation", 2 * (options.images + options.train + options.few))
        write(world, "test", options.test)
        seeds = [one(fx, options, world, seed) for seed in range(options.seeds)]
    result: dict[str, Any] = {"t": options.t, "chosen": [found[CHOSEN]["activations"] for found in seeds]}
    for name in seeds[0]:
        result[name] = {task: across(found[name][task] for found in seeds) for task in TASKS}
        print(f"{name}: " + ", ".join(f"{task} {shown(result[name][task])}" for task in TASKS), flush=True)
    if options.json:
        save(options.json, result)


if __name__ == "__main__":
    main()
