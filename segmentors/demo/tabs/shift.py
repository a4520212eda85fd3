"""The tab "Content shift": which techniques keep the model at a visitor's picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from diffusion_features.suppression.gate import ANCHOR, LEVEL, RULE

from .. import uploads
from ..boundary import blanks, brings_into_view, run_and_cancel, timed, upload
from ..files import Titled
from ..looking import Look
from ..shared import LOOKS_UP, RUNS, Shared
from ..shifting import DENOISE, FINER, GUIDED, WORDS, offered, test

ABOUT = """\
A model that looks at a noisy picture imagines what the noise destroyed, and its features drift from the picture.
Techniques made for generation can hold them. The test repaints the picture from noise with and without each of them,
and compares the edges of features; the table says which are worth using.
"""
LONG = "The test takes a while; more techniques and draws take longer."
FIRST = [FINER, DENOISE, GUIDED]
T, DRAWS, MOST_DRAWS, SEEDS = 50, 4, 8, 2**31 - 1


def build(shared: Shared) -> None:
    gr.Markdown(ABOUT, elem_classes="hint")
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            asked = _inputs(shared)
            run, stop = run_and_cancel("Test", "gate")
        with gr.Column(scale=8, min_width=300):
            said = gr.Markdown(LONG, elem_classes="said")
            pictures = gr.Gallery(
                label="Repainted by the model", show_label=False, columns=3, height="auto", object_fit="contain",
                format="png", elem_id="repainted",
            )  # fmt: skip
            table = gr.Dataframe(
                headers=["technique", "recommendation", "gain in SSIM", "gain in Laplacian score"],
                label=f"Gain over the model alone, with its {LEVEL:.1%} interval", interactive=False, wrap=True,
                elem_id="gains", column_widths=["19%", "19%", "31%", "31%"],
            )  # fmt: skip
            with gr.Accordion("What the words mean", open=False):
                gr.Markdown(f"{RULE[0].upper()}{RULE[1:]}", elem_classes="hint")
    event = run.click(_run(shared), asked, [pictures, table, said], api_name="gate", **RUNS)
    brings_into_view(run, "#repainted")
    blanks(asked[0], {pictures: None, table: None, said: LONG}, [event])
    stop.click(None, cancels=[event], queue=False, api_visibility="private")


def _inputs(shared: Shared) -> list[Any]:
    """In the order in which ``gate`` takes them."""
    names = shared.models.names
    picture = upload("Picture to test on", height=300, elem_id="tested", elem_classes="enlarged")
    model = gr.Dropdown([*names], value=names[0], label="Model", visible=len(names) > 1, filterable=False)
    prompt = gr.Textbox(
        "", label="Prompt", info="What the picture shows; guidance needs it.", max_length=shared.limits.text
    )
    chosen = gr.Dropdown(
        FIRST, value=FIRST, multiselect=True, label="Techniques", allow_custom_value=True, elem_id="techniques"
    )
    words = gr.Textbox(
        WORDS, label="Words of the finer prompt", info="Written behind the prompt.", max_length=shared.limits.text
    )
    with gr.Row():
        t = gr.Number(T, label="Timestep", precision=0, minimum=0, maximum=ANCHOR - 1)
        draws = gr.Number(DRAWS, label="Draws of noise", precision=0, minimum=1, maximum=MOST_DRAWS)
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=SEEDS)

    @shared.beside
    def offer(model: str) -> Any:
        """The techniques that a model has at hand, when a visitor opens their list."""
        return gr.Dropdown(choices=[*offered(shared.looked_up(model))])

    quiet: dict[str, Any] = dict(api_visibility="private", show_progress="hidden", **LOOKS_UP)
    gr.on([chosen.focus, model.change], offer, model, chosen, **quiet)
    return [picture, model, prompt, chosen, words, t, draws, seed]


def _run(shared: Shared) -> Callable[..., Any]:
    @shared.with_model
    def gate(
        picture: Any,
        model: str = shared.models.names[0],
        prompt: str = "",
        techniques: list[str] | None = None,
        words: str = WORDS,
        t: float = T,
        draws: float = DRAWS,
        seed: float = 0,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Titled, list[list[str]], str]:
        """Test which techniques suppress content shift in a picture.

        Args:
            picture: an image file.
            model: one of those that the page offers.
            prompt: what the picture shows.
            techniques: "finer prompt", "denoise", "guidance and denoise", and what else the model has at hand: those
                that the page lists. None takes these three.
            words: of the finer prompt, written behind the prompt.
            t: timestep of the features, 0 to 799.
            draws: of noise, 1 to 8; a recommendation takes three.
            seed: of the first draw.

        Returns:
            Pictures with titles: the picture, and what the model makes of it alone and with each technique; a table of
            the gains, the best first; and the recommendation in words.
        """
        limits, step = shared.limits, timed(progress)
        step(0.0, "Reading the picture")
        image = shared.picture(picture)
        look = Look(
            uploads.text(prompt, "prompt", limits), uploads.whole(t, "timestep", 0, ANCHOR - 1),
            uploads.whole(seed, "seed", 0, SEEDS),
        )  # fmt: skip
        count = uploads.whole(draws, "number of draws", 1, MOST_DRAWS)
        chosen = FIRST if techniques is None else uploads.listed(techniques, "techniques")
        behind = uploads.text(words, "finer prompt", limits)
        step(0.0, "Loading the model")
        found = test(shared.models(model), image, look, chosen, behind, count, step)
        return shared.files.titled(found.pictures), found.table, found.said

    return gate
