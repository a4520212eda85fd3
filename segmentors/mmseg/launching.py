"""What the two commands share: reading a config, choosing where results go, and beginning a distributed run."""

from __future__ import annotations

import argparse
import difflib
import os
import tempfile
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import Runner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a config file of mmsegmentation, ours or any other")
    parser.add_argument("--work-dir", type=Path, help="where results go; work_dirs/NAME_OF_CONFIG if not given")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE",
        help="change the config, such as model.backbone.t=100",
    )  # fmt: skip
    parser.add_argument(
        "--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none",
        help="what started the processes: pytorch for torchrun, one a GPU, or any number on a CPU",
    )  # fmt: skip
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # older launchers pass it


def read_config(args: argparse.Namespace) -> Config:
    """The config with what the command line changes.

    Raises:
        SystemExit: there is no such file.
    """
    if not args.config.is_file():
        raise SystemExit(f"there is no config {args.config}{_meant(args.config)}")
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options)
    config.launcher = args.launcher
    config.work_dir = str(args.work_dir or config.get("work_dir") or Path("work_dirs") / args.config.stem)
    return config


def check_checkpoint(file: Path) -> None:
    """Raises SystemExit if there is none."""
    if not file.is_file():
        raise SystemExit(f"there is no checkpoint {file}")


def begin(config: Config) -> Runner:
    """The runner of a config, with every process of a distributed run connected.

    mmengine begins distributed runs for GPUs only; on a CPU this connects the processes by gloo.

    Raises:
        SystemExit: results cannot be written.
    """
    _check_writable(Path(config.work_dir))
    if config.launcher == "pytorch" and not torch.cuda.is_available():
        torch.distributed.init_process_group("gloo")
        wrapper = dict(
            type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False,
            find_unused_parameters=config.get("find_unused_parameters", False),
        )  # fmt: skip
        config.setdefault("model_wrapper_cfg", wrapper)
    init_default_scope(config.get("default_scope", "mmseg"))
    return Runner.from_cfg(config)


def finish() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _meant(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs/mmseg")
    near = difflib.get_close_matches(path.name, [file.name for file in folder.glob("*.py")], n=3)
    return f"; did you mean {', '.join(str(folder / name) for name in near)}?" if near else ""


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or 0)
        raise SystemExit(f"results cannot be written to {folder} ({reason}); choose another with --work-dir") from error
