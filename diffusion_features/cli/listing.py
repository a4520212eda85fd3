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
    from pathlib import Path

    from diffusion_features import Activation, FeatureExtractor

DESCRIPTION = """\
List the activations of a model, in forward order. Only its configuration is read, and of a hub id only that is
downloaded, so that a model of any size can be listed anywhere. (A .safetensors file has none, and is loaded.)
"""
EXAMPLES = """\
  diffusion-features list
  diffusion-features list 'mid-*' '*-cross-map'
  diffusion-features list --model stable-diffusion-v1-5/stable-diffusion-v1-5 --json
"""


def add(commands: Any) -> None:
    parser = options.command(commands, "list", "the activations a model has", DESCRIPTION, EXAMPLES)
    parser.add_argument("globs", nargs="*", metavar="GLOB", help="show only ids that match one of these")
    parser.add_argument("--json", action="store_true", help="print JSON; its strides are in image pixels")
    options.add_model(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    fx = _extractor(args)
    chosen = _filtered(fx.available, args.globs)
    rows = [{"id": a.id, "kind": a.kind, "channels": a.channels, "stride": fx.info(a).stride} for a in chosen]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        _print_table(rows, f"{len(rows)} of the {len(fx.available)} activations of {args.model}")
        if not args.globs:
            print("Besides, made of several: attn (aggregated attention maps) and vae-out (the image one step later).")
    return 0


def _extractor(args: argparse.Namespace) -> FeatureExtractor:
    """An extractor that knows what its model has: of a pipeline on the meta device, where there is a configuration.

    Raises:
        OSError: the model cannot be found, or is none that is known here; the message says why.
    """
    from pathlib import Path

    from diffusion_features import FeatureExtractor
    from diffusion_features.loading import resolve

    source = resolve(args.model)
    if isinstance(source, Path) and (source.is_file() or args.revision is not None):
        return options.load(args, ["*"])  # a checkpoint says by its weights what it is; a revision is refused there
    options.quiet()
    folder = source if isinstance(source, Path) else _fetched(source, args.revision)
    return FeatureExtractor.from_pipe(_outline(folder, args.model), "*")


def _fetched(repo: str, revision: str | None) -> Path:
    """The folder in the hub's cache with what ``_outline`` reads of a repository; only this is downloaded."""
    from pathlib import Path

    from huggingface_hub import constants, hf_hub_download, resolve_revision

    from diffusion_features.loading import INDEX, plain_hub_errors

    offline = constants.HF_HUB_OFFLINE
    with plain_hub_errors(repo, revision, offline):
        # as when loading, every request names one commit: the repository may move on between two of them
        pinned = resolve_revision(repo, revision=revision, local_files_only=offline)
        folder = Path(hf_hub_download(repo, INDEX, revision=pinned, local_files_only=offline)).parent
        for part in _models(folder, repo):
            hf_hub_download(repo, f"{part}/config.json", revision=pinned, local_files_only=offline)
    return folder


def _outline(folder: Path, name: str) -> Any:
    """The pipeline of a folder with its diffusers models on the meta device, and none of its other components.

    Made by its own class, which tells from the VAE how many pixels a cell of the latents has.
    """
    import inspect

    from diffusion_features.loading import left_out, pipeline_class_of
    from diffusion_features.truncating import on_meta

    pipeline_class: Any = pipeline_class_of(folder, name)
    models = {part: on_meta(model, folder / part) for part, model in _models(folder, name).items()}
    required = [p.name for p in inspect.signature(pipeline_class).parameters.values() if p.default is p.empty]
    return pipeline_class(**{**dict.fromkeys(required), **left_out(pipeline_class), **models})


def _models(folder: Path, name: str) -> dict[str, Any]:
    """Component → class, of the models of diffusers that a pipeline's index names: its denoiser, its VAE."""
    import diffusers

    from diffusion_features.loading import INDEX, pipeline_class_of

    pipeline_class_of(folder, name)  # says what is wrong with the index, if anything is
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    named = {part: entry[1] for part, entry in index.items() if isinstance(entry, list) and entry[0] == "diffusers"}
    found = {part: getattr(diffusers, class_name, None) for part, class_name in named.items()}
    return {p: c for p, c in found.items() if isinstance(c, type) and issubclass(c, diffusers.ModelMixin)}


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
