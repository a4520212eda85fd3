"""The tab "Scenes": a drawn scene with its truth, and how well it is segmented."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import gradio as gr

from diffusion_features.embedded.dataset import SPLITS
from segmentors.training_free.pictures import palette
from segmentors.training_free.prompts import shortened

from .. import uploads
from ..boundary import annotated, sent, timed
from ..pictures import colour_map, masks
from ..scenes import LIMIT, overlap, scene, truth
from ..segmenting import Question, answer
from ..shared import RUNS, Shared

ABOUT = """\
The package draws scenes of its own, with exact labels, and the embedded model was trained on them. Those below were not
in its training: *test* scenes are of the same kind, *held-out* ones have styles, shapes and company that it never saw.
"""
OPACITY = 0.65
KINDS = [split for split in SPLITS if split != "train"]


def build(shared: Shared) -> None:
    gr.Markdown(ABOUT, elem_classes="hint")
    names = shared.models.names
    with gr.Row(equal_height=True):
        kind = gr.Dropdown(KINDS, value="test", label="Kind of scene", filterable=False, scale=2)
        number = gr.Number(0, label="Number", precision=0, minimum=0, maximum=LIMIT - 1, scale=2, elem_id="number")
        caption = gr.Checkbox(False, label="Tell the model the scene's caption", scale=2)
        model = gr.Dropdown([*names], value=names[0], label="Model", visible=len(names) > 1, filterable=False, scale=2)
    with gr.Row():
        stop = gr.Button("Cancel", min_width=90, scale=1, elem_id="cancel-draw")
        draw = gr.Button("Draw and segment this one", min_width=160, scale=3, elem_id="draw")
        another = gr.Button("Another one", variant="primary", min_width=160, scale=3, elem_id="another")
    said = gr.Markdown(elem_classes="said")
    with gr.Row():
        drawn = gr.Image(
            label="Scene", alt_text="the drawn scene", interactive=False, buttons=[], min_width=220,
            elem_id="drawn", elem_classes="enlarged",
        )  # fmt: skip
        true = gr.AnnotatedImage(label="Truth", elem_classes="labels", buttons=[], min_width=220)
        found = gr.AnnotatedImage(label="Found", elem_classes="labels", buttons=[], min_width=220)
    table = gr.Dataframe(
        headers=["class", "IoU"], label="Intersection over union: 1 is perfect", interactive=False, elem_id="overlap"
    )
    outputs = [drawn, true, found, table, said]
    run = _run(shared, outputs)
    asked = [kind, number, caption, model]
    events: list[Any] = [
        draw.click(run, asked, outputs, api_name="scene", postprocess=False, **RUNS),
        another.click(lambda: secrets.randbelow(LIMIT), None, number, queue=False, api_visibility="private").then(
            run, asked, outputs, api_visibility="private", postprocess=False, **RUNS
        ),
    ]
    stop.click(None, cancels=events, queue=False, api_visibility="private")


def _run(shared: Shared, outputs: Sequence[Any]) -> Callable[..., Coroutine[Any, Any, tuple[Any, ...]]]:
    @shared.with_model
    def run(
        kind: str, number: float = 0, caption: bool = False, model: str = shared.models.names[0],
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:  # fmt: skip
        """Draw a scene, segment it with the names of what is in it, and compare with the truth.

        Args:
            kind: "validation", "test" or "held-out".
            number: of the scene among its kind, from 0.
            caption: whether the model is told the scene's caption too, as much of it as it reads.
            model: one of those that the page offers.

        Returns:
            The scene, the truth and the result as annotated pictures, the IoU of each class, and their mean in words.
        """
        step = timed(progress)
        step(0.0, "Drawing the scene")
        one = scene(uploads.one_of(kind, "kind of scene", KINDS), uploads.whole(number, "number", 0, LIMIT - 1))
        step(0.0, "Loading the model")
        loaded = shared.models(model)
        told = shortened(loaded.segmentor.parts, one.caption) if caption else None
        question = Question(one.image, one.classes, caption=told)
        step(0.0, "Reading the words")
        found = answer(loaded, question, shared.runs, step)
        each = overlap(found.labels, truth(one), len(one.classes))
        colours, drawn = palette(one.classes), shared.files.picture(one.image)
        shown = [
            annotated(
                drawn,
                shared.files.titled(masks(labels, one.classes, colours, OPACITY)),
                colour_map(one.classes, colours),
            )
            for labels in (truth(one), found.labels)
        ]
        rows = [[name, f"{iou:.3f}"] for name, iou in zip(one.classes, each, strict=True)]
        said = f"**Mean IoU {sum(each) / len(each):.3f}** · a {one.style} scene: “{one.caption}”"
        return sent(outputs[0], drawn), *shown, *map(sent, outputs[3:], (rows, said))

    return run
