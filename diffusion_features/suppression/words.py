"""Techniques from a word or two on a command line, and the ControlNets that go with well-known models."""

from __future__ import annotations

import difflib
from functools import partial
from pathlib import Path
from typing import Any

from ..embedded import path as embedded
from ..families import unwrap
from .conditions import canny
from .control import ControlNet
from .image_prompt import IPAdapter
from .lora import LoRA
from .prompt import FineGrainedPrompt
from .steps import CFG, Denoise
from .technique import Technique

KNOWN = {
    ("sd15", "canny"): "lllyasviel/sd-controlnet-canny",
    ("sd15", "depth"): "lllyasviel/sd-controlnet-depth",
    ("sdxl", "canny"): "diffusers/controlnet-canny-sdxl-1.0",
    ("sdxl", "depth"): "diffusers/controlnet-depth-sdxl-1.0",
    ("sd3", "canny"): "InstantX/SD3-Controlnet-Canny",
    ("flux", "canny"): "InstantX/FLUX.1-dev-Controlnet-Canny",
}
"""The ControlNet of a model, told by its presets, and a condition."""

KNOWN_IMAGE_PROMPTS = {
    "sd15": "models/ip-adapter_sd15.safetensors",
    "sdxl": "sdxl_models/ip-adapter_sdxl.safetensors",
}
"""The IP-Adapter of a model, told by its presets: its file in the repository h94/IP-Adapter."""

WORDS = ("canny", "depth", "lora", "image", "prompt", "caption", "denoise", "cfg")
# What the shipped ControlNet learnt from: its scenes are drawn, and small.
EMBEDDED_CANNY = partial(canny, low=12.0, high=30.0, sigma=1.0)


def from_words(text: str, fx: Any) -> Technique:
    """A technique from ``word``, ``word=value`` or ``word=value@scale``.

    ``canny``, ``depth`` (value: a ControlNet; known models have one), ``lora`` (a file, folder or hub id), ``image``
    (an IP-Adapter, a file or folder; known models have one), ``prompt`` (a text, with ``{prompt}`` for the prompt),
    ``caption`` (a captioning model), ``denoise`` (timesteps), ``cfg`` (a scale).

    Args:
        fx: the extractor that it is for.

    Raises:
        ValueError: another word, or a value that is missing or is no number.
    """
    word, value, scale = _split(text)
    if word not in WORDS:
        near = difflib.get_close_matches(word, WORDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no technique {word!r}; there are {', '.join(WORDS)}{hint}")
    if word in ("lora", "prompt", "caption") and not value:
        raise ValueError(f"{word} needs a value: {word}=...")
    if word == "prompt":
        return FineGrainedPrompt(value)
    if word == "caption":
        return FineGrainedPrompt("{caption}", captioner=value)
    if word == "denoise":
        return Denoise(by=int(_number(word, value or "10")))
    if word == "cfg":
        return CFG(_number(word, value or "7.5"))
    if word == "lora":
        return LoRA(value, scale=scale)
    if word == "image":
        return IPAdapter(value, scale) if value else known_image_prompt(fx, scale)
    return ControlNet(value, word, scale) if value else known_control(fx, word, scale)


def words_of(text: str) -> list[str]:
    """The words of ``word + word + ...``, each for ``from_words``.

    A text or a name may have " + " in it, so after one only what is a technique, or is written like one, begins a word:
    ``prompt=a cat + a dog + canny`` is the text "a cat + a dog", and ``canny``.
    """
    words: list[str] = []
    for piece in text.split(" + "):
        begins = piece.partition("=")[0].partition("@")[0]
        alike = ("=" in piece and begins.isidentifier()) or difflib.get_close_matches(begins, WORDS, n=1, cutoff=0.75)
        before, equals, _ = words[-1].partition("=") if words else ("", "", "")
        if equals and before not in ("denoise", "cfg") and not alike:
            words[-1] += f" + {piece}"
        else:
            words.append(piece)
    return words


def _split(text: str) -> tuple[str, str, float]:
    """Word, value and scale, which is 1 if there is none, of what ``from_words`` is given."""
    word, equals, value = text.partition("=")
    before, at, factor = (value if equals else word).rpartition("@")
    if word in ("prompt", "caption") or not at:
        return word, value, 1.0
    try:
        scale = float(factor)
    except ValueError:  # part of a file's name
        return word, value, 1.0
    return (word, before, scale) if equals else (before, "", scale)


def _number(what: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{what} must be a number, not {text!r}") from error


def known_control(fx: Any, condition: str, scale: float = 1.0) -> ControlNet:
    """The ControlNet that goes with a model.

    Args:
        fx: the extractor of the model.
        condition: ``"canny"`` or ``"depth"``.

    Raises:
        ValueError: none is known; the message says how to name one.
    """
    if fx.model_id == "embedded":
        folder = Path(embedded()).parent / condition
        if condition != "canny" or not folder.is_dir():
            raise ValueError(f"no {condition} ControlNet is shipped with the embedded model: name one, {condition}=...")
        return ControlNet(folder, EMBEDDED_CANNY, scale)
    model = fx.family.preset_model(unwrap(fx.denoiser), fx.model_id)
    if (model, condition) not in KNOWN:
        raise ValueError(f"no {condition} ControlNet is known for {fx.model_id or 'this model'}: {condition}=...")
    return ControlNet(KNOWN[model, condition], condition, scale)


def known_image_prompt(fx: Any, scale: float = 1.0) -> IPAdapter:
    """The IP-Adapter that goes with a model.

    Raises:
        ValueError: none is known; the message says how to name one.
    """
    model = fx.family.preset_model(unwrap(fx.denoiser), fx.model_id)
    if fx.model_id == "embedded" or model not in KNOWN_IMAGE_PROMPTS:
        raise ValueError(f"no IP-Adapter is known for {fx.model_id or 'this model'}: name one, image=...")
    return IPAdapter("h94/IP-Adapter", scale, KNOWN_IMAGE_PROMPTS[model])
