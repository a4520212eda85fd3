"""What the page shows of the inside of a model: features, what is similar to a point, what a word attends to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from diffusion_features import AttentionCall
from diffusion_features.correspondence import nearest, similarity
from diffusion_features.visualize import pca_image
from segmentors.training_free.pictures import heat
from segmentors.training_free.prompts import passes

from .models import Loaded
from .pacing import Step, told
from .recent import Recent
from .segmenting import fingerprint

Features = dict[str, Tensor]
Point = tuple[int, int]

SHOWN, TILE = 512, 384
"""Pixels on the longer side of pictures to look at, and of each of many."""
VEIL = 0.65
"""How much of a map covers the picture under it."""
RUNNING = "Running the model"

PLACE = re.compile(r"(?:down|up)-level\d+(?:-repeat\d+)?|[a-z]+-block\d+|[a-z]+")


class Look(NamedTuple):
    """How the model looks at a picture."""

    prompt: str = ""
    t: int = 50
    seed: int = 0


class Similar(NamedTuple):
    """The picture under its similarities, the second one likewise or nothing, and what was found in words."""

    here: Image.Image
    there: Image.Image | None
    said: str


def grouped(ids: Sequence[str]) -> dict[str, list[str]]:
    """Activations by where they are in the model: stage, level and repeat of a UNet, or block of a transformer."""
    found: dict[str, list[str]] = {}
    for id in ids:
        place = PLACE.match(id)
        found.setdefault(place[0] if place else id, []).append(id)
    return found


def features(
    loaded: Loaded,
    picture: Image.Image,
    look: Look,
    ids: Sequence[str],
    kept: Recent[Features],
    step: Step = lambda done, what: None,
) -> Features:
    """Activations of a picture, id → (C, h, w), at the size the model was trained for.

    Args:
        step: told the share of the run that is done, from 0 to 1, and what it is.

    Raises:
        UnknownActivation, ValueError: as ``FeatureExtractor``.
    """
    (size,) = loaded.segmentor.by_size([picture], None)
    key = (loaded.name, fingerprint(picture), look, tuple(sorted(ids)))

    def run() -> Features:
        with told(loaded.fx.denoiser, lambda done: step(done, RUNNING)):
            found = loaded.fx(picture, look.prompt, t=look.t, seed=look.seed, activations=list(ids), size=size)
        return {id: tensor[0] for id, tensor in found.items()}

    return kept(key, run)[0]


def components(found: Features, picture: Image.Image) -> list[tuple[Image.Image, str]]:
    """The first three principal components of each feature as colours, in the shape of the picture, with a title."""
    size = shown_size(picture.size, TILE)
    return [
        (pca_image(tensor).resize(size, Image.Resampling.NEAREST), f"{id}  ({'x'.join(map(str, tensor.shape))})")
        for id, tensor in found.items()
    ]


def similar(
    found: Features,
    picture: Image.Image,
    point: Point,
    other: tuple[Features, Image.Image] | None = None,
    sizes: Sequence[Point] = (),
) -> Similar:
    """Cosine similarity of one pixel with every pixel of its picture, and of another one.

    Args:
        point: column and row.
        sizes: width and height of the pictures in whose pixels points are told, where those given are reduced.

    Raises:
        ValueError: the point lies outside the picture.
    """
    sent = [*sizes] or [picture.size, *([other[1].size] if other else [])]
    if not (0 <= point[0] < sent[0][0] and 0 <= point[1] < sent[0][1]):
        raise ValueError(f"The point {point[0]}, {point[1]} is outside the picture, {sent[0][0]}x{sent[0][1]}.")
    centre = _scaled((point[0] + 0.5, point[1] + 0.5), sent[0], picture.size)
    own = _similarity(found, picture, centre, found, picture)
    here = marked(under(picture, own), centre)
    if other is None:
        return Similar(here, None, f"Column {point[0]}, row {point[1]}: similarity from {own.min():.2f} to 1.")
    target, second = other
    across = _similarity(found, picture, centre, target, second)
    x, y = nearest(across[None])[0].tolist()
    column, row = map(int, _scaled((x, y), second.size, sent[1]))
    said = f"Column {point[0]}, row {point[1]} is most like column {column}, row {row} of the second picture"
    return Similar(here, marked(under(second, across), (x, y)), f"{said}: similarity {across.max():.2f}.")


def _scaled(place: tuple[float, float], size: Point, other: Point) -> tuple[float, float]:
    """A place in a picture of one size, in the same picture of another."""
    return place[0] * other[0] / size[0], place[1] * other[1] / size[1]


def _similarity(
    source: Features, picture: Image.Image, point: tuple[float, float], target: Features, other: Image.Image
) -> Tensor:
    sizes = {"source_size": (picture.height, picture.width), "target_size": (other.height, other.width)}
    return similarity(source, target, torch.tensor([point]), **sizes)[0].float().cpu()


def attention(
    loaded: Loaded, picture: Image.Image, look: Look, word: str, step: Step = lambda done, what: None
) -> tuple[str, dict[str, Tensor]]:
    """How much every place of the picture attends to a word, in each layer and head.

    Args:
        look: its prompt is what the model is told; a word that it does not have is written behind it.
        step: as for ``features``.

    Returns:
        The prompt, and cross-map id → (heads, h, w), the mean over the tokens of the word.

    Raises:
        ValueError: the tokenizer has no token for the word, or the prompt is too long.
    """
    segmentor = loaded.segmentor
    read = passes(segmentor.parts, {word: [word]}, segmentor.preset.template, look.prompt or None)[0]
    columns = read.entities[word]
    (size,) = segmentor.by_size([picture], None)

    def of_word(id: str, call: AttentionCall) -> Tensor:
        return call.map.rows()[0, :, :, columns].float().mean(dim=-1).unflatten(-1, call.map.grid).cpu()

    with told(loaded.fx.denoiser, lambda done: step(done, RUNNING)):
        maps = loaded.fx.stream(
            picture, of_word, read.prompt, t=look.t, seed=look.seed, activations="*-cross-map", size=size
        )
    return read.prompt, maps


def layers(maps: dict[str, Tensor], picture: Image.Image) -> list[tuple[Image.Image, str]]:
    """A picture of each layer, the mean over its heads, each stretched by itself."""
    size = shown_size(picture.size, TILE)
    return [(heat(_stretched(heads.mean(dim=0)), size), _place(id)) for id, heads in maps.items()]


def heads(maps: dict[str, Tensor], layer: str, picture: Image.Image) -> list[tuple[Image.Image, str]]:
    """A picture of each head of a layer, each stretched by itself.

    Raises:
        ValueError: there is no such layer.
    """
    chosen = {_place(id): tensor for id, tensor in maps.items()}
    if layer not in chosen:
        raise ValueError(f"There is no layer {layer}; there are {', '.join(chosen)}.")
    size = shown_size(picture.size, TILE)
    return [(heat(_stretched(one), size), f"head {number}") for number, one in enumerate(chosen[layer])]


def _place(id: str) -> str:
    return id.removesuffix("-cross-map")


def under(picture: Image.Image, values: Tensor) -> Image.Image:
    """A picture under a map (h, w) of any range, dark where it is lowest."""
    return Image.blend(picture, heat(_stretched(values), picture.size), VEIL)


def marked(picture: Image.Image, point: tuple[float, float]) -> Image.Image:
    """A picture enlarged to be seen, with a ring around a point (x, y)."""
    size = shown_size(picture.size)
    scale = size[0] / picture.width
    sheet = picture.resize(size, Image.Resampling.BICUBIC)
    x, y = (coordinate * scale for coordinate in point)
    draw = ImageDraw.Draw(sheet)
    for radius, colour in ((9, "black"), (7, "white")):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=2)
    return sheet


def _stretched(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp(min=1e-12)


def shown_size(size: tuple[int, int], side: int = SHOWN) -> tuple[int, int]:
    """Width and height of a picture when its longer side is brought to ``side`` pixels."""
    scale = side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
