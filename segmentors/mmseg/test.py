"""``python -m segmentors.mmseg.test CONFIG CHECKPOINT``: score a trained model on the test split of its config."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmseg.registry import MODELS

from . import launching
from .training_free import TrainingFreeSegmentor


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.checkpoint is not None:
        launching.check_checkpoint(args.checkpoint)
    config = launching.read_config(args)
    config.load_from = _weights(config, args.checkpoint)
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
    parser.add_argument("checkpoint", type=Path, nargs="?", help="what training saved; without, the config's load_from")
    parser.add_argument("--tta", action="store_true", help="average over the views of the config's tta_pipeline")
    parser.add_argument("--show-dir", type=Path, help="draw predictions beside the truth into this folder")
    parser.add_argument("--out", type=Path, help="write predicted label maps into this folder, as PNG")
    return parser


def _weights(config: Config, checkpoint: Path | None) -> str | None:
    """Where the weights to score are; ``None`` for a model that has nothing to learn.

    Raises:
        SystemExit: nothing says where. A head as it was drawn at random would get a score like any other.
    """
    if checkpoint is not None:
        return str(checkpoint)
    if found := config.get("load_from") or _initial(config.model):
        return str(found)
    kind = MODELS.get(config.model.type) if isinstance(config.model.type, str) else config.model.type
    if isinstance(kind, type) and issubclass(kind, TrainingFreeSegmentor):
        return None
    raise SystemExit(
        f"{config.filename} describes a model that must be trained, and nothing says where its weights are: name the "
        "checkpoint that training saved behind the config, or set load_from in the config"
    )


def _initial(model: ConfigDict) -> str | None:
    """The checkpoint that the whole model begins with, which mmengine loads before training but not before a test."""
    several = model.get("init_cfg") or []
    for one in [several] if isinstance(several, dict) else several:
        if one.get("type") == "Pretrained" and not one.get("prefix"):  # a prefix: a part of some other model's file
            return str(one["checkpoint"])
    return None


def _use_tta(config: Config) -> None:
    """Raises SystemExit where the config does not say which views."""
    if missing := [name for name in ("tta_pipeline", "tta_model") if name not in config]:
        raise SystemExit(f"--tta needs {' and '.join(missing)} in the config")
    config.test_dataloader.dataset.pipeline = config.tta_pipeline
    config.model = ConfigDict(**config.tta_model, module=config.model)


if __name__ == "__main__":
    main()
