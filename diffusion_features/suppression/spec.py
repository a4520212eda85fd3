"""Techniques from what a configuration file or a command line can say."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from .control import ControlNet
from .image_prompt import IPAdapter
from .lora import LoRA
from .prompt import FineGrainedPrompt
from .steps import CFG, Denoise
from .technique import Technique

Spec: TypeAlias = "Technique | Mapping[str, Any]"
TYPES: dict[str, type[Technique]] = {
    t.__name__: t for t in (ControlNet, LoRA, IPAdapter, FineGrainedPrompt, Denoise, CFG)
}


def as_techniques(specs: Spec | Sequence[Spec]) -> list[Technique]:
    """Techniques, from one or several of what ``as_technique`` takes. Raises as that does."""
    several = list(specs) if isinstance(specs, Sequence) and not isinstance(specs, str) else [specs]
    return [as_technique(spec) for spec in several]


def as_technique(spec: Spec) -> Technique:
    """A technique, from itself or from a configuration.

    >>> as_technique({"type": "LoRA", "source": "horses.safetensors", "scale": 0.5})

    Args:
        spec: a technique; or a mapping of ``type``, the name of its class, and its arguments, as configurations of
            mmengine have it.

    Raises:
        TypeError: something else, or arguments that the class does not take.
        ValueError: no such class.
    """
    if isinstance(spec, Technique):
        return spec
    if not isinstance(spec, Mapping) or "type" not in spec:
        raise TypeError(f"suppress takes techniques such as ControlNet or LoRA, or their configurations, not {spec!r}")
    kind = spec["type"]
    if kind not in TYPES:
        near = difflib.get_close_matches(str(kind), TYPES, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no technique {kind!r}; there are {', '.join(TYPES)}{hint}")
    return TYPES[kind](**{name: value for name, value in spec.items() if name != "type"})
