"""Small configs: the tiny random pipeline under a small head, on a few drawn scenes of 64 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

CONFIGS = Path(__file__).parents[2] / "configs" / "mmseg"
NORM = dict(type="GN", num_groups=4)


def config(model: str | Path, data: Path, work_dir: Path, **backbone: Any) -> Config:
    """Twelve iterations of two scenes, a checkpoint every six."""
    config = Config.fromfile(CONFIGS / "embedded_practical_upernet.py")
    projection = dict(channels=8, norm=NORM)
    config.model.backbone = dict(type="DiffusionBackbone", model=str(model), projection=projection, **backbone)
    config.model.decode_head.update(in_channels=[8, 8, 8], channels=8, norm_cfg=NORM)
    config.model.auxiliary_head.update(in_channels=8, channels=8, norm_cfg=NORM)
    for split, count in (("train", 8), ("val", 2), ("test", 2)):
        loader = config[f"{split}_dataloader"]
        loader.dataset.update(data_root=str(data), count=count, size=64)
        loader.batch_size = min(loader.batch_size, 2)
    config.train_cfg.update(max_iters=12, val_interval=6)
    config.param_scheduler[0].end = 12
    config.default_hooks.checkpoint.update(interval=6, max_keep_ckpts=-1, save_best=None)
    config.work_dir = str(work_dir)
    return config


def written(config: Config, folder: Path) -> str:
    """The config as a file, as the commands take it."""
    path = folder / "config.py"
    folder.mkdir(parents=True, exist_ok=True)
    config.dump(path)
    return str(path)


def weights(work_dir: str | Path, iteration: int = 12) -> dict[str, torch.Tensor]:
    """What a run saved."""
    state = torch.load(Path(work_dir) / f"iter_{iteration}.pth", weights_only=False)["state_dict"]
    return {name: value for name, value in state.items() if value.is_floating_point()}
