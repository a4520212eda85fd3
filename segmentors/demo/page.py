"""The page: its tabs, one below the other in code as beside each other on the screen."""

from __future__ import annotations

from concurrent.futures import Executor
from pathlib import Path

import gradio as gr

from .files import Files
from .models import Models
from .settings import Settings
from .shared import Shared
from .tabs import look, scenes, segment, shift

TITLE = """
# Diffusion features
A text-to-image model has learnt what things look like and where they are. Name what is in a picture and it is
segmented, without training; or look at the features that make it possible.
"""


def page(settings: Settings, models: Models, folder: Path, thread: Executor, others: Executor) -> gr.Blocks:
    """The page, not yet served.

    Args:
        models: those of ``settings``.
        folder: where uploads and results go; Gradio's folder for files.
        thread, others: where models run, and where anything else does; see ``Shared``.
    """
    shared = Shared(settings, models, folder, Files(folder / "results", settings.disk_bytes), thread, others)
    with gr.Blocks(title="Diffusion features", analytics_enabled=False) as blocks:
        gr.Markdown(TITLE, elem_id="title")
        with gr.Tab("Segment", id="segment"):
            segment.build(shared)
        with gr.Tab("Scenes", id="scenes"):
            scenes.build(shared)
        with gr.Tab("Look inside", id="look"):
            look.build(shared)
        with gr.Tab("Content shift", id="shift"):
            shift.build(shared)
    return blocks.queue(max_size=settings.waiting, api_open=False)  # nobody goes past the queue
