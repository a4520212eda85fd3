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
with the table and the pictures that needs nothing beside it; and gate.png, the pictures alone.

A technique is a word: canny, depth (with =CONTROLNET where none is known for the model), lora=FILE, image (an
IP-Adapter, with =FILE where none is known), prompt=TEXT (with {prompt} for the prompt), caption=MODEL,
denoise=TIMESTEPS, cfg=SCALE. ControlNets, LoRAs and IP-Adapters take a scale: lora=x@0.5.
'canny + denoise' is one entry of the table: both at once.
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
    parser.add_argument("--anchor-t", type=int, default=800, help="timestep of strong shift (default: 800)")
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
    from diffusion_features.images import as_tensor, fit_size, image_keys, read_image
    from diffusion_features.suppression import gate
    from diffusion_features.suppression.words import from_words

    if args.seeds < 1:
        raise ValueError("--seeds must be at least 1")
    keys = image_keys(args.inputs)
    fx = _whole(args)
    sets: dict[str, Any] = {text: [from_words(word, fx) for word in text.split(" + ")] for text in args.technique}
    if args.together and len(sets) > 1:
        sets["together"] = [one for techniques in sets.values() for one in techniques]
    found, pixels = [], []
    for index, path in enumerate(keys.values()):
        image = read_image(path)
        size = args.size or fit_size(image.height, image.width, fx.multiple)
        pixels.append(as_tensor(image, size=size, multiple=fx.multiple))
        found += gate.trials(
            fx, pixels[-1], sets, args.prompt, t=args.t, anchor_t=args.anchor_t, strength=args.strength,
            steps=args.steps, guidance=args.guidance, seeds=range(args.seeds), index=index,
        )  # fmt: skip
    rows = gate.ranked(found)
    _write(args, [*keys], found, rows, [p[0] for p in pixels])
    _print(rows)
    return 0


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


def _write(
    args: argparse.Namespace, keys: list[str], found: list[Trial], rows: list[Row], images: Sequence[Tensor]
) -> None:
    from diffusion_features.suppression.gate import as_json, picture
    from diffusion_features.suppression.page import page

    names = ("model", "prompt", "t", "anchor_t", "strength", "steps", "guidance", "seeds", "size", "activations")
    settings = {name: getattr(args, name) for name in names} | {"images": keys, "techniques": args.technique}
    args.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json(found, rows, settings), indent=1) + "\n"
    report, sheet = page(found, rows, images, keys, settings), picture(found, images, keys)
    _publish(args.output / "gate.json", lambda part: part.write_text(text, encoding="utf-8"))
    _publish(args.output / "gate.html", lambda part: part.write_text(report, encoding="utf-8"))
    _publish(args.output / "gate.png", lambda part: sheet.save(part, format="PNG"))


def _publish(path: Path, write: Callable[[Path], object]) -> None:
    """A file gets its name only when it is whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    print(path, file=sys.stderr)


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    from diffusion_features.suppression.gate import RULE, Gain

    def shown(gain: Gain) -> str:
        interval = "" if gain.low is None else f" ({gain.low:+.3f} to {gain.high:+.3f})"
        return f"{gain.mean:+.4f}{interval}"

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("technique", overflow="fold")
    for column in ("recommendation", "SSIM gain", "Laplacian gain"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(row.technique, row.verdict, shown(row.ssim), shown(row.laplacian))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    console.print(table)
    console.print(f"\n{RULE}", soft_wrap=True)
