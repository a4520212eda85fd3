"""What the options of a ``DiffusionBackbone`` may be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from diffusion_features.suppression import CFG, FineGrainedPrompt

from .techniques import TechniqueSets


def plain(value: Any) -> Any:
    """An option as JSON gives it back.

    Raises:
        TypeError: it holds something that no file could.
    """
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise TypeError(f"options of a config are names, numbers, lists and dicts of these: {error}") from error


def pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else size


def tuning(tune: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """ "frozen", "lora" or "full", and the settings of LoRA.

    Raises:
        ValueError: it is none of these.
    """
    settings = {"type": tune} if isinstance(tune, str) else dict(tune)
    mode = settings.pop("type", None)
    if mode not in ("frozen", "lora", "full") or (settings and mode != "lora"):
        raise ValueError(
            f'tune must be "frozen", "full" or dict(type="lora", r=..., alpha=..., targets=...), not {tune!r}'
        )
    return mode, settings


def variants(amalgamate: Mapping[str, Any]) -> Sequence[Sequence[Mapping[str, Any]]]:
    """The sets of techniques to amalgamate.

    Raises:
        ValueError: there are fewer than two.
    """
    found = amalgamate.get("variants", ())
    if len(found) < 2:
        raise ValueError(
            "amalgamate=dict(variants=[[...], [...]]) needs two or more lists of techniques, one of which may be "
            f"empty; there are {len(found)}. For one there is suppress=[...]"
        )
    return found


def check(
    learns: bool, learn_prompt: bool, prompt_key: str | None, cache: Any, dtype: str | None, techniques: TechniqueSets
) -> None:
    """Raises ValueError for options that exclude each other."""
    if learn_prompt and prompt_key is not None:
        raise ValueError("learn_prompt learns one embedding for all images: it does not go with prompt_key")
    if learn_prompt and techniques.has(FineGrainedPrompt):
        raise ValueError("learn_prompt learns what the model is told: it does not go with FineGrainedPrompt")
    if learn_prompt and techniques.has(CFG):
        raise ValueError(
            "learn_prompt gives every call of the model one embedding, the call without a prompt too: it does not go "
            "with CFG, which strengthens the difference between the two and would do nothing; leave one of them out"
        )
    if learns and cache is not None:
        raise ValueError("features of a model that learns change at every step: they cannot be cached")
    if learns and dtype not in (None, "float32"):
        raise ValueError(f"what learns is float32, not {dtype}; use AMP for speed")
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise ValueError(f'dtype must be "float32", "float16" or "bfloat16", not {dtype!r}')


def dtype(name: str | None, learns: bool) -> torch.dtype:
    """The denoiser's dtype."""
    if name is not None:
        return cast(torch.dtype, getattr(torch, name))
    return torch.float16 if torch.cuda.is_available() and not learns else torch.float32
