"""``diffusion-features extract``: images in, features on disk."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    from diffusion_features import FeatureExtractor
    from diffusion_features.cli.work import Item, Report
    from diffusion_features.store import Store

DESCRIPTION = """\
Write the features of images into a folder: one safetensors file an image, and a manifest.json that says how they
were made. Each file holds activation id -> tensor: (C, h, w), (tokens, C) for text-side ids, (heads, queries, keys)
for maps; with several --t, these behind an axis of timesteps.

Killed at any moment and started again with the same settings, it goes on where it stopped. An image is done again
if its file or its prompt has changed.
"""
PIECE, PIECES = 2**20, 64  # bytes of a large weights file that tell it from another
TRIED = 64  # prompts
EXAMPLES = """\
  diffusion-features extract photos/ -o features/
  diffusion-features extract cat.jpg dog.jpg -o features/ --activations mid-vit-out --activations 'up-level1-*-cross-q'
  diffusion-features extract photos/ -o features/ --activations attn --attention down_cross --attention up_cross
  diffusion-features extract photos/ -o features/ --prompt-file prompts.json --t 50 --t 200 --size 512
  diffusion-features extract photos/ -o features/ --model stabilityai/stable-diffusion-xl-base-1.0 --variant fp16 \\
      --dtype float16 --size 1024 --batch-size 4
"""


def add(commands: Any) -> None:
    parser = options.command(commands, "extract", "write the features of images to a folder", DESCRIPTION, EXAMPLES)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image files, or folders to search for images")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FOLDER", help="where the features go")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="throw away the features that the folder holds, once there are new ones",
    )
    parser.add_argument(
        "--batch-size", type=_positive, default=1, metavar="N", help="images of one size at a time (default: 1)"
    )
    options.add_call(parser)
    parser.add_argument(
        "--attention",
        action="append",
        metavar="MAPS",
        help="what the activation attn is made of: up_cross (the default), down_self and so on; repeatable",
    )
    options.add_model(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from diffusion_features.cli.work import Report, batches, items
    from diffusion_features.images import check_size, image_keys
    from diffusion_features.store import Store

    keys = image_keys(args.inputs)
    prompts = options.prompts_of(args, keys)
    one_prompt = args.prompt_file is None
    attention = args.attention or options.ATTENTION
    fx = options.load(
        args, args.activations or options.ACTIVATIONS, [*set(prompts.values())] if one_prompt else None, attention
    )
    if args.attention and "attn" not in fx.feature_info:
        raise ValueError("--attention says what the activation attn is made of: add --activations attn")
    if args.size:
        check_size(args.size, fx.multiple)
    _check_call(args, prompts.values(), fx)
    with Store.create(args.output, _settings(args, fx), args.overwrite) as store, Report(len(keys)) as report:
        written = 0
        for batch in batches(items(keys, prompts, args.size, fx.multiple, report), args.batch_size):
            written += _do_batch(batch, args, fx, store, report)
    skipped = len(keys) - written - report.failed
    there = f", {skipped} were there already" if skipped else ""
    failed = f", {report.failed} failed" if report.failed else ""
    print(f"{written} written to {args.output}{there}{failed}", file=sys.stderr)
    return 1 if report.failed else 0


def _check_call(args: argparse.Namespace, prompts: Iterable[str], fx: FeatureExtractor) -> None:
    """Find out what is wrong with the settings before anything is written, and so before anything is overwritten.

    What a model can have against a prompt is its length. Of many prompts only the longest are tried: to encode all of
    them would take a run that was interrupted near its end longer than what it has left to do.

    Raises:
        ValueError: the model does not take one of the timesteps or prompts; the message says what it takes.
    """
    from diffusion_features.noising import check_t

    for t in args.t or options.TIMESTEPS:
        check_t(t, fx.pipe.scheduler)
    fx.encode_prompts(sorted(set(prompts), key=lambda prompt: len(prompt.encode(errors="replace")))[-TRIED:])


def _do_batch(batch: list[Item], args: argparse.Namespace, fx: FeatureExtractor, store: Store, report: Report) -> int:
    """Extract one batch and write what is not in the store yet; returns how many that were.

    Images that are there already are computed again if others of their batch are missing, because the last bits of a
    feature can depend on what else is in the batch: so an interrupted run ends with the bytes of an uninterrupted one.
    """
    from diffusion_features.images import ImageError

    missing = {item.key for item in batch if not store.has(item.key, sha256=item.sha256, prompt=item.prompt)}
    report.done(len(batch) - len(missing))
    readable = []
    for item in batch if missing else []:
        try:
            readable.append((item, item.read()))
        except ImageError as error:
            report.failure(error)
            missing.discard(item.key)
    if not missing:
        return 0
    timesteps = args.t or options.TIMESTEPS
    features = fx(
        [image for _, image in readable],
        prompt=[item.prompt for item, _ in readable],
        t=timesteps[0] if len(timesteps) == 1 else timesteps,
        seed=args.seed,
    )
    for index, (item, _) in enumerate(readable):
        if item.key not in missing:
            continue
        try:
            store.write(item.key, {id: tensor[index] for id, tensor in features.items()}, _record(item))
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            missing.discard(item.key)
            report.failure(ImageError(f"{item.path} has too long a name for a file of its features: shorten it."))
        else:
            report.done()
    return len(missing)


def _settings(args: argparse.Namespace, fx: FeatureExtractor) -> dict[str, Any]:
    """Everything the features depend on, besides each image and its prompt."""
    from diffusion_features.embedded import MODELS
    from diffusion_features.loading import resolve
    from diffusion_features.store import WEIGHTS

    source = resolve(args.model)
    local = source if isinstance(source, Path) else None
    info = {id: asdict(one) for id, one in fx.feature_info.items()}
    return {
        "model": local.resolve().as_posix() if local and args.model not in MODELS else args.model,
        "revision": fx.revision,
        "variant": args.variant,
        "dtype": str(fx.dtype).removeprefix("torch."),
        "t": args.t or options.TIMESTEPS,
        "seed": args.seed,
        "prompt": (args.prompt or options.PROMPT) if args.prompt_file is None else None,
        "size": args.size,
        "activations": info,
        **({WEIGHTS: _digest(local, args.variant)} if local else {}),
        **({"attention": list(fx.attention)} if "attn" in info else {}),
    }


def _digest(source: Path, variant: str | None) -> str:
    """A digest of the weights of a local model, which may change under one name: a hub's have a revision.

    It is of the name, size and bytes of each file; of one above 64 MiB, of 64 pieces of 1 MiB that are spread evenly
    over it, beginning with its header. Training moves nearly every weight, and all of tens of GB would take minutes.

    Args:
        source: a folder in the diffusers format, or a .safetensors file.
    """
    digest = hashlib.sha256()
    for path in [source] if source.is_file() else _weights(source, variant):
        size = path.stat().st_size
        digest.update(f"{path.parent.name}/{path.name} {size}\n".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            for start in range(0, size, max(PIECE, size // PIECES)):
                file.seek(start)
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]


def _weights(folder: Path, variant: str | None) -> Iterator[Path]:
    """The weights that are loaded from a folder: of the variant, in those components that have it."""
    from diffusion_features.loading import INDEX, NOT_NEEDED, weight_files

    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    for part in sorted(set(index).difference(NOT_NEEDED)):
        if (folder / part).is_dir():
            yield from weight_files(folder / part, variant)


def _record(item: Item) -> dict[str, Any]:
    return {
        "source": item.path.resolve().as_posix(),
        "sha256": item.sha256,
        "original_size": item.original,
        "size": item.size,
        "prompt": item.prompt,
    }


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
