"""The tab "Segment": a picture and words in, labels out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import gradio as gr
from PIL import Image

from diffusion_features.embedded import CLASSES
from segmentors import Method
from segmentors.training_free.background import Background
from segmentors.training_free.heads import Heads
from segmentors.training_free.layers import Layers
from segmentors.training_free.pictures import palette
from segmentors.training_free.rescaling import Rescale

from .. import uploads
from ..boundary import annotated, blanks, brings_into_view, run_and_cancel, sent, timed, upload
from ..pictures import colour_map, covered, masks, score_maps
from ..scenes import scene
from ..segmenting import Answer, Question, answer
from ..settings import Limits
from ..shared import RUNS, Shared

SEEDS, MOST_K = 2**31 - 1, 10
CHOOSE = "Choose a picture or an example, and name what to look for."
EDGES = ("none", "pamr")  # the third way, a CRF, needs a package that is built on the spot
SCENES = (33, 13, 41, 40)
PHOTOGRAPHS = {
    "chelsea.png": (["cat"], ["wall", "blanket"], "a photo of a cat in front of a wall"),
    "coffee.png": (["cup", "spoon"], ["table"], "a photo of a cup of coffee and a spoon on a table"),
    "rocket.jpg": (["rocket", "tower"], ["sky"], "a photo of a rocket and towers in front of the sky"),
}
"""Of scikit-image: its file → classes, background, caption."""


def build(shared: Shared) -> None:
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            asked = _inputs(shared)
            run, stop = run_and_cancel("Segment", "run")
            _examples(shared, asked)
        with gr.Column(scale=7, min_width=300):
            shown, opacity = _outputs()
    _events(shared, [*asked, opacity], shown, run, stop)


def _inputs(shared: Shared) -> list[Any]:
    """In the order in which ``segment`` takes them."""
    limits, names = shared.limits, shared.models.names
    picture = upload("Picture", height=320, elem_id="picture", elem_classes="enlarged")
    words: dict[str, Any] = dict(choices=_known(), multiselect=True, allow_custom_value=True, value=[])
    classes = gr.Dropdown(
        **words, label="Classes", info="What to look for: write a word, press Enter.", elem_id="classes"
    )
    background = gr.Dropdown(
        **words, label="Background", info="What may be there too, but is not of interest. May be empty."
    )
    caption = gr.Textbox(
        value="", label="Caption", info="What the picture shows, if you like; the model reads it with the classes.",
        max_length=limits.text,
    )  # fmt: skip
    model = gr.Dropdown([*names], value=names[0], label="Model", visible=len(names) > 1, filterable=False)
    empty: dict[str, Any] = dict(value="", placeholder="as recommended", max_length=4)
    with gr.Accordion("Advanced", open=False):
        gr.Markdown("Empty fields take what the paper recommends for the model.", elem_classes="hint")
        with gr.Row():
            # No gr.Number: it turns an empty field into 0 as soon as it is on the screen.
            t = gr.Textbox(label="Timestep", info="0 clean, 999 noise", **empty, elem_id="timestep")
            seed = gr.Number(label="Seed", info="of the noise", precision=0, minimum=0, maximum=SEEDS, value=0)
        with gr.Row():
            k = gr.Textbox(label="Refinements", info=f"0 to {MOST_K}", **empty, elem_id="refinements")
            threshold = gr.Slider(
                0, 1, 0.0, step=0.01, label="Background threshold", info="added to its score", elem_id="threshold"
            )
        with gr.Row():
            heads = gr.Dropdown([*get_args(Heads)], value="dot", label="Head weights", filterable=False)
            layers = gr.Dropdown([*get_args(Layers)], value="dot", label="Layer weights", filterable=False)
        with gr.Row():
            rescale = gr.Dropdown([*get_args(Rescale)], value="sum", label="Rescaling", filterable=False)
            how = gr.Dropdown([*get_args(Background)], value="offset", label="Background score", filterable=False)
        edges = gr.Dropdown(
            [*EDGES], value="none", label="Edges", filterable=False, elem_id="edges",
            info="pamr spreads scores to neighbouring pixels of like colour: finer, and a little slower.",
        )  # fmt: skip
    return [picture, classes, background, caption, model, t, seed, k, threshold, heads, layers, rescale, how, edges]


def _known() -> list[str]:
    """Words to choose from; visitors may write any other."""
    shown = [word for classes, background, _ in PHOTOGRAPHS.values() for word in (*classes, *background)]
    return list(dict.fromkeys([*CLASSES, *shown]))


def _outputs() -> tuple[list[Any], gr.Slider]:
    """In the order in which ``segment`` gives them; and how strong the colours are to be."""
    result = gr.AnnotatedImage(
        label="Labels", height=420, elem_id="result", elem_classes="labels", buttons=["fullscreen"]
    )
    said = gr.Markdown(CHOOSE, elem_classes="said")
    opacity = gr.Slider(0, 1, 0.6, step=0.05, label="Opacity of the colours", elem_id="opacity")
    with gr.Tab("Compare"):
        gr.Markdown(
            "Left of the slider: plain attention. Right: its heads and layers weighted, its scores rescaled.",
            elem_classes="hint",
        )
        compared = gr.ImageSlider(
            label="Plain attention and ours", show_label=False, buttons=["fullscreen"], elem_id="compared"
        )
    with gr.Tab("Scores"):
        gr.Markdown("The score of each class: dark for 0, bright for 1.", elem_classes="hint")
        maps = gr.Gallery(
            label="Scores", show_label=False, columns=4, height="auto", object_fit="contain", format="png",
            elem_classes="sharp", elem_id="scores",
        )  # fmt: skip
    with gr.Tab("Layers"):
        weights = gr.Dataframe(
            headers=["layer", "weight", "its heads, mean over the picture"], interactive=False, wrap=True,
            label="How much each layer of the model counts, and in it each head", elem_id="weights",
        )  # fmt: skip
    with gr.Tab("Files"):
        files = gr.File(
            label="Label picture, overlay, and scores (classes, height, width)", file_count="multiple", elem_id="files"
        )
    return [result, said, compared, maps, weights, files], opacity


def _examples(shared: Shared, asked: Sequence[Any]) -> None:
    inputs = asked[:4]
    folder = shared.folder / "examples"
    folder.mkdir()
    drawn = []
    for number in SCENES:
        one = scene("test", number)
        one.image.save(folder / f"scene-{number}.png")
        drawn.append([str(folder / f"scene-{number}.png"), [*one.classes], [], ""])
    gr.Examples(drawn, inputs, label="Drawn scenes, which the embedded model knows", api_visibility="private")
    gr.Examples(
        _photographs(), inputs, label="Photographs, for a model that was trained on such", api_visibility="private"
    )


def _photographs() -> list[list[Any]]:
    import skimage.data

    folder = Path(skimage.data.__path__[0])
    return [[str(folder / name), *about] for name, about in PHOTOGRAPHS.items()]


def _events(shared: Shared, inputs: list[Any], outputs: list[Any], run: gr.Button, stop: gr.Button) -> None:
    segment = _segment(shared, outputs)
    shown_of = gr.Textbox("", visible=False)  # a gr.State would not come without preprocessing
    empty = [None, CHOOSE, None, None, None, None]

    @shared.with_model
    def again(before: str, *given: Any) -> Any:
        """Only of a picture that was asked about; until then, a visitor is still choosing."""
        if not isinstance(given[0], dict) or given[0].get("path") != before:
            return (gr.skip(),) * len(outputs)
        return segment(*given) if given[1] else [sent(one, value) for one, value in zip(outputs, empty, strict=True)]

    event = run.click(shared.with_model(segment), inputs, outputs, postprocess=False, api_name="segment", **RUNS)
    brings_into_view(run, "#result")
    seen = "(picture, result) => result && picture ? picture.path : ''"
    event.success(None, [inputs[0], outputs[0]], shown_of, js=seen, api_visibility="private", queue=False)
    _, classes, background, _, _, _, _, _, threshold, *choices, opacity = inputs
    quick = gr.on(
        [threshold.release, opacity.release, *(one.change for one in (classes, background, *choices))],
        again, [shown_of, *inputs], outputs, api_visibility="private", trigger_mode="always_last",
        show_progress="minimal", postprocess=False, **RUNS,
    )  # fmt: skip
    blanks(inputs[0], {**dict(zip(outputs, empty, strict=True)), shown_of: ""}, [event, quick])
    stop.click(None, cancels=[event, quick], queue=False, api_visibility="private")


def _segment(shared: Shared, outputs: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
    def segment(
        picture: Any,
        classes: list[str],
        background: list[str] | None = None,
        caption: str | None = None,
        model: str = shared.models.names[0],
        t: str | float | None = None,
        seed: float = 0,
        k: str | float | None = None,
        threshold: float = 0.0,
        heads: str = "dot",
        layers: str = "dot",
        rescale: str = "sum",
        background_score: str = "offset",
        edges: str = "none",
        opacity: float = 0.6,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:
        """Label every pixel of a picture with one of the classes, by the attention of the model and without training.

        Args:
            picture: an image file; larger ones are reduced to the page's limit.
            classes: names of what to look for.
            background: what may be there and is no class; with a name here, or a threshold, there is a class
                "background", which comes first.
            caption: a description of the picture.
            model: one of those that the page offers.
            t: timestep, 0 to 999; empty for the model's preset.
            seed: of the noise.
            k: how often the maps are refined, 0 to 10; empty for the model's preset.
            threshold: of the background, 0 to 1.
            heads, layers, rescale, background_score: variants of the method.
            edges: "pamr" to bring labels to the edges of things, or "none".
            opacity: of the colours in the pictures, 0 to 1.

        Returns:
            The annotated picture; what was done, in words; the pictures before and after; score maps; the weights
            of layers and heads; and the files labels.png, overlay.png and scores.npy.
        """
        limits, step = shared.limits, timed(progress)
        step(0.0, "Reading the picture")
        strength = uploads.share(opacity, "opacity")
        question = Question(
            shared.picture(picture),
            *_words(classes, background, threshold, limits),
            uploads.text(caption, "caption", limits) or None,
            uploads.whole(seed, "seed", 0, SEEDS),
            uploads.whole_or_none(t, "timestep", 0, 999),
            uploads.whole_or_none(k, "number of refinements", 0, MOST_K),
            Method(
                heads=uploads.one_of(heads, "head weights", get_args(Heads)),  # type: ignore[arg-type]
                layers=uploads.one_of(layers, "layer weights", get_args(Layers)),  # type: ignore[arg-type]
                rescale=uploads.one_of(rescale, "rescaling", get_args(Rescale)),  # type: ignore[arg-type]
                background=uploads.one_of(background_score, "background score", get_args(Background)),  # type: ignore[arg-type]
                threshold=uploads.share(threshold, "threshold"),
                edges=uploads.one_of(edges, "way of finding edges", EDGES),  # type: ignore[arg-type]
            ),
        )
        step(0.0, "Loading the model")
        loaded = shared.models(model)
        step(0.0, "Reading the words")
        began = time.perf_counter()
        found = answer(loaded, question, shared.runs, step)
        seconds = time.perf_counter() - began
        step(0.9, "Drawing")
        shown, *others = _shown(shared, question.picture, found, strength, seconds)
        return shown, *map(sent, outputs[1:], others)

    return segment


def _words(
    classes: Any, background: Any, threshold: float, limits: Limits
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Classes and background; a background without words is asked for by its threshold."""
    names, behind = uploads.names(classes, background, limits)
    return tuple(names), tuple(behind) if behind or threshold else None


