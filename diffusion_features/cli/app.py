"""``diffusion-features app``: the demo in a browser."""

from __future__ import annotations

import argparse
from typing import Any

from . import options

DESCRIPTION = """\
Serve a page on which pictures are segmented with words, scenes are drawn and segmented, and the inside of the model is
looked at. It needs Gradio: pip install 'diffusion-features[app]'.
"""
EXAMPLES = """\
  diffusion-features app
  diffusion-features app --model embedded --model stable-diffusion-v1-5/stable-diffusion-v1-5
  diffusion-features app --public --port 7860
"""


def add(commands: Any) -> None:
    parser = options.command(commands, "app", "serve the demo in a browser", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--model", action="append", metavar="MODEL", help="'embedded' (the default), a hub id or a diffusers folder; "
        "repeatable. Visitors choose among these and no others",
    )  # fmt: skip
    parser.add_argument(
        "--public", action="store_true", help="listen on all interfaces, with smaller pictures and fewer classes: for "
        "a page that strangers reach",
    )  # fmt: skip
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError("the demo needs Gradio: pip install 'diffusion-features[app]'") from error
    from segmentors.demo import Settings, serve

    serve(Settings(models=tuple(args.model or ["embedded"]), public=args.public, port=args.port))
    return 0
