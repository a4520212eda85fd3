"""``diffusion-features scenes``: the drawn, labelled world as a dataset on disk."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from . import options

DESCRIPTION = """\
Draw scenes of the embedded world with exact labels, in the layout that mmsegmentation reads: img_dir and ann_dir, and
beside them the parts and the instances of objects, an index with captions and keypoints, and pairs of corresponding
points. The same command gives the same bytes.
"""
EXAMPLES = """\
  diffusion-features scenes world/ --split test --count 100
  diffusion-features scenes world/ --split train --count 2000 --size 128
  diffusion-features scenes wide/ --split held-out --count 20 --size 160x96
"""
SPLITS = ("train", "validation", "test", "held-out")


def add(commands: Any) -> None:
    parser = options.command(commands, "scenes", "draw labelled scenes", DESCRIPTION, EXAMPLES)
    parser.add_argument("output", type=Path, metavar="FOLDER", help="where to")
    parser.add_argument(
        "--split", choices=SPLITS, default="test", help="which seeds; held-out scenes have styles, shapes and pairs of "
        "classes that no training sees (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--count", type=int, default=100, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument(
        "--size", type=options.size, default=(128, 128), metavar="HxW", help="height x width, or one side, in pixels "
        "(default: 128)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from diffusion_features.embedded.dataset import write

    height, width = args.size
    index = write(args.output, args.split, args.count, (width, height))
    print(f"{args.count} scenes in {args.output}, listed in {index}", file=sys.stderr)
    return 0
