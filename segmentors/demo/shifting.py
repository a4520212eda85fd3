"""Content shift in a visitor's picture: the techniques that a model has at hand, and GATE to choose among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from torch import Tensor

from diffusion_features import FeatureExtractor, embedded
from diffusion_features.images import as_tensor
from diffusion_features.suppression import CFG, ControlNet, Denoise, FineGrainedPrompt, LoRA, Technique
from diffusion_features.suppression.gate import BASE, FEWEST, Row, Trial, ranked, shown, trials
from diffusion_features.suppression.technique import Call
from diffusion_features.suppression.words import known_control

from .looking import Look, shown_size
from .models import Loaded
from .pacing import Step

Make = Callable[[str], list[Technique]]

FINER, DENOISE, GUIDED, EDGES = "finer prompt", "denoise", "guidance and denoise", "edges (ControlNet)"
WORDS = "high quality, sharp"
TILE = 256


class Shift(NamedTuple):
    """What was found: pictures with titles, a row of words for each technique, and the recommendation in words."""

    pictures: list[tuple[Image.Image, str]]
    table: list[list[str]]
    said: str


@dataclass
class _Told(Technique):
    """A technique that changes nothing, and tells that a call is made under those beside it."""

    tell: Callable[[], object]

    @contextmanager
    def applied(self, fx: Any, call: Call) -> Iterator[None]:
        self.tell()
        yield


def offered(loaded: Loaded) -> dict[str, Make]:
    """What can be tried without a download: name → the techniques, made of the words for the finer prompt."""
    found: dict[str, Make] = {
        FINER: lambda words: [finer(words)],
        DENOISE: _always(Denoise()),
        GUIDED: _always(CFG(), Denoise()),  # guidance changes steps, and alone there are none
    }
    if (control := _edges(loaded.fx)) is not None:
        found[EDGES] = _always(control)
    if loaded.fx.model_id == "embedded":
        for file in sorted((embedded.path().parent / "lora").glob("*.safetensors")):
            found[f"{file.stem} (LoRA)"] = _always(LoRA(file))
    return found


def _always(*techniques: Technique) -> Make:
    return lambda words: [*techniques]


def finer(words: str) -> FineGrainedPrompt:
    """The words behind the prompt; braces among them mean nothing."""
    return FineGrainedPrompt("{prompt}, " + words.replace("{", "{{").replace("}", "}}"))


def _edges(fx: FeatureExtractor) -> ControlNet | None:
    try:
        control = known_control(fx, "canny")
    except ValueError:  # none is known for this model
        return None
    there = Path(control.model).is_dir() or isinstance(  # type: ignore[arg-type]
        try_to_load_from_cache(str(control.model), "config.json"), str
    )
    return control if there else None


def test(
    loaded: Loaded,
    picture: Image.Image,
    look: Look,
    chosen: Sequence[str],
    words: str,
    draws: int,
    step: Step = lambda done, what: None,
) -> Shift:
    """Both tests of GATE for techniques, on the activations that the papers recommend.

    Args:
        look: its t is where features are taken; its seed the first of the noise.
        chosen: names out of ``offered``.
        words: of the finer prompt.
        draws: of noise, each with the next seed.
        step: told the share that is done, from 0 to 1, and what comes next.

    Raises:
        ValueError: nothing is chosen, or what is not offered; a model whose pictures cannot be decoded.
    """
    known = offered(loaded)
    if not chosen:
        raise ValueError("Choose at least one technique.")
    if other := [name for name in chosen if name not in known]:
        raise ValueError(f"{other[0][:60]!r} is not at hand for this model; there are {', '.join(known)}.")
    if FINER in chosen and not words:
        raise ValueError("Write the words of the finer prompt.")
    names = list(dict.fromkeys(chosen))
    done, calls = 0, 2 * draws * len(names)  # one for the features, one to repaint

    def begun(name: str) -> None:
        nonlocal done
        step(min(1.0, done / calls), f"{name[0].upper()}{name[1:]}")
        done += 1

    sets = {name: [*known[name](words), _Told(partial(begun, name))] for name in names}
    fx = FeatureExtractor(loaded.fx.pipe, loaded.first_look, model_id=loaded.fx.model_id)
    (size,) = loaded.segmentor.by_size([picture], None)
    pixels = as_tensor(picture, size=size, multiple=fx.multiple)
    found: list[Trial] = []
    for seed in range(look.seed, look.seed + draws):
        step(min(1.0, done / calls), "The model alone")
        found += trials(fx, pixels, sets, look.prompt, t=look.t, seeds=[seed])
    rows = ranked(found)
    return Shift(_pictures(picture, found, look.seed), list(map(_row, rows)), _said(rows, draws))


def _pictures(picture: Image.Image, found: Sequence[Trial], seed: int) -> list[tuple[Image.Image, str]]:
    """The picture, and what is made of it alone and under each technique with the first noise."""
    size = shown_size(picture.size, TILE)
    drawn = [(picture.resize(size), "the picture")]
    for trial in found:
        if trial.seed == seed:
            name = "the model alone" if trial.technique == BASE else trial.technique
            title = f"{name} · SSIM {trial.ssim:.3f}, Laplacian {shown(trial.score)}"
            drawn.append((_image(trial.repainted).resize(size), title))
    return drawn


def _image(pixels: Tensor) -> Image.Image:
    """Of (3, H, W) in [-1, 1]."""
    return Image.fromarray(((pixels.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy())


def _row(row: Row) -> list[str]:
    return [row.technique, row.verdict, str(row.ssim), str(row.laplacian)]


def _said(rows: Sequence[Row], draws: int) -> str:
    good = [row.technique for row in rows if row.verdict == "use"]
    if draws < FEWEST:
        return "Fewer than three draws of noise are too few to tell: take at least three for a recommendation."
    if not good:
        return "**None of these helps on this picture.** What is harmful makes the shift worse."
    return f"**For this picture, use {' or '.join(good)}.** The best stands first."