def _shown(shared: Shared, picture: Image.Image, found: Answer, opacity: float, seconds: float) -> tuple[Any, ...]:
    """In the order of ``_outputs``, the first as it goes to the browser."""
    colours, files = palette(found.classes), shared.files
    drawn = files.titled(masks(found.labels, found.classes, colours, opacity))
    before, after = (covered(picture, labels, colours, opacity) for labels in (found.plain, found.labels))
    return (
        annotated(files.picture(picture), drawn, colour_map(found.classes, colours)),
        _said(found, seconds),
        (files.picture(before), files.picture(after)),
        files.titled(score_maps(found.scores, found.classes)),
        _weights(found),
        files.results(picture, found, colours),
    )


def _weights(found: Answer) -> list[list[str]]:
    """A row for each layer: its name, its weight, and those of its heads."""
    return [
        [
            id.removesuffix("-cross-map"), f"{weight:.3f}",
            " ".join(f"{one:.2f}" for one in found.head_weights[id]) if id in found.head_weights else "all alike",
        ]
        for id, weight in found.layer_weights.items()
    ]  # fmt: skip


def _said(found: Answer, seconds: float) -> str:
    told = " · ".join(f"{uploads.quoted(prompt)}" for prompt in found.prompts)
    how = "from what the model gave before" if found.remembered else "by a run of the model"
    return f"{seconds:.2f} s, {how}. It read: {told}"
