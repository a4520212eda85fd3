"""Heads of one kind on different features of the embedded model, trained alike: mIoU, and where the time goes.

Prints a table, and writes JSON if asked. Each setting is trained once a seed. Features of frozen models are cached, so
that from the second epoch on the head is most of the cost; the last column says how much more than that is left. What
a model must beat to be worth running: pixels, latents, and an encoder of as many operations that learns from nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from measure import machine, table
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModule
from mmengine.registry import HOOKS, init_default_scope
from mmengine.runner import Runner
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle
from torch.utils.flop_counter import FlopCounterMode

from segmentors.mmseg.backbone import projection_of

CONFIG = Path(__file__).parents[1] / "configs" / "mmseg" / "embedded_cached_upernet.py"
QUERIES = ["up-level1-repeat1-vit-block0-cross-q", "up-level2-repeat1-vit-block0-cross-q"]
QUERIES = [*QUERIES, "up-level3-repeat0-vit-block0-self-k"]
DENOISE = dict(type="Denoise", by=20, steps=2)
#: Name → options of the backbone, or another backbone.
SETTINGS: dict[str, dict[str, Any]] = {
    "pixels": dict(type="PixelPyramid"),
    "latents": dict(activations="unet-in", t=0),
    "from scratch": dict(type="ResNetV1c"),
    "practical": dict(),
    "legacy": dict(activations="legacy"),
    "practical and legacy": dict(activations=["practical", "legacy"]),
    "queries and keys": dict(activations=QUERIES),
    "outputs of the same blocks": dict(activations=[f"{id.partition('-block0')[0]}-out" for id in QUERIES]),
    **{f"practical, t={t}": dict(t=t) for t in (0, 100, 200, 400)},
    "practical, LoRA": dict(tune=dict(type="lora", r=8, alpha=8), cache=None),
    "practical, captions": dict(prompt_key="prompt"),
    "practical, denoised": dict(suppress=[DENOISE]),
    "practical, amalgamated": dict(amalgamate=dict(variants=[[], [DENOISE]], how="assigned")),
    "practical, kept as int8": dict(cache=dict(dtype="int8")),
    "practical, 16 components": dict(cache=dict(dtype="float16", components=16)),
}
SPLITS = ("test", "held-out")
STRIDES = (4, 8, 16)


@MODELS.register_module()
class PixelPyramid(BaseModule):
    """The image itself at each stride, with nothing lost: a cell's channels are the pixels below it."""

    channels = (64, 64, 64)

    def __init__(self, projection: dict[str, Any]) -> None:
        super().__init__()
        self.projections = nn.ModuleList(projection_of([3 * stride**2], projection) for stride in STRIDES)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            project([pixel_unshuffle(x, stride)])
            for stride, project in zip(STRIDES, self.projections, strict=True)
        )  # fmt: skip


@HOOKS.register_module()
class SplitHook(Hook):
    """Seconds of each training step: until its data is there, in the backbone's forward pass, and in all else."""

    priority = "LOWEST"
    parts: ClassVar[tuple[str, ...]] = ("data", "backbone", "head")

    def before_train(self, runner: Any) -> None:
        self.steps: list[dict[str, float]] = []
        runner.model.backbone.register_forward_pre_hook(self._enter)
        runner.model.backbone.register_forward_hook(self._leave)

    def before_train_epoch(self, runner: Any) -> None:
        self._mark = _now()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self._begin = _now()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        end, backbone = _now(), self._left - self._entered
        seconds = (self._begin - self._mark, backbone, end - self._begin - backbone)
        self.steps.append(dict(zip(self.parts, seconds, strict=True)))
        self._mark = end

    def _enter(self, *_: Any) -> None:
        self._entered = _now()

    def _leave(self, *_: Any) -> None:
        self._left = _now()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    args = _arguments()
    init_default_scope("mmseg")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(args.work or scratch)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.settings}
        for (number, name), seed in itertools.product(enumerate(args.settings), range(args.seeds)):
            found[name].append(run(SETTINGS[name], seed, args, work / f"{number}-{seed}", work))
            print(
                f"{name}, seed {seed}: " + ", ".join(f"{split} {found[name][-1][split]:.3f}" for split in SPLITS),
                flush=True,
            )
            _keep(args, found)
    epochs = [f"{epoch}: {part}, ms" for epoch in ("first epoch", "later") for part in SplitHook.parts]
    head = ["features", *(f"mIoU, {split}" for split in SPLITS), *epochs, "later / (data + head)"]
    print(table(head, [[name, *_cells(runs)] for name, runs in found.items()]))


