"""The command line. Each command is a module with ``add(commands)``, which registers its parser and its ``run(args)``.

Commands import torch and diffusers when they run, so that ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import app, atlas, evaluate, extract, gate, listing, match, parts, scenes, segment, visualize

COMMANDS = (listing, extract, visualize, segment, evaluate, match, parts, atlas, gate, scenes, app)
FAILED, INTERRUPTED = 2, 130

DESCRIPTION = "Inner activations of text-to-image diffusion models as dense features of images."
EPILOG = """\
examples:
  diffusion-features list 'up-*-cross-*'
  diffusion-features extract photos/ -o features/ --prompt 'a photo of a cat'
  diffusion-features visualize photo.jpg -o features.png
  diffusion-features segment photo.jpg --classes cat grass --background sky -o out/

Each command has its own --help. Exit codes: 0 done; 1 done, but some images failed; 2 a setting, a path
or the model is wrong, and nothing more was done; 130 interrupted, and what was written is kept.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name; ``None`` takes the process's own) and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return _ended("interrupted; what was written is kept", INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, LookupError, ArithmeticError, ImportError) as error:
        return _ended(_sentence(error), FAILED)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        return _ended("out of memory: try a smaller --size or --batch-size, fewer --activations, or --dtype", FAILED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffusion-features",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def _sentence(error: BaseException) -> str:
    """An error's message on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror.lower()}"
    message = error.args[0] if isinstance(error, KeyError) and error.args else error  # str() of a KeyError has quotes
    return " ".join(str(message).split()) or type(error).__name__


def _ended(message: str, code: int) -> int:
    print(f"diffusion-features: {message}", file=sys.stderr)
    return code
