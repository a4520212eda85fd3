"""Options that several commands share, and what they mean."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_features import FeatureExtractor

DTYPES = ("float32", "float16", "bfloat16")
MODEL_DEFAULTS: dict[str, Any] = {
    "model": "embedded", "revision": None, "variant": None, "dtype": None, "device": None,
}  # fmt: skip
CALL_DEFAULTS: dict[str, Any] = {"prompt": None, "prompt_file": None, "t": None, "seed": 0, "size": None}
SEEDS = range(-(2**63), 2**64)
ACTIVATIONS, ATTENTION, TIMESTEPS, PROMPT = ["practical"], ["up_cross"], [50], ""


def command(commands: Any, name: str, help: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser for one command, with examples at the end of its help."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """``--model --revision --variant --dtype --device``."""
    group = parser.add_argument_group("model")
    group.set_defaults(**MODEL_DEFAULTS)
    group.add_argument(
        "--model",
        help="'embedded' (the default), 'embedded-dit' or 'embedded-dit-small', shipped with this package, a hub id, a "
        "diffusers folder or a .safetensors file",
    )
    group.add_argument("--revision", help="branch, tag or commit of a hub id")
    group.add_argument("--variant", help="weights of this variant, such as fp16")
    group.add_argument("--dtype", choices=DTYPES, help="of computing and of the result (default: as suits the device)")
    group.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")


def add_call(parser: argparse.ArgumentParser) -> None:
    """``--activations --prompt --prompt-file --t --seed --size``."""
    group = parser.add_argument_group("features")
    group.set_defaults(**CALL_DEFAULTS)
    group.add_argument(
        "--activations",
        action="append",
        metavar="WHICH",
        help="an id, a glob, a preset, or a JSON/YAML file of these; repeatable (default: practical)",
    )
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="one prompt for all images (default: empty)")
    prompts.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="one prompt an image: a JSON object from the image's path inside its folder to its prompt, a JSON list, "
        "or text with a prompt a line; lists and lines go by these paths in plain string order, whatever the order of "
        "the arguments",
    )
    group.add_argument(
        "--t",
        type=int,
        action="append",
        help="timestep the denoiser is conditioned on, 0 (clean) to 999 (noise); repeatable (default: 50)",
    )
    group.add_argument("--seed", type=seed, help="of the noise, the same for each image (default: 0)")
    group.add_argument(
        "--size",
        type=size,
        metavar="N|HxW",
        help="resize each image to N x N or to height H and width W, in pixels (default: its own size)",
    )


def size(text: str) -> tuple[int, int]:
    """``512`` or ``512x768`` (height x width) as height and width."""
    sides = [side.strip() for side in text.lower().split("x")]
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 512, or 512x768 for height x width")
    return int(sides[0]), int(sides[-1])


def seed(text: str) -> int:
    """A whole number that PyTorch's generators take: one of 64 bits, with a sign or without."""
    try:
        number = int(text)
    except ValueError:
        number = SEEDS.stop
    if number not in SEEDS:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: write a whole number from -2^63 to 2^64-1")
    return number


def load(
    args: argparse.Namespace,
    activations: list[str],
    prompts: list[str] | None = None,
    attention: Sequence[str] = ATTENTION,
) -> FeatureExtractor:
    """The extractor that the model options ask for.

    Args:
        prompts: all that will be used, where they are few; the text encoders are then freed.
        attention: what the activation ``attn`` is made of.

    Raises:
        ValueError: the device cannot be used, or an activation or kind of attention does not exist.
        OSError: the model cannot be loaded.
    """
    import torch

    from diffusion_features import FeatureExtractor

    quiet()
    if args.device is not None:
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {args.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return FeatureExtractor.from_pretrained(
        args.model,
        activations=activations,
        revision=args.revision,
        variant=args.variant,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        device=args.device,
        prompts=prompts,
        attention=attention,
    )


def quiet() -> None:
    """Leave the terminal to our own messages: loading prints bars and advice of its own."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def prompts_of(
    args: argparse.Namespace, keys: Mapping[str, Path], order: Sequence[str] | None = None
) -> dict[str, str]:
    """The prompt of each image. A file's list or lines go by ``order``, or by the keys in plain string order.

    Raises:
        ValueError: the prompt file has another number of prompts than there are images, lacks an image, or is no
            JSON object, JSON list or text.
        OSError: it cannot be read.
    """
    if args.prompt_file is None:
        return dict.fromkeys(keys, PROMPT if args.prompt is None else args.prompt)
    file: Path = args.prompt_file
    given = _prompts_in(file)
    if isinstance(given, dict):
        if missing := [key for key in keys if key not in given]:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{file} has no prompt for {missing[0]}{others}")
        return {key: given[key] for key in keys}
    if len(given) != len(keys):
        raise ValueError(f"{file} has {len(given)} prompts, but there are {len(keys)} images")
    return dict(zip(order or sorted(keys), given, strict=True))


def _prompts_in(file: Path) -> dict[str, str] | list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() != ".json":
            return text.splitlines()
        prompts = json.loads(text)
    except ValueError as error:  # of the encoding, or of JSON
        raise ValueError(f"{file} cannot be read as {'JSON' if file.suffix else 'text'}: {error}") from error
    values = prompts.values() if isinstance(prompts, dict) else prompts
    if not isinstance(prompts, (dict, list)) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{file} must hold a JSON object from image to prompt, or a list of prompts")
    return prompts
