"""Heads of one kind on different features of the embedded model, trained alike: held-out mIoU, and seconds a step.

Prints a table, and writes JSON if asked. Each setting is trained once a seed, with features cached where the model is
frozen, so that the head is most of the cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import machine, table
from mmengine.config import Config
from mmengine.runner import Runner

CONFIG = Path(__file__).parents[1] / "configs" / "mmseg" / "embedded_cached_upernet.py"
#: Name → options of the backbone. Pixels and latents are what a model must beat to be worth running.
SETTINGS: dict[str, dict[str, Any]] = {
    "practical": dict(activations="practical"),
    "legacy": dict(activations="legacy"),
    "latents": dict(activations="unet-in", t=0),
    "practical, t=0": dict(activations="practical", t=0),
    "practical, t=100": dict(activations="practical", t=100),
    "practical, t=200": dict(activations="practical", t=200),
    "practical, lora": dict(activations="practical", tune=dict(type="lora", r=8, alpha=8), cache=None),
}
SPLITS = ("test", "held-out")


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(args.work or scratch)
        found = {
            name: [run(SETTINGS[name], seed, args, work / f"{number}-{seed}", work) for seed in range(args.seeds)]
            for number, name in enumerate(args.settings)
        }
    head = ["features", *(f"mIoU, {split}" for split in SPLITS), "ms a step"]
    print(table(head, [[name, *_cells(runs)] for name, runs in found.items()]))
    if args.json:
        settings = {"scenes": args.scenes, "test_scenes": args.test_scenes, "steps": args.steps}
        args.json.write_text(json.dumps({"machine": machine(), **settings, "runs": found}, indent=1) + "\n")


def run(
    backbone: dict[str, Any], seed: int, args: argparse.Namespace, work_dir: Path, shared: Path
) -> dict[str, float]:
    """Train one head and score it on each split: split → mIoU in 0 to 1, and the mean time of a step."""
    config = Config.fromfile(CONFIG)
    config.work_dir, config.log_level = str(work_dir), "ERROR"
    config.randomness.seed = seed
    config.model.backbone.update(cache=str(shared / "features"))
    config.model.backbone.update(backbone)
    levels = _levels(backbone)
    config.model.decode_head.update(in_channels=[64] * levels, in_index=[*range(levels)])
    config.model.auxiliary_head.in_index = min(1, levels - 1)
    config.train_dataloader.dataset.update(data_root=str(shared / "scenes"), count=args.scenes)
    for split in ("val", "test"):
        config[f"{split}_dataloader"].dataset.update(data_root=str(shared / "scenes"), count=args.test_scenes)
    config.train_cfg.update(max_iters=args.steps, val_interval=args.steps + 1)
    config.param_scheduler[0].end = args.steps
    runner = Runner.from_cfg(config)
    begin = time.perf_counter()
    runner.train()
    result = {"seconds_per_step": (time.perf_counter() - begin) / args.steps}
    config.load_from = str(work_dir / f"iter_{args.steps}.pth")
    return result | {split: _score(config, split) for split in SPLITS}


def _score(config: Config, split: str) -> float:
    config.test_dataloader.dataset.split = split
    return float(Runner.from_cfg(config).test()["mIoU"]) / 100


def _levels(backbone: dict[str, Any]) -> int:
    return 1 if backbone["activations"] == "unet-in" else 3


def _cells(runs: list[dict[str, float]]) -> list[str]:
    """Mean over seeds, and the lowest and highest."""
    cells = []
    for split in SPLITS:
        values = [one[split] for one in runs]
        cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})")
    return [*cells, f"{1000 * statistics.mean(one['seconds_per_step'] for one in runs):.0f}"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=500, help="to train on")
    parser.add_argument("--test-scenes", type=int, default=200, help="of each split to score on")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--work", type=Path, help="keep scenes, features and checkpoints here")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
