"""``diffusion-features segment``: images and class names in, labels out, without training."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from . import options

if TYPE_CHECKING:
    from PIL import Image

    from segmentors import Segmentation, TrainingFreeSegmentor

DESCRIPTION = """\
Label every pixel of images with one of the classes you name, by the attention of the model and without training. For
each image NAME this writes into the output folder:
  NAME.overlay.png         the labels over the image, with a legend
  NAME.labels.png          the labels, a palette image: pixel value i is the i-th class
  NAME.scores.safetensors  "scores": (classes, height, width) in [0, 1]
  NAME.json                the classes in order, the prompts, the weight of each layer, seconds of each step
"""
EXAMPLES = """\
  diffusion-features segment photo.jpg --classes cat grass --background sky -o out/
  diffusion-features segment photos/ --classes-file classes.txt -o out/ --size 512
  diffusion-features segment photo.jpg --classes cat --background --threshold 0.5 -o out/
  diffusion-features segment photo.jpg --classes cat grass --caption 'a cat asleep on the grass' --steps -o out/
  diffusion-features segment photos/ --classes cat grass --edges pamr -o out/ \\
      --captioner Salesforce/blip-image-captioning-base
"""


def add(commands: Any) -> None:
    parser = options.command(commands, "segment", "label pixels with classes you name", DESCRIPTION, EXAMPLES)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image files, or folders to search for images")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FOLDER", help="where the results go")
    names = parser.add_mutually_exclusive_group(required=True)
    names.add_argument("--classes", nargs="+", metavar="NAME", help="names of the classes")
    names.add_argument(
        "--classes-file", type=Path, metavar="FILE", help="a class a line; more words for it behind commas"
    )
    parser.add_argument(
        "--background", nargs="*", metavar="NAME", help="things that may be there and are no class: makes a class "
        "'background'; without a name, --threshold alone is its score",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float, metavar="θ", help="added to the score of the background (default: see the docs)"
    )
    captions = parser.add_mutually_exclusive_group()
    captions.add_argument("--caption", metavar="TEXT", help="a description of the image (default: the names alone)")
    captions.add_argument("--captioner", metavar="MODEL", help="a hub id or folder of an image-to-text model of "
                          "transformers, which describes each image")  # fmt: skip
    parser.add_argument("--edges", choices=("none", "pamr", "crf"), default="none", help="bring labels to the edges "
                        "of things by their colours (default: none; crf needs pydensecrf)")  # fmt: skip
    parser.add_argument("--steps", action="store_true", help="also draw what each step does, to NAME.steps.png")
    parser.add_argument("--seed", type=options.seed, default=0, help="of the noise (default: 0)")
    parser.add_argument(
        "--size", type=options.size, metavar="N|HxW", help="height x width, or one side, that the model works at, in "
        "pixels (default: what the model was trained for, in the shape of the image)",
    )  # fmt: skip
    options.add_model(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from diffusion_features.cli.work import Report, readable
    from diffusion_features.images import image_keys
    from segmentors import Method, TrainingFreeSegmentor
    from segmentors.training_free.pictures import check_count

    keys = image_keys(args.inputs)
    classes = read_classes(args.classes_file) if args.classes_file else {name: [name] for name in _once(args.classes)}
    method = Method(edges=args.edges) if args.threshold is None else Method(edges=args.edges, threshold=args.threshold)
    segmentor = TrainingFreeSegmentor(options.load(args, ["*"]), method=method, captioner=args.captioner)
    call: dict[str, Any] = dict(background=args.background, caption=args.caption, size=args.size, seed=args.seed)
    segmentor.wanted(classes, args.background, args.caption)  # what is wrong with the names is said before any image
    check_count(len(classes) + (args.background is not None))
    with Report(len(keys)) as report:
        for key, image in readable(keys, report):
            (found,) = cast("list[Segmentation]", segmentor([image], classes, **call))
            _save(args.output / key, image, found)
            if args.steps:
                _save_steps(args.output / key, segmentor, image, found, classes, call)
            report.done()
    failed = f", {report.failed} could not be read" if report.failed else ""
    print(f"{len(keys) - report.failed} segmented to {args.output}{failed}", file=sys.stderr)
    return 1 if report.failed else 0


def read_classes(file: Path) -> dict[str, list[str]]:
    """Class → its words, from lines such as ``cat, kitten``; blank lines are passed over.

    Raises:
        ValueError: the file is no text, names nothing, or names a class twice.
        OSError: it cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} cannot be read as text: {error}") from error
    rows = [[word.strip() for word in line.split(",") if word.strip()] for line in lines]
    names = _once([row[0] for row in rows if row])
    if not names:
        raise ValueError(f"{file} names no class")
    return dict(zip(names, [row for row in rows if row], strict=True))


def _once(names: list[str]) -> list[str]:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ValueError(f"the class {name!r} is given twice")
    return names


def _save(target: Path, image: Image.Image, found: Segmentation) -> None:
    from safetensors.torch import save

    from segmentors.training_free.pictures import label_image, overlay, palette

    colours = palette(found.classes)
    about = {
        "classes": found.classes, "prompts": found.prompts, "layer_weights": dict(found.layer_weights),
        "seconds": dict(found.seconds),
    }  # fmt: skip
    scores = save({"scores": found.scores.contiguous().cpu()})
    _write(target, "scores.safetensors", lambda part: part.write_bytes(scores))
    _save_picture(target, "labels.png", label_image(found.labels, colours))
    _save_picture(target, "overlay.png", overlay(image, found.labels, found.classes, colours))
    _write(target, "json", lambda part: part.write_text(json.dumps(about, indent=1) + "\n"))


def _save_steps(
    target: Path,
    segmentor: TrainingFreeSegmentor,
    image: Image.Image,
    found: Segmentation,
    classes: dict[str, list[str]],
    call: dict[str, Any],
) -> None:
    from segmentors.training_free.pictures import palette, step_sheet
    from segmentors.training_free.steps import steps

    maps = steps(segmentor, image, classes, **call)
    rows = [*classes, "background"] if call["background"] else [*classes]
    _save_picture(target, "steps.png", step_sheet(image, maps, found.labels, rows, palette(found.classes)))


def _save_picture(target: Path, suffix: str, picture: Image.Image) -> None:
    _write(target, suffix, lambda part: picture.save(part, format="PNG"))


def _write(target: Path, suffix: str, write_to: Callable[[Path], object]) -> None:
    """Write ``target.suffix`` through a file beside it, so that a kill leaves no half of it."""
    path = target.with_name(f"{target.name}.{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    write_to(part)
    part.replace(path)
