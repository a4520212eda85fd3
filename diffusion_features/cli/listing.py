"""``diffusion-features list``: what a model has to offer."""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import json
import sys
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    from diffusion_features import Activation

EXAMPLES = """\
  diffusion-features list
  diffusion-features list 'mid-*' '*-cross-map'
  diffusion-features list --model stable-diffusion-v1-5/stable-diffusion-v1-5 --variant fp16 --json
"""


def add(commands: Any) -> None:
    parser = options.command(
        commands, "list", "the activations a model has", "List the activations of a model, in forward order.", EXAMPLES
    )
    parser.add_argument("globs", nargs="*", metavar="GLOB", help="show only ids that match one of these")
    parser.add_argument("--json", action="store_true", help="print JSON; its strides are in image pixels")
    options.add_model(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    fx = options.load(args, ["*"])
    info = fx.feature_info
    sides = ((info[a.id].stride, a.stride) for a in fx.activations)
    cell = next((pixels // cells for pixels, cells in sides if pixels and cells), 1)
    chosen = _filtered(fx.available, args.globs)
    rows = [
        {"id": a.id, "kind": a.kind, "channels": a.channels, "stride": a.stride and a.stride * cell} for a in chosen
    ]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        _print_table(rows, f"{len(rows)} of the {len(fx.available)} activations of {args.model}")
        if not args.globs:
            print("Besides, made of several: attn (aggregated attention maps) and vae-out (the image one step later).")
    return 0


def _filtered(available: list[Activation], globs: list[str]) -> list[Activation]:
    ids = [a.id for a in available]
    for glob in globs:
        if not fnmatch.filter(ids, glob):
            near = difflib.get_close_matches(glob.translate(str.maketrans("", "", "*?[]")), ids, n=3, cutoff=0.3)
            hint = f"; the nearest are {', '.join(near)}" if near else ""
            raise ValueError(f"no activation matches {glob!r}{hint}")
    return [a for a in available if not globs or any(fnmatch.fnmatchcase(a.id, glob) for glob in globs)]


def _print_table(rows: list[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("id", "kind", "shape", "stride"):
        table.add_column(column, no_wrap=True, justify="right" if column == "stride" else "left")
    for row in rows:
        table.add_row(row["id"], row["kind"], _shape(row), f"{row['stride']} px" if row["stride"] else "")
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    console.print(f"\n{title}. Shapes are of one H x W image.", markup=False, soft_wrap=True)


def _shape(row: dict[str, Any]) -> str:
    """The shape without its batch axis, for an image of H x W pixels."""
    channels, stride = row["channels"], row["stride"]
    if row["kind"] == "text":
        return f"tokens x {channels}"
    if row["kind"] == "map":
        other = "same" if row["id"].endswith("self-map") else "tokens"
        return f"{channels} heads x (H/{stride} W/{stride}) x {other}"
    return f"{channels} x H/{stride} x W/{stride}"
