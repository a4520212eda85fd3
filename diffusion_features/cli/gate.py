"""``diffusion-features gate``: which techniques keep features at their image, measured on one's own images."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_features import FeatureExtractor
    from diffusion_features.suppression.gate import Row, Trial

DESCRIPTION = """\
Diffusion features drift from their image, because the model imagines what the noise destroyed. Techniques of
generation pull them back; which ones help depends on the model and the images. This measures it: each image is
repainted from high noise by the model alone and with each technique, and the edges of features are compared with those
of the clean image. The result is a ranked table with a recommendation; gate.json with all numbers; gate.html, a page
with the table and the pictures that needs nothing beside it; and gate.png, the pictures alone. gate.json is written
after each image, and an image that cannot be read is named and left out.

A technique is a word: canny, depth (with =CONTROLNET where none is known for the model), lora=FILE, image (an
IP-Adapter, with =FILE where none is known), prompt=TEXT (with {prompt} for the prompt), caption=MODEL,
denoise=TIMESTEPS, cfg=SCALE. ControlNets, LoRAs and IP-Adapters take a scale: lora=x@0.5.
'canny + denoise' is one entry of the table: both at once. A text may have a + of its own, unless a technique's word
is behind it: 'prompt=a cat + a dog + canny' is a prompt, and canny.
"""
EXAMPLES = """\
  diffusion-features gate photo.jpg --technique canny 'prompt={prompt}, high quality' lora=style.safetensors@0.7
  diffusion-features gate photos/ -o report/ --technique canny lora=a.safetensors 'canny + denoise' --t 100
"""


def add(commands: Any) -> None:
    parser = options.command(commands, "gate", "measure which techniques suppress content shift", DESCRIPTION, EXAMPLES)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image files, or folders to search for images")
    parser.add_argument("--technique", nargs="+", required=True, action="extend", metavar="WORD", help="see above")
    parser.add_argument("--together", action="store_true", help="try all of them together as well")
    parser.add_argument("-o", "--output", type=Path, default=Path("gate"), metavar="FOLDER", help="default: gate")
    parser.add_argument(
        "--activations", action="append", metavar="WHICH", help="compared features (default: practical)"
    )
    parser.add_argument("--prompt", default="", help="for all images (default: empty)")
    parser.add_argument("--t", type=int, default=50, help="timestep of the features (default: 50)")
    parser.add_argument("--anchor-t", type=int, default=800, help="timestep of strong shift, above --t (default: 800)")
    parser.add_argument("--strength", type=float, default=0.8, help="of repainting, up to 1 (default: 0.8)")
    parser.add_argument("--steps", type=int, default=20, help="of repainting (default: 20)")
    parser.add_argument("--guidance", type=float, default=1.0, help="of repainting (default: 1, which is none)")
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="draws of noise an image (default: 4)")
    parser.add_argument(
        "--size", type=options.size, metavar="N|HxW", help="resize the images (default: their own size)"
    )
    options.add_model(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from diffusion_features.cli.work import Report, readable
    from diffusion_features.images import as_tensor, fit_size, image_keys
    from diffusion_features.suppression import gate
    from diffusion_features.suppression.words import from_words, words_of

    if args.seeds < 1:
        raise ValueError("--seeds must be at least 1")
    gate.check_anchor(args.t, args.anchor_t)  # said before the model is loaded
    keys = image_keys(args.inputs)
    fx = _whole(args)
    sets: dict[str, Any] = {text: [from_words(word, fx) for word in words_of(text)] for text in args.technique}
    if args.together and len(sets) > 1:
        sets["together"] = [one for techniques in sets.values() for one in techniques]
    found: list[Trial] = []
    pictures: dict[str, Tensor] = {}
    with Report(len(keys)) as report:
        for key, image in readable(keys, report):
            size = args.size or fit_size(image.height, image.width, fx.multiple)
            pixels = as_tensor(image, size=size, multiple=fx.multiple)
            found += gate.trials(
                fx, pixels, sets, args.prompt, t=args.t, anchor_t=args.anchor_t, strength=args.strength,
                steps=args.steps, guidance=args.guidance, seeds=range(args.seeds), index=len(pictures),
            )  # fmt: skip
            pictures[key] = pixels[0]
            _write_numbers(args, [*pictures], found)
            report.done()
    return _end(args, pictures, found, report.failed)


def _whole(args: argparse.Namespace) -> FeatureExtractor:
    """An extractor of the model with its VAE decoder, which repainting needs."""
    import torch

    from diffusion_features import FeatureExtractor
    from diffusion_features.loading import load_pipeline

    pipe = load_pipeline(
        args.model, revision=args.revision, variant=args.variant, device=args.device,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
    )  # fmt: skip
    chosen = args.activations or options.ACTIVATIONS
    return FeatureExtractor(pipe, chosen, owned=True, model_id=args.model)


def _settings(args: argparse.Namespace, keys: list[str]) -> dict[str, Any]:
    names = ("model", "prompt", "t", "anchor_t", "strength", "steps", "guidance", "seeds", "size", "activations")
    return {name: getattr(args, name) for name in names} | {"images": keys, "techniques": args.technique}


def _write_numbers(args: argparse.Namespace, keys: list[str], found: Sequence[Trial]) -> None:
    """gate.json of the images so far, so that a run that is interrupted leaves what it measured."""
    from diffusion_features.suppression.gate import as_json, ranked

    text = json.dumps(as_json(found, ranked(found), _settings(args, keys)), indent=1, allow_nan=False) + "\n"
    _publish(args.output / "gate.json", lambda part: part.write_text(text, encoding="utf-8"))


def _end(args: argparse.Namespace, pictures: dict[str, Tensor], found: Sequence[Trial], failed: int) -> int:
    """The page, the pictures, the table, and the exit code."""
    from diffusion_features.suppression.gate import picture, ranked
    from diffusion_features.suppression.page import page

    if not pictures:
        print(f"None of the images could be read ({failed} in all): nothing was measured.", file=sys.stderr)
        return 1
    keys, images, rows = [*pictures], [*pictures.values()], ranked(found)
    report, sheet = page(found, rows, images, keys, _settings(args, keys)), picture(found, images, keys)
    for path in (
        args.output / "gate.json",
        _publish(args.output / "gate.html", lambda part: part.write_text(report, encoding="utf-8")),
        _publish(args.output / "gate.png", lambda part: sheet.save(part, format="PNG")),
    ):
        print(path, file=sys.stderr)
    _print(rows)
    if failed:
        print(f"{len(keys)} measured, {failed} could not be read", file=sys.stderr)
    return 1 if failed else 0


def _publish(path: Path, write: Callable[[Path], object]) -> Path:
    """A file gets its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    from diffusion_features.suppression.gate import RULE

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("technique", overflow="fold")
    for column in ("recommendation", "SSIM gain", "Laplacian gain"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(row.technique, row.verdict, str(row.ssim), str(row.laplacian))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    console.print(table)
    console.print(f"\n{RULE}", soft_wrap=True)
