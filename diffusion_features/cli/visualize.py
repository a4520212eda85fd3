"""``diffusion-features visualize``: images or stored features in, pictures of the features out."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections import Counter
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    import torch
    from PIL import Image

DESCRIPTION = """\
Draw each feature of an image beside it, one PNG an image: the first three principal components as red, green and
blue. Attention maps are drawn token by token for text, and by principal components of their rows for images.
Text-side activations have no picture.
"""
EXAMPLES = """\
  diffusion-features visualize photo.jpg -o features.png
  diffusion-features visualize photos/ -o pictures/ --activations 'up-*-res-out' --t 50 --t 300
  diffusion-features visualize features/ -o pictures/        # a folder written by extract
"""


def add(commands: Any) -> None:
    parser = options.command(commands, "visualize", "draw the features of images", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="image files, folders of images, or one folder written by extract"
    )
    parser.add_argument("-o", "--output", required=True, type=Path, help="a .png for one image; else a folder")
    options.add_call(parser)
    options.add_model(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from diffusion_features.store import is_store

    stores = [folder for folder in args.inputs if is_store(folder)]
    if not stores:
        return _from_images(args)
    if len(args.inputs) > 1:
        raise ValueError(f"{stores[0]} is a folder of features: give it alone, one at a time")
    return _from_store(args)


def _from_images(args: argparse.Namespace) -> int:
    from diffusion_features.cli.work import Report, items
    from diffusion_features.images import ImageError, check_size, image_keys

    keys = image_keys(args.inputs)
    targets = _targets(args.output, [*keys])
    prompts = options.prompts_of(args, keys)
    one_prompt = args.prompt_file is None
    fx = options.load(args, args.activations or options.ACTIVATIONS, [*set(prompts.values())] if one_prompt else None)
    if args.size:
        check_size(args.size, fx.multiple)
    times = args.t or options.TIMESTEPS
    with Report(len(keys)) as report:
        for item in items(keys, prompts, args.size, fx.multiple, report):
            try:
                image = item.read()
            except ImageError as error:
                report.failure(error)
                continue
            features = fx(image, prompt=item.prompt, t=times, seed=args.seed)
            _save(targets[item.key], image, {id: tensor[0] for id, tensor in features.items()}, times)
            report.done()
    return _end(args, len(keys) - report.failed, report.failed)


def _from_store(args: argparse.Namespace) -> int:
    from PIL import Image

    from diffusion_features.cli.work import Report
    from diffusion_features.images import ImageError, read_image
    from diffusion_features.store import Store

    defaults = {**options.MODEL_DEFAULTS, **options.CALL_DEFAULTS}
    if given := [f"--{name.replace('_', '-')}" for name, value in defaults.items() if getattr(args, name) != value]:
        raise ValueError(f"{args.inputs[0]} holds features that are made already: {', '.join(given)} cannot apply")
    store = Store.open(args.inputs[0])
    if not len(store):
        raise ValueError(f"{store.folder} holds no features yet")
    ids = _chosen([*store.settings["activations"]], args.activations or ["*"])
    targets = _targets(args.output, [*store])
    times = store.settings["t"]
    with Report(len(store)) as report:
        for key in store:
            height, width = store.record(key)["size"]
            image: Image.Image | None = None
            try:
                image = read_image(store.record(key)["source"]).resize((width, height), Image.Resampling.LANCZOS)
            except ImageError as error:
                report.once("source", f"{error} Its picture shows the features alone, and others likewise.")
            features = store.read(key, ids)
            _save(
                targets[key],
                image,
                features if len(times) > 1 else {id: tensor[None] for id, tensor in features.items()},
                times,
            )
            report.done()
    return _end(args, len(store), 0)


def _chosen(ids: list[str], patterns: list[str]) -> list[str]:
    for pattern in patterns:
        if not fnmatch.filter(ids, pattern):
            raise ValueError(f"no stored activation matches {pattern!r}; there are {', '.join(ids)}")
    return [id for id in ids if any(fnmatch.fnmatchcase(id, pattern) for pattern in patterns)]


def _targets(output: Path, keys: list[str]) -> dict[str, Path]:
    """The PNG of each image; two that differ only in how they end keep their ends.

    Raises:
        ValueError: one PNG is asked for, but there are several images.
    """
    if output.suffix.lower() != ".png" or output.is_dir():
        names = Counter(PurePath(key).with_suffix("") for key in keys)
        bare = {key: PurePath(key).with_suffix("") for key in keys}
        return {key: output / f"{bare[key] if names[bare[key]] == 1 else key}.png" for key in keys}
    if len(keys) > 1:
        raise ValueError(f"{len(keys)} images give a picture each: -o must be a folder, not {output}")
    return {keys[0]: output}


def _save(target: Path, image: Image.Image | None, features: dict[str, torch.Tensor], times: list[int]) -> None:
    """Draw and write one sheet; each feature has an axis of timesteps in front."""
    from diffusion_features.visualize import contact_sheet

    tiles = {
        f"{id}  t={t}" if len(times) > 1 else id: tensor[index]
        for id, tensor in features.items()
        for index, t in enumerate(times)
    }
    sheet = contact_sheet(image, tiles)
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)


def _end(args: argparse.Namespace, drawn: int, failed: int) -> int:
    where = args.output if drawn else "nowhere"
    print(f"{drawn} drawn to {where}" + (f", {failed} could not be read" if failed else ""), file=sys.stderr)
    return 1 if failed else 0
