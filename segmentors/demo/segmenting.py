"""What the page asks of the segmentor, and how one run of the model answers several questions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from diffusion_features.images import as_tensor
from segmentors import Method, TrainingFreeSegmentor
from segmentors.training_free import PLAIN
from segmentors.training_free.aggregation import Aggregator
from segmentors.training_free.labelling import Wanted, labelled

from .models import Loaded
from .pacing import Step, told
from .recent import Recent

Runs = Recent[list[Aggregator]]


@dataclass(frozen=True)
class Question:
    """What is asked about a picture; see ``TrainingFreeSegmentor`` and ``Method``.

    Attributes:
        background: ``None`` for no class "background".
        caption: ``None`` to tell the model the names alone.
        t, k: ``None`` takes the model's preset. k = 0 does not refine.
        method: its ``refine`` does not count; k says it.
    """

    picture: Image.Image
    classes: tuple[str, ...]
    background: tuple[str, ...] | None = None
    caption: str | None = None
    seed: int = 0
    t: int | None = None
    k: int | None = None
    method: Method = field(default_factory=Method)


@dataclass(frozen=True)
class Answer:
    """What was found.

    Attributes:
        labels: int64 (H, W), indices into ``classes``; ``plain`` are those of ``PLAIN``, the practice before the paper,
            with the same background and edges.
        scores: float32 (K, H, W) in [0, 1].
        classes: names, "background" first where it was asked for.
        prompts: what the model was told.
        layer_weights: cross-map id → weight, summing to 1; of the first prompt.
        head_weights: cross-map id → weight of each head, the mean over the picture; of the first prompt. Empty where
            heads are averaged.
        remembered: whether the model did not have to run.
    """

    labels: Tensor
    plain: Tensor
    scores: Tensor
    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    layer_weights: dict[str, float]
    head_weights: dict[str, list[float]]
    remembered: bool


@torch.no_grad()
def answer(loaded: Loaded, question: Question, runs: Runs, step: Step = lambda done, what: None) -> Answer:
    """Segment a picture as ``TrainingFreeSegmentor`` does; labels and scores are equal to its.

    The model runs once for each prompt that ``runs`` has not seen with this picture, t, seed and weighting. So another
    threshold, rescaling, number of refinements, way of finding edges or background without words costs no run; nor do
    other classes, where the caption names them all.

    Args:
        step: told the share that is done, from 0 to 1, and what comes next.

    Raises:
        ValueError: as the segmentor; the message is a sentence for the visitor.
    """
    segmentor = _segmentor(loaded, question)
    wanted = segmentor.wanted(question.classes, question.background, question.caption)
    pairs, new = [], False
    for number, one in enumerate(wanted.told):

        def share(done: float, number: int = number) -> None:
            what = f"Running the model ({number + 1} of {len(wanted.told)})"
            step(0.05 + 0.65 * (number + done) / len(wanted.told), what)

        share(0.0)
        with told(loaded.fx.denoiser, share):
            pair, known = _run(loaded, segmentor, question, one.prompt, runs)
        pairs.append(pair)
        new = new or not known
    step(0.7, "Making the labels")
    ours, plain = ([pair[which] for pair in pairs] for which in (0, 1))
    labels, scores = _labelled(segmentor, ours, wanted, question, segmentor.method)
    heads = {id: maps.float().mean(dim=(1, 2)).tolist() for id, maps in ours[0].head_maps(0).items()}
    before, _ = _labelled(segmentor, plain, wanted, question, plainly(segmentor.method))
    return Answer(
        labels, before, scores, ("background",) * wanted.with_background + tuple(wanted.names),
        tuple(one.prompt for one in wanted.told), ours[0].layer_shares(0), heads, not new,
    )  # fmt: skip


def plainly(method: Method) -> Method:
    """``PLAIN``, with what a method has besides: refinement, edges, and the score of the background."""
    return replace(
        PLAIN, refine=method.refine, edges=method.edges, background=method.background, threshold=method.threshold
    )


def _segmentor(loaded: Loaded, question: Question) -> TrainingFreeSegmentor:
    preset = loaded.segmentor.preset
    t, k = (given if given is not None else own for given, own in ((question.t, preset.t), (question.k, preset.k)))
    method = replace(question.method, refine=k > 0)
    return TrainingFreeSegmentor(loaded.fx, replace(preset, t=t, k=k), method)


def _run(
    loaded: Loaded, segmentor: TrainingFreeSegmentor, question: Question, prompt: str, runs: Runs
) -> tuple[list[Aggregator], bool]:
    """What the model's attention gives for a prompt: with the method's weights, and with none."""
    method = replace(question.method, refine=True)  # keeps the queries and keys for any later k
    (size,) = segmentor.by_size([question.picture], None)
    weights = (method.heads, method.layers, method.renormalise, method.as_released)
    key = (loaded.name, fingerprint(question.picture), prompt, size, segmentor.preset.t, question.seed, weights)

    def run() -> list[Aggregator]:
        collected = segmentor.collect([question.picture], [prompt], size, question.seed, [method, PLAIN])
        return [of_method[0] for of_method in collected]

    return runs(key, run)


def _labelled(
    segmentor: TrainingFreeSegmentor, collected: list[Aggregator], wanted: Wanted, question: Question, method: Method
) -> tuple[Tensor, Tensor]:
    maps = segmentor.maps(collected, wanted, method.rescale)
    if method.refine:
        maps = segmentor.refined(maps, collected[0])
    picture = question.picture
    (working,) = segmentor.by_size([picture], None)
    seen = None if method.edges == "none" else as_tensor(picture, size=working)[0]
    labels, scores = labelled(maps[0], (picture.height, picture.width), wanted.with_background, method, seen)
    return labels.cpu(), scores.cpu()


def fingerprint(picture: Image.Image) -> str:
    """The same for the same pixels."""
    return hashlib.sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes()).hexdigest()
