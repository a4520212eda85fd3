"""The tab "Look inside": features as colours, what is similar to a point, and the attention of a word."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from .. import uploads
from ..boundary import blanks, brings_into_view, run_and_cancel, timed, upload
from ..hovering import hover
from ..looking import Look, attention, components, features, grouped, heads, layers, shown_size, similar
from ..models import Loaded
from ..pacing import Step
from ..settings import Limits
from ..shared import LOOKS_UP, RUNS, Shared

ALL = "all layers, each the mean of its heads"
WHOLE = "the whole model"
T, SEEDS = 50, 2**31 - 1
HOVER = """
<div class="pair"><canvas tabindex="0" role="img" hidden
aria-label="Similarity with the place under the pointer; the arrow keys move it"></canvas><canvas role="img" hidden
aria-label="Similarity in the second picture"></canvas></div><output></output>
"""


def build(shared: Shared) -> None:
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            asked = _inputs(shared)
        with gr.Column(scale=8, min_width=300):
            with gr.Tab("Components"):
                _components_tab(shared, asked)
            with gr.Tab("Similarity of a point"):
                _similarity_tab(shared, asked)
            with gr.Tab("Attention of a word"):
                _attention_tab(shared, asked)


def _inputs(shared: Shared) -> list[Any]:
    """Picture, model, prompt, timestep, seed and activations, in the order in which the functions take them."""
    names = shared.models.names
    picture = upload("Picture to look at", height=300, elem_id="looked")
    model = gr.Dropdown([*names], value=names[0], label="Model", visible=len(names) > 1, filterable=False)
    prompt = gr.Textbox(
        "", label="Prompt", info="What the model is told of the picture.", max_length=shared.limits.text
    )
    preset = gr.Dropdown(
        [], value=None, label="Preset", info="Fills in the activations that a paper recommends.", filterable=False,
        elem_id="preset",
    )  # fmt: skip
    place = gr.Dropdown(
        [WHOLE], value=WHOLE, label="Part of the model", info="Narrows the list below.", allow_custom_value=True,
        elem_id="place",
    )  # fmt: skip
    chosen = gr.Dropdown(
        [], value=[], multiselect=True, label="Activations", allow_custom_value=True, elem_id="activations",
        info="Write a part of a name to search. None takes what the papers recommend.",
    )  # fmt: skip
    with gr.Row():
        t = gr.Number(T, label="Timestep", precision=0, minimum=0, maximum=999)
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=SEEDS)

    @shared.beside
    def offer(model: str, place: str) -> tuple[Any, Any, Any]:
        """What a model has, when a visitor opens a list: presets, parts, activations of the part that is chosen."""
        loaded = shared.looked_up(model)
        groups = grouped(loaded.looked_at)
        here = groups.get(place, loaded.looked_at)
        lists = ([*loaded.presets], [WHOLE, *groups], here)
        return tuple(gr.Dropdown(choices=one) for one in lists)  # type: ignore[return-value]

    @shared.beside
    def fill(model: str, preset: str | None) -> list[str]:
        return shared.looked_up(model).presets.get(str(preset), [])

    quiet: dict[str, Any] = dict(api_visibility="private", show_progress="hidden", **LOOKS_UP)
    opened = [preset.focus, place.focus, place.input, chosen.focus, model.change]
    gr.on(opened, offer, [model, place], [preset, place, chosen], **quiet)
    preset.change(fill, [model, preset], chosen, **quiet)
    return [picture, model, prompt, t, seed, chosen]


def _components_tab(shared: Shared, asked: list[Any]) -> None:
    gr.Markdown(
        "The first three principal components of each activation, as red, green and blue: what has one colour is one "
        "thing to the model.", elem_classes="hint",
    )  # fmt: skip
    run, stop = run_and_cancel("Show components", "components")
    pictures = gr.Gallery(
        label="Components", show_label=False, columns=2, height="auto", object_fit="contain", format="png",
        elem_classes="sharp", elem_id="features",
    )  # fmt: skip

    @shared.with_model
    def show(
        picture: Any, model: str = shared.models.names[0], prompt: str = "", t: float = T, seed: float = 0,
        activations: list[str] | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:  # fmt: skip
        """The first three principal components of activations, as pictures with titles.

        Args:
            picture: an image file.
            model: one of those that the page offers.
            prompt: what the model is told.
            t: timestep, 0 to 999.
            seed: of the noise.
            activations: ids; none for those that the papers recommend.
        """
        step = timed(progress)
        look, image = _look(prompt, t, seed, shared.limits), shared.picture(picture)
        loaded = _loaded(shared, model, step)
        ids = _ids(loaded, activations, shared.limits)
        return shared.files.titled(components(features(loaded, image, look, ids, shared.features, step), image))

    event = run.click(show, asked, pictures, api_name="components", **RUNS)
    brings_into_view(run, "#features")
    blanks(asked[0], {pictures: None}, [event])
    stop.click(None, cancels=[event], queue=False, api_visibility="private")


def _similarity_tab(shared: Shared, asked: list[Any]) -> None:
    gr.Markdown(
        "Bright is what the model takes for the same as one point. With a second picture, the ring in it is where the "
        "point is found again.", elem_classes="hint",
    )  # fmt: skip
    second = upload("Second picture (may be empty)", height=200, elem_id="second", elem_classes="enlarged")
    _hovering(shared, [*asked, second])
    gr.Markdown("To the pixel: click on the picture, on the left, or on the answer below.", elem_classes="hint")
    with gr.Row():
        column = gr.Number(0, label="Column", precision=0, minimum=0)
        row = gr.Number(0, label="Row", precision=0, minimum=0)
    run, stop = run_and_cancel("Find this point", "find")
    said = gr.Markdown(elem_classes="said", elem_id="matched")
    with gr.Row():
        here = gr.Image(label="In the picture", alt_text="similarity with the point", interactive=False, buttons=[])
        there = gr.Image(
            label="In the second picture", alt_text="similarity with the point", interactive=False, buttons=[]
        )

    find = _find(shared)
    inputs, outputs = [*asked, second, column, row], [here, there, said]
    events: list[Any] = [run.click(find, inputs, outputs, api_name="similar", **RUNS)]

    def clicked(event: gr.SelectData) -> tuple[int, int]:
        return event.index[0], event.index[1]

    @shared.with_model
    def clicked_again(picture: Any, event: gr.SelectData) -> tuple[int, int]:
        """A pixel of the picture that was sent, from one of the picture that is shown larger."""
        full = uploads.full_size(picture, shared.folder, shared.limits)
        shown = shown_size(full)
        return event.index[0] * full[0] // shown[0], event.index[1] * full[1] // shown[1]

    place: list[Any] = [column, row]
    quiet: dict[str, Any] = dict(queue=False, api_visibility="private")
    for point in (
        asked[0].select(clicked, None, place, **quiet),
        here.select(clicked_again, asked[0], place, preprocess=False, **quiet),
    ):
        events.append(point.then(find, inputs, outputs, api_visibility="private", trigger_mode="always_last", **RUNS))
    for picture in (asked[0], second):
        blanks(picture, {here: None, there: None, said: ""}, events)
    stop.click(None, cancels=events, queue=False, api_visibility="private")


def _hovering(shared: Shared, inputs: list[Any]) -> None:
    """Similarities under the pointer, after one run of the model."""
    run, stop = run_and_cancel("Show similarities under the pointer", "prepare")
    view = gr.HTML(
        html_template=HOVER, js_on_load=Path(__file__).parent.with_name("hover.js").read_text(encoding="utf-8"),
        elem_id="hover",
    )  # fmt: skip

    @shared.with_model
    def prepare(
        picture: Any, model: str, prompt: str, t: float, seed: float, activations: list[str] | None, second: Any,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> str:  # fmt: skip
        step = timed(progress)
        look = _look(prompt, t, seed, shared.limits)
        given = [picture, second] if second else [picture]
        images = [shared.picture(one) for one in given]
        loaded = _loaded(shared, model, step)
        ids = _ids(loaded, activations, shared.limits)
        found, *other = [(features(loaded, image, look, ids, shared.features, step), image) for image in images]
        sizes = [uploads.full_size(one, shared.folder, shared.limits) for one in given]
        return hover(*found, other[0] if other else None, sizes)

    event = run.click(prepare, inputs, view, api_visibility="private", **RUNS)
    for picture in (inputs[0], inputs[-1]):
        blanks(picture, {view: ""}, [event])
    stop.click(None, cancels=[event], queue=False, api_visibility="private")


def _find(shared: Shared) -> Callable[..., Coroutine[Any, Any, tuple[str, str | None, str]]]:
    @shared.with_model
    def find(
        picture: Any, model: str = shared.models.names[0], prompt: str = "", t: float = T, seed: float = 0,
        activations: list[str] | None = None, second: Any = None, column: float = 0, row: float = 0,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[str, str | None, str]:  # fmt: skip
        """Cosine similarity of one pixel with every pixel of its picture, and of a second one.

        Args:
            picture: an image file.
            model, prompt, t, seed, activations: as for ``components``.
            second: an image file, in which the point is to be found; or nothing.
            column, row: the pixel, counted from 0 at the left and the top of the picture as it was sent.

        Returns:
            Both pictures under their similarities, and what was found in words.
        """
        limits, step = shared.limits, timed(progress)
        look = _look(prompt, t, seed, limits)
        image = shared.picture(picture)
        sizes = [uploads.full_size(one, shared.folder, limits) for one in (picture, second) if one is not None]
        point = (
            uploads.whole(column, "column", 0, sizes[0][0] - 1), uploads.whole(row, "row", 0, sizes[0][1] - 1)
        )  # fmt: skip
        loaded = _loaded(shared, model, step)
        ids = _ids(loaded, activations, limits)
        found = features(loaded, image, look, ids, shared.features, step)
        other = None if second is None else shared.picture(second)
        across = None if other is None else (features(loaded, other, look, ids, shared.features, step), other)
        here, there, said = similar(found, image, point, across, sizes)
        return shared.files.picture(here), None if there is None else shared.files.picture(there), said

    return find


def _attention_tab(shared: Shared, asked: list[Any]) -> None:
    gr.Markdown(
        "Where the picture attends to a word of the prompt, in each layer; choose a layer to see its heads. Each "
        "picture is stretched by itself, from dark to bright.",
        elem_classes="hint",
    )
    with gr.Row():
        word = gr.Textbox("", label="Word", max_length=shared.limits.name, elem_id="word")
        layer = gr.Dropdown([ALL], value=ALL, label="Layer", allow_custom_value=True)
    run, stop = run_and_cancel("Show attention", "attention")
    said = gr.Markdown(elem_classes="said")
    pictures = gr.Gallery(
        label="Attention", show_label=False, columns=3, height="auto", object_fit="contain",
        format="png", elem_classes="sharp", elem_id="attended",
    )  # fmt: skip

    @shared.with_model
    def show(
        picture: Any, model: str = shared.models.names[0], prompt: str = "", t: float = T, seed: float = 0,
        word: str = "", layer: str = ALL,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, str, Any]:  # fmt: skip
        """How much every place of a picture attends to a word.

        Args:
            picture: an image file.
            model, prompt, t, seed: as for ``components``; a word that is not in the prompt is written behind it.
            word: the word.
            layer: where its heads are to be shown; by default every layer, each the mean of its heads.

        Returns:
            Pictures with titles, what the model was told, and the layers there are.
        """
        limits, step = shared.limits, timed(progress)
        one = uploads.text(word, "word", limits)
        if not one:
            raise ValueError("Write the word first.")
        look, image = _look(prompt, t, seed, limits), shared.picture(picture)
        told, maps = attention(_loaded(shared, model, step), image, look, one, step)
        drawn = layers(maps, image) if layer == ALL else heads(maps, layer, image)
        offered = [ALL, *(title for _, title in layers(maps, image))]
        return shared.files.titled(drawn), f"It read: {uploads.quoted(told)}", gr.Dropdown(choices=offered, value=layer)

    inputs, outputs = [*asked[:-1], word, layer], [pictures, said, layer]
    events: list[Any] = [
        run.click(show, inputs, outputs, api_name="attention", **RUNS),
        word.submit(show, inputs, outputs, api_visibility="private", **RUNS),
        layer.change(show, inputs, outputs, api_visibility="private", **RUNS),
    ]
    blanks(asked[0], {pictures: None, said: ""}, events)
    stop.click(None, cancels=events, queue=False, api_visibility="private")


def _loaded(shared: Shared, model: str, step: Step) -> Loaded:
    """A model; the step after it, the run, is the first whose duration can be told ahead."""
    step(0.0, "Loading the model")
    loaded = shared.models(model)
    step(0.0, "Reading the picture")
    return loaded


def _look(prompt: object, t: object, seed: object, limits: Limits) -> Look:
    return Look(
        uploads.text(prompt, "prompt", limits), uploads.whole(t, "timestep", 0, 999),
        uploads.whole(seed, "seed", 0, SEEDS),
    )  # fmt: skip


def _ids(loaded: Loaded, given: Sequence[str] | None, limits: Limits) -> list[str]:
    """Activations of a model by exact id: no glob, preset or file."""
    if not given:
        return loaded.first_look
    if len(given) > limits.activations:
        raise ValueError(f"{len(given)} activations are too many: at most {limits.activations} are shown.")
    known = set(loaded.looked_at)
    if unknown := [id for id in given if id not in known]:
        raise ValueError(f"{str(unknown[0])[:60]!r} is no activation of {loaded.name} that has a place in the picture.")
    return list(dict.fromkeys(given))
