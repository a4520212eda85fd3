"""``diffusion-features atlas``: which activations of a model are worth trying."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    from diffusion_features import Activation, FeatureExtractor
    from diffusion_features.atlas import Choice, Entry, Labelled
    from diffusion_features.cli.work import Item

DESCRIPTION = """\
Measure the activations of a model on some images, without labels: how much of each is noise, how fine it is, and how
far its similarities are explained by distance alone. What is too noisy or too local is dropped, the rest is ranked.
Without --activations the candidates of arXiv 2410.03558 are measured; of a UNet the early half of the up-stage is
ranked, as the paper has it, and the shortlist is as short as the paper's: 63 of 279. Its other rules, by kind, are left
to what is measured, but for --published.

Written into the folder: atlas.json with every number, atlas.png with a picture of every activation, and preset.json,
the best activation of each grid, which every command takes as --activations.
"""
EXAMPLES = """\
  diffusion-features atlas photos/ -o atlas/
  diffusion-features atlas photos/ -o atlas/ --masks labels/      # and a linear probe of the shortlist
  diffusion-features extract photos/ -o features/ --activations atlas/preset.json
"""


def add(commands: Any) -> None:
    parser = options.command(commands, "atlas", "which activations are worth trying", DESCRIPTION, EXAMPLES)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image files, or folders to search for images")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FOLDER", help="where the results go")
    parser.add_argument(
        "--images", type=int, default=8, metavar="N", help="how many of the images to measure, evenly spread "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--masks", type=Path, metavar="FOLDER", help="label maps (PNG, one class a value, 255 ignored) named as the "
        "images: half of the images then train a linear probe of the shortlist, the others test it",
    )  # fmt: skip
    parser.add_argument("--noise", type=float, metavar="X", help="the largest noise that is kept (default: 0.1)")
    parser.add_argument("--locality", type=float, metavar="X", help="the largest locality that is kept (default: 0.5)")
    parser.add_argument("--published", action="store_true", help="drop what the paper's filter drops by its name alone")
    options.add_call(parser)
    options.add_model(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from diffusion_features.atlas import measure, preset, probe
    from diffusion_features.atlas.page import page
    from diffusion_features.cli.work import Report, items
    from diffusion_features.images import image_keys

    if args.images < 1 or (args.t and len(args.t) > 1):
        raise ValueError("atlas takes at least one image, and one --t")
    keys = _spread(image_keys(args.inputs), args.images)
    prompts = options.prompts_of(args, keys)
    fx = options.load(args, args.activations or ["*"], [*set(prompts.values())] if args.prompt_file is None else None)
    t = (args.t or options.TIMESTEPS)[0]
    chosen = _activations(fx, args.activations is not None)
    with Report(len(keys)) as report:
        found = [*items(keys, prompts, args.size, fx.multiple, report)]
        labelled = _labelled(found, args.masks) if args.masks else []
        entries = measure(
            fx, [item.read() for item in found], chosen, [item.prompt for item in found], t=t, seed=args.seed,
            done=report.done,
        )  # fmt: skip
    choice = _choice(args, entries, chosen)
    probed: dict[str, float] = {}
    if labelled:
        half = len(labelled) // 2
        probed = probe(fx, labelled[:half], labelled[half:], [*choice.shortlist], t=t, seed=args.seed)
    wanted = preset(entries, probed) if probed else list(choice.preset)
    rows = _rows(entries, choice, probed)
    args.output.mkdir(parents=True, exist_ok=True)
    about = {"model": args.model, "t": t, "seed": args.seed, "images": [item.key for item in found]}
    _publish(args.output / "atlas.json", lambda part: _write(part, {**about, "preset": wanted, "activations": rows}))
    sheet = page(entries, choice.dropped, wanted)
    _publish(args.output / "atlas.png", lambda part: sheet.save(part, format="PNG"))
    _publish(args.output / "preset.json", lambda part: _write(part, wanted))
    _print_table(rows, choice)
    print(
        f"{len(choice.shortlist)} of {len(entries)} kept; the preset is {args.output / 'preset.json'}", file=sys.stderr
    )
    return 1 if report.failed else 0


def _spread(keys: dict[str, Path], count: int) -> dict[str, Path]:
    """At most ``count`` of the images, evenly spread over their sorted order."""
    names = [*keys]
    count = min(count, len(names))
    return {names[i * len(names) // count]: keys[names[i * len(names) // count]] for i in range(count)}


def _activations(fx: FeatureExtractor, named: bool) -> list[Activation]:
    from diffusion_features.atlas import candidates

    if not named:
        return candidates(fx.activations)
    if other := [a.id for a in fx.activations if a.kind != "spatial"]:
        raise ValueError(f"{other[0]} has no place in the image: atlas measures spatial activations")
    return fx.activations


def _choice(args: argparse.Namespace, entries: Sequence[Entry], chosen: Sequence[Activation]) -> Choice:
    """By what was measured; where the user named no activations, also by place and number."""
    from diffusion_features.atlas import PUBLISHED_SHARE, Limits, choose, place_filter, published_filter

    limits = Limits(**{name: value for name in ("noise", "locality") if (value := getattr(args, name)) is not None})
    if args.published:
        return choose(entries, limits, published_filter(chosen))
    if args.activations is not None:
        return choose(entries, limits)
    return choose(entries, limits, place_filter(chosen), max(1, round(PUBLISHED_SHARE * len(chosen))))


def _labelled(found: Sequence[Item], folder: Path) -> list[Labelled]:
    """The images with their masks, each at the size that the model sees.

    Raises:
        ValueError: there is a single image, an image has no mask, or a mask is no label map.
    """
    import numpy as np
    from PIL import Image

    from diffusion_features.atlas import Labelled

    if len(found) < 2:
        raise ValueError("a probe needs at least two images: one to train on and one to test on")
    labelled = []
    for item in found:
        path = (folder / item.key).with_suffix(".png")
        if not path.is_file():
            raise ValueError(f"there is no mask {path} for {item.key}")
        with Image.open(path) as mask:
            if mask.mode not in ("L", "P"):
                raise ValueError(f"{path} has mode {mask.mode}: a mask has one class number a pixel (mode L or P)")
            height, width = item.size
            labels = np.asarray(mask.resize((width, height), Image.Resampling.NEAREST))
        labelled.append(Labelled(item.read(), labels, item.prompt))
    return labelled


def _rows(entries: Sequence[Entry], choice: Choice, probed: dict[str, float]) -> list[dict[str, Any]]:
    """What atlas.json says of each activation; strides are in image pixels."""
    from diffusion_features.atlas import granularity

    order = granularity(entries)
    rows = []
    for entry in entries:
        id = entry.activation.id
        rows.append({
            "id": id, "channels": entry.activation.channels, "stride": entry.stride,
            **entry.properties._asdict(), "order": order[id], "dropped": choice.dropped.get(id),
            "score": choice.shortlist.get(id), "probe": probed.get(id),
        })  # fmt: skip
    return rows


def _print_table(rows: Sequence[dict[str, Any]], choice: Choice) -> None:
    from rich.console import Console
    from rich.table import Table

    by_id = {row["id"]: row for row in rows}
    columns = ("noise", "frequency", "locality", "score", "probe")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("id", no_wrap=True)
    for column in ("stride", "order", *columns):
        table.add_column(column, justify="right")
    for id in choice.shortlist:
        row = by_id[id]
        numbers = ("" if row[c] is None else f"{row[c]:.3f}" for c in columns)
        table.add_row(id, str(row["stride"]), str(row["order"]), *numbers)
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _publish(path: Path, write_to: Callable[[Path], Any]) -> None:
    """Write beside ``path`` and rename, so that a kill leaves no half of it."""
    part = path.with_name(path.name + ".part")
    write_to(part)
    part.replace(path)
