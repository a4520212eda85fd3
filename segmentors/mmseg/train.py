"""``python -m segmentors.mmseg.train CONFIG``: train what a config of mmsegmentation describes."""

from __future__ import annotations

import argparse

import torch
from mmengine.config import Config

from . import launching


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    config = launching.read_config(args)
    if args.resume is not None:
        config.resume = True
        config.load_from = None if args.resume == "latest" else args.resume
    if args.amp:
        _use_amp(config)
    launching.begin(config).train()
    launching.finish()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m segmentors.mmseg.train", description=__doc__)
    launching.add_arguments(parser)
    parser.add_argument(
        "--resume", nargs="?", const="latest", metavar="CHECKPOINT",
        help="go on from a checkpoint; without its name, from the last in the work dir, if there is one",
    )  # fmt: skip
    parser.add_argument("--amp", action="store_true", help="automatic mixed precision; bfloat16 on a CPU")
    return parser


def _use_amp(config: Config) -> None:
    """Raises SystemExit where the config has an optimizer wrapper of its own kind."""
    if config.optim_wrapper.get("type", "OptimWrapper") not in ("OptimWrapper", "AmpOptimWrapper"):
        raise SystemExit(f"--amp goes with OptimWrapper only, and the config has {config.optim_wrapper.type}")
    if not torch.cuda.is_available():
        for scaling in ("loss_scale", "dtype"):
            config.optim_wrapper.pop(scaling, None)
        config.optim_wrapper.type = "CpuAmpOptimWrapper"
        return
    config.optim_wrapper.type = "AmpOptimWrapper"
    config.optim_wrapper.setdefault("loss_scale", "dynamic")


if __name__ == "__main__":
    main()