def _keep(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    """Write what there is so far, if a file is asked for."""
    if args.json:
        settings = {"scenes": args.scenes, "test_scenes": args.test_scenes, "steps": args.steps}
        args.json.write_text(json.dumps({"machine": machine(), **settings, "runs": found}, indent=1) + "\n")


def run(setting: dict[str, Any], seed: int, args: argparse.Namespace, work_dir: Path, shared: Path) -> dict[str, Any]:
    """Train one head and score it: split → mIoU in 0 to 1, and the median seconds of each part of a step."""
    config = Config.fromfile(CONFIG)
    config.work_dir, config.log_level = str(work_dir), "ERROR"
    config.randomness.seed = seed
    config.train_dataloader.dataset.update(data_root=str(shared / "scenes"), count=args.scenes)
    for split in ("val", "test"):
        config[f"{split}_dataloader"].dataset.update(data_root=str(shared / "scenes"), count=args.test_scenes)
    config.train_cfg.update(max_iters=args.steps, val_interval=args.steps + 1)
    config.param_scheduler[0].end = config.default_hooks.checkpoint.interval = args.steps
    config.custom_hooks.append(dict(type="SplitHook"))
    operations = _use(config, setting, shared)
    runner = Runner.from_cfg(config)
    runner.train()
    config.load_from = str(work_dir / f"iter_{args.steps}.pth")
    (split,) = (hook for hook in runner.hooks if isinstance(hook, SplitHook))
    times = _times(split.steps, math.ceil(args.scenes / config.train_dataloader.batch_size))
    cached = bool(config.model.backbone.get("cache"))
    return {**operations, **times, "cached": cached, **{split: _score(config, split) for split in SPLITS}}


def _use(config: Config, setting: dict[str, Any], shared: Path) -> dict[str, float]:
    """Put a setting into the config; says how many operations its encoder takes if it was chosen by that."""
    model, backbone = config.model, config.model.backbone
    if setting.get("type") == "ResNetV1c":
        model.type, width, operations = "EncoderDecoder", *_equal_compute(backbone)
        model.backbone = _resnet(width)
        _fit(model, [width * 2**level for level in range(4)])
        return operations
    if setting.get("type") == "PixelPyramid":
        model.backbone = dict(**setting, projection=backbone.projection)
        return {}
    cache = setting.get("cache", {})
    backbone.update({**setting, "cache": cache if cache is None else dict(folder=str(shared / "features"), **cache)})
    if "prompt_key" in setting:
        for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
            loader.dataset.pipeline[-1].meta_keys = ("img_path", "ori_shape", "img_shape", "pad_shape", "prompt")
    if backbone.activations == "unet-in":
        _fit(model, [64])
    return {}


def _fit(model: Any, channels: list[int]) -> None:
    """Heads for levels of so many channels."""
    model.decode_head.update(in_channels=channels, in_index=[*range(len(channels))])
    middle = min(1, len(channels) - 1)
    model.auxiliary_head.update(in_channels=channels[middle], in_index=middle)


def _resnet(width: int) -> dict[str, Any]:
    norm = dict(type="BN", requires_grad=True)
    return dict(type="ResNetV1c", depth=18, stem_channels=width, base_channels=width, norm_cfg=norm)


def _equal_compute(backbone: Any) -> tuple[int, dict[str, float]]:
    """The width of a ResNet-18 whose forward pass is nearest to that of the frozen model, and the GFLOPs of both."""
    wanted = _gflops({**backbone, "cache": None})
    with torch.device("meta"):  # operations are counted without being done
        found = {width: _gflops(_resnet(width)) for width in range(8, 161, 8)}
    width = min(found, key=lambda width: abs(found[width] - wanted))
    return width, {"width": width, "gflops": found[width], "gflops_of_the_model": wanted}


def _gflops(config: dict[str, Any]) -> float:
    """Of one image of 128 pixels."""
    made = MODELS.build(config)
    made.eval()  # which returns nothing where mmseg has a train() of its own
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(torch.zeros(1, 3, 128, 128))
    return counter.get_total_flops() / 1e9


def _times(steps: list[dict[str, float]], epoch: int) -> dict[str, dict[str, float] | None]:
    """Median seconds of each part in the first epoch, without the step that warms up, and in all that follow."""

    def median(some: list[dict[str, float]]) -> dict[str, float] | None:
        return {part: statistics.median(step[part] for step in some) for part in SplitHook.parts} if some else None

    return {"first_epoch": median(steps[1:epoch]), "later": median(steps[epoch:])}


def _score(config: Config, split: str) -> float:
    config.test_dataloader.dataset.split = split
    return float(Runner.from_cfg(config).test()["mIoU"]) / 100


def _cells(runs: list[dict[str, Any]]) -> list[str]:
    """Mean over seeds, and the lowest and highest; of times, the medians of the first seed, which fills the cache."""
    cells = []
    for split in SPLITS:
        values = [one[split] for one in runs]
        cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})")
    for epoch in ("first_epoch", "later"):
        parts = runs[0][epoch]
        cells += [f"{1000 * parts[part]:.0f}" if parts else "–" for part in SplitHook.parts]
    later = runs[0]["later"] if runs[0]["cached"] else None
    return [*cells, f"{sum(later.values()) / (later['data'] + later['head']):.2f}" if later else "–"]


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
