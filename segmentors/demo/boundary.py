"""Where Gradio ends: how pictures come in, and errors go out as plain sentences."""

from __future__ import annotations

import asyncio
import functools
import html
import json
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import gradio as gr
from gradio.components.annotated_image import AnnotatedImageData, Annotation
from gradio.data_classes import FileData, GradioModel, GradioRootModel

from .files import Titled
from .stopping import Stopped, in_thread

LOG = logging.getLogger(__name__)
UNEXPECTED = "Something went wrong on the server. It has been logged there; try other settings."
NO_MEMORY = "The server has too little memory for this picture and model: try a smaller picture."


def upload(label: str, **options: Any) -> gr.Image:
    """A picture that a visitor uploads, pastes or takes.

    Its events must have ``preprocess=False``: Gradio would open the file itself, and say nothing of what is wrong with
    it. Functions then get a mapping with the path, for ``uploads.picture``.
    """
    sources: Any = ["upload", "clipboard", "webcam"]
    return gr.Image(label=label, type="filepath", sources=sources, alt_text=label, buttons=[], **options)


def sent(component: gr.components.Component, value: Any) -> Any:
    """A value of a component as it goes to the browser, of an event with ``postprocess=False``."""
    found = component.postprocess(value)
    return found.model_dump() if isinstance(found, (GradioModel, GradioRootModel)) else found


def annotated(picture: str, masks: Titled, colours: Mapping[str, str]) -> Any:
    """An ``AnnotatedImage`` of files, of an event with ``postprocess=False``: by itself it only takes arrays.

    Args:
        masks: a file and the name of each.
        colours: name → "#rrggbb" of the legend.
    """
    named = [Annotation(image=FileData(path=file), label=name) for file, name in masks]
    value = AnnotatedImageData(image=FileData(path=picture), annotations=named).model_dump()
    return gr.update(value=value, color_map={**colours})


def run_and_cancel(label: str, name: str) -> tuple[gr.Button, gr.Button]:
    """Two buttons beside each other, the first with ``name`` as its id; the second is to cancel its event."""
    with gr.Row():
        stop = gr.Button("Cancel", min_width=90, scale=1, elem_id=f"cancel-{name}")
        run = gr.Button(label, variant="primary", min_width=160, scale=3, elem_id=name)
    return run, stop


def blanks(picture: gr.Image, found: Mapping[gr.components.Component, Any], runs: Sequence[Any]) -> None:
    """From now on, what was found in a picture goes when it does, and so do ``runs`` that are not done.

    Args:
        found: output → what stands there instead.
        runs: events.
    """
    quiet: dict[str, Any] = dict(queue=False, api_visibility="private")
    picture.change(None, None, [*found], js=f"() => {json.dumps([*found.values()])}", **quiet)
    picture.change(None, cancels=[*runs], **quiet)


def brings_into_view(run: gr.Button, place: str) -> None:
    """From now on, a click scrolls to where its result will be, on a phone far below; ``place`` is a CSS selector."""
    move = f"() => document.querySelector('{place}').scrollIntoView({{behavior: 'smooth', block: 'nearest'}})"
    run.click(None, js=move, queue=False, api_visibility="private")


def timed(progress: gr.Progress) -> Callable[[float, str], None]:
    """What tells a visitor the next step, and how long the rest will take, by what was done since the share was 0."""
    began = time.monotonic()

    def step(done: float, what: str) -> None:
        nonlocal began
        if not done:
            began = time.monotonic()
        left = (time.monotonic() - began) * (1 - done) / done if done else 0.0
        progress(done, desc=f"{what} · about {left:.0f} s left" if left >= 1 else what)

    return step


def plain(function: Callable[..., Any], thread: Executor) -> Callable[..., Coroutine[Any, Any, Any]]:
    """The function as Gradio is to call it: so that it can be cancelled, and with errors as sentences for the visitor.

    Those of input are told as they are, all others without detail. Cancelled, it leaves everything as it is.

    Args:
        thread: where it runs.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (gr.Error, Stopped):
            raise
        except ValueError as error:  # the message is ours, and may quote the visitor's words
            raise _shown(_sentence(error)) from None
        except Exception as error:
            memory = isinstance(error, MemoryError) or "out of memory" in str(error)
            if not memory:
                LOG.exception("an unexpected error")
            raise _shown(NO_MEMORY if memory else UNEXPECTED) from None

    run = in_thread(wrapped, thread)

    @functools.wraps(function)
    async def answered(*args: Any, **kwargs: Any) -> Any:
        try:
            return await run(*args, **kwargs)
        except asyncio.CancelledError:
            return gr.skip()  # Gradio's own answer would be an empty one, which the page may show as "Error"

    return answered


def _sentence(error: ValueError) -> str:
    said = " ".join(str(error).split()) or UNEXPECTED
    return said[0].upper() + said[1:] + "." * (said[-1] not in ".!?")


def _shown(message: str) -> gr.Error:
    """Gradio shows the message as HTML, so what could be a tag is escaped."""
    return gr.Error(html.escape(message, quote=False), title="That did not work", print_exception=False)
