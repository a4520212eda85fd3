"""``python -m segmentors.mmseg.test CONFIG CHECKPOINT``: score a trained model on the test split of its config."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmengine.config import Config, ConfigDict

from . import launching


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.checkpoint is not None:
        launching.check_checkpoint(args.checkpoint)
    config = launching.read_config(args)
    config.load_from = None if args.checkpoint is None else str(args.checkpoint)
    if args.tta:
        _use_tta(config)
    if args.show_dir is not None:
        config.default_hooks.visualization = dict(type="SegVisualizationHook", draw=True, interval=1)
        config.visualizer.save_dir = str(args.show_dir)
    if args.out is not None:
        config.test_evaluator = {**config.test_evaluator, "output_dir": str(args.out)}
    launching.begin(config).test()
    launching.finish()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m segmentors.mmseg.test", description=__doc__)
    launching.add_arguments(parser)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="what training saved; not for training-free models")
    parser.add_argument("--tta", action="store_true", help="average over the views of the config's tta_pipeline")
    parser.add_argument("--show-dir", type=Path, help="draw predictions beside the truth into this folder")
    parser.add_argument("--out", type=Path, help="write predicted label maps into this folder, as PNG")
    return parser


def _use_tta(config: Config) -> None:
    """Raises SystemExit where the config does not say which views."""
    if missing := [name for name in ("tta_pipeline", "tta_model") if name not in config]:
        raise SystemExit(f"--tta needs {' and '.join(missing)} in the config")
    config.test_dataloader.dataset.pipeline = config.tta_pipeline
    config.model = ConfigDict(**config.tta_model, module=config.model)


if __name__ == "__main__":
    main()
