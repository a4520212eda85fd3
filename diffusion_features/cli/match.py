"""``diffusion-features match``: points of one image found in another, as a picture and as numbers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from diffusion_features import FeatureExtractor
    from diffusion_features.correspondence import Matches

DESCRIPTION = """\
Find points of one image in another by the similarity of their features, and draw a line for each. Without --point, a
regular grid of points is matched, and the best of those that find their way back are shown.

Each match is printed as x and y in the source, x and y in the target, and the cosine similarity; points are in pixels
of the image files, from the left and top edges.
"""
EXAMPLES = """\
  diffusion-features match cat.jpg other_cat.jpg -o matches.png
  diffusion-features match cat.jpg other_cat.jpg -o matches.png --point 120,80 --point 200,95
  diffusion-features match a.jpg b.jpg -o m.png --model stable-diffusion-v1-5/stable-diffusion-v1-5 --size 512
"""
GRID = 16
"""Points along the larger side of the source where none are given."""


def add(commands: Any) -> None:
    parser = options.command(commands, "match", "find points of one image in another", DESCRIPTION, EXAMPLES)
    parser.add_argument("source", type=Path, help="the image whose points are to be found")
    parser.add_argument("target", type=Path, help="the image to find them in")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="PNG", help="where the picture goes")
    parser.add_argument(
        "--point", type=_point, action="append", metavar="X,Y", help="a point of the source in pixels; repeatable"
    )
    parser.add_argument(
        "--count", type=int, default=20, metavar="N", help="how many matches to show where no points are given "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--soft", action="store_true", help="finer than a pixel: a soft-argmax around the best pixel")
    parser.add_argument("--json", action="store_true", help="print the matches as JSON")
    options.add_call(parser)
    options.add_model(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from diffusion_features.correspondence import match, nearest, returns, soft_argmax
    from diffusion_features.correspondence.picture import draw_matches
    from diffusion_features.images import read_image

    if args.count < 1:
        raise ValueError(f"--count must be at least 1, not {args.count}")
    if args.t and len(args.t) > 1:
        raise ValueError(f"match takes one --t, not {len(args.t)}")
    images = [read_image(path) for path in (args.source, args.target)]
    keys = {str(path): path for path in (args.source, args.target)}
    prompts = options.prompts_of(args, keys, [*keys])  # a list's first prompt is the source's
    fx = options.load(args, args.activations or options.ACTIVATIONS)
    if other := [a.id for a in fx.activations if a.kind != "spatial"]:
        raise ValueError(f"{other[0]} has no place in the image: match takes spatial activations")
    source, target = (
        _features(fx, image, prompts[str(path)], args)
        for image, path in zip(images, (args.source, args.target), strict=True)
    )
    sizes = {"source_size": (images[0].height, images[0].width), "target_size": (images[1].height, images[1].width)}
    points = torch.tensor(args.point) if args.point else _grid(images[0])
    found = match(source, target, points, **sizes, locate=soft_argmax if args.soft else nearest)
    if not args.point:
        step = max(images[0].size) / GRID
        back = returns(source, target, points, found, **sizes, within=step).cpu()
        points, found = _best(points, found, back, args.count)
    if not len(points):
        raise ValueError("no point of the source finds its way back from the target: name some with --point")
    here, there, scores = points.tolist(), found.points.tolist(), found.scores.tolist()
    rows = [(x, y, u, v, score) for (x, y), (u, v), score in zip(here, there, scores, strict=True)]
    picture = draw_matches(images[0], images[1], [(x, y) for x, y, *_ in rows], [(u, v) for _, _, u, v, _ in rows])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = args.output.with_name(args.output.name + ".part")
    picture.save(partial, format="PNG")
    partial.replace(args.output)
    _print(rows, args.json)
    print(f"{len(rows)} matches drawn to {args.output}", file=sys.stderr)
    return 0


def _features(fx: FeatureExtractor, image: Image.Image, prompt: str, args: argparse.Namespace) -> dict[str, Tensor]:
    from diffusion_features.images import fit_size

    size = args.size or fit_size(image.height, image.width, fx.multiple)
    t = (args.t or options.TIMESTEPS)[0]
    return {id: tensor[0] for id, tensor in fx(image, prompt, t=t, seed=args.seed, size=size).items()}


def _grid(image: Image.Image) -> Tensor:
    """Points at the centres of square cells of the image: (N, 2)."""
    import torch

    step = max(image.size) / GRID
    columns, rows = (max(1, int(side / step)) for side in image.size)
    x, y = (
        torch.arange(count) * (side / count) + side / count / 2
        for count, side in zip((columns, rows), image.size, strict=True)
    )
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)


def _best(points: Tensor, found: Matches, back: Tensor, count: int) -> tuple[Tensor, Matches]:
    """The highest scores among the matches that came back."""
    kept = back.nonzero()[:, 0]
    order = kept[found.scores.cpu()[kept].argsort(descending=True)[:count]]
    places = order.to(found.points.device)
    return points[order], type(found)(found.points[places], found.scores[places])


def _print(rows: list[tuple[float, float, float, float, float]], as_json: bool) -> None:
    if as_json:
        matches = [{"source": row[:2], "target": row[2:4], "similarity": row[4]} for row in rows]
        print(json.dumps(matches, indent=1))
        return
    for row in rows:
        print("{:8.1f} {:8.1f}  ->  {:8.1f} {:8.1f}   {:.3f}".format(*row))


def _point(text: str) -> tuple[float, float]:
    parts = text.split(",")
    try:
        x, y = (float(part) for part in parts)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no point: write X,Y in pixels, such as 120,80") from None
    return x, y
