"""``diffusion-features evaluate``: how good the training-free segmentor is on labelled images."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from diffusion_features.plain import finite

from . import options

DESCRIPTION = """\
Segment labelled images without training and print mean IoU, accuracy and boundary IoU. A figure means something only
together with its protocol, which is always printed:
  full-vocabulary  every class of the data set is prompted; the threshold is fixed
  image-classes    each image's own classes, taken from the truth, are prompted; the threshold is fixed
  as-released      as the program released with the paper: own classes, threshold swept on these very images, void as
                   background, a class that never occurs counts as 0
"""
EXAMPLES = """\
  diffusion-features evaluate --dataset embedded --split test --limit 64
  diffusion-features evaluate --dataset embedded --split held-out --protocol image-classes --json held-out.json
  diffusion-features evaluate --dataset voc --root VOC2012/ --background wall floor grass sky water tree \
      --model stable-diffusion-v1-5/stable-diffusion-v1-5
"""
EMBEDDED_LIMIT = 100


def add(commands: Any) -> None:
    parser = options.command(commands, "evaluate", "measure the segmentor on labelled images", DESCRIPTION, EXAMPLES)
    parser.add_argument("--dataset", default="embedded", help="embedded (the default), embedded-objects, or with "
                        "mmsegmentation voc, context, coco-object, coco-stuff, cityscapes, ade20k")  # fmt: skip
    parser.add_argument("--root", type=Path, metavar="FOLDER", help="where a data set that is not embedded is")
    parser.add_argument(
        "--split", help="embedded: train, validation, test (default), held-out; others: train, val (default)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help=f"so many images at most (embedded: {EMBEDDED_LIMIT})")
    parser.add_argument("--protocol", default="full-vocabulary", help="see above (default: %(default)s)")
    parser.add_argument(
        "--background", nargs="+", default=[], metavar="NAME", help="words for the background, which a data set that "
        "has one needs, or else --threshold (but under as-released, which looks for one)"
    )  # fmt: skip
    parser.add_argument("--threshold", type=float, metavar="θ", help="added to the score of the background")
    parser.add_argument("--seed", type=options.seed, default=0, help="of the noise (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options.add_model(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from diffusion_features.cli.work import Report
    from segmentors import Method, TrainingFreeSegmentor
    from segmentors.evaluation import evaluate, open_dataset
    from segmentors.evaluation.protocols import protocol_named

    protocol_named(args.protocol)
    dataset = open_dataset(args.dataset, args.split, args.root)
    if args.json and args.json.is_dir():
        raise ValueError(f"{args.json} is a folder: --json needs the name of a file")
    limit = args.limit
    if limit is None:
        limit = EMBEDDED_LIMIT if args.dataset.startswith("embedded") else dataset.length
    if limit < 1:  # said before the model is loaded
        raise ValueError(f"--limit {limit}: there must be at least one image")
    method = Method() if args.threshold is None else Method(threshold=args.threshold)
    segmentor = TrainingFreeSegmentor(options.load(args, ["*"]), method=method)
    with Report(min(limit, dataset.length)) as report:
        result = evaluate(
            segmentor, dataset, args.protocol, limit=limit, background=args.background, seed=args.seed,
            progress=lambda done, total: report.done(),
        )  # fmt: skip
    if args.json:
        _write_json(args.json, result)
        print(f"figures in {args.json}", file=sys.stderr)
    print(shown(result))
    return 0


def shown(result: dict[str, Any]) -> str:
    """A result as text."""
    low, high = result["miou_interval"]
    lines = [
        f"{result['dataset']}, {result['split']}, {result['images']} images; {result['model']}, t={result['t']}",
        f"protocol {result['protocol']}: {result['about']}",
        f"mean IoU {result['miou']:.3f} (95% interval {low:.3f} to {high:.3f}), accuracy {result['accuracy']:.3f}, "
        f"boundary IoU {result['boundary_iou']:.3f}",
    ]
    if result["threshold"] is not None:
        lines.append(f"threshold {result['threshold']:g}")
    width = max(map(len, result["per_class"]))
    lines += [f"  {name:{width}} {'-' if iou is None else f'{iou:.3f}'}" for name, iou in result["per_class"].items()]
    return "\n".join(lines)


def _write_json(path: Path, result: dict[str, Any]) -> None:
    """Through a file beside it, so that a kill leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(finite(result), indent=1, allow_nan=False) + "\n")
    part.replace(path)
