"""LoRAs: small changes of the weights, learnt from a few images of the domain, for the duration of a call."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..loading import LoadError
from .adapters import adapter, changes_text, held, switched_on
from .technique import Call, Technique
from .weights import find_weights

DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight", ".lora_A.default.weight")


@dataclass
class LoRA(Technique):
    """A LoRA trained on images of the domain (arXiv 2106.09685; for features arXiv 2410.06719).

    >>> fx(photo, suppress=[LoRA("horses.safetensors"), LoRA("overfitted.safetensors", scale=0.5)])

    It is loaded through diffusers and peft when a call begins and unloaded when it ends, never fused: the weights of
    the model are not touched, and adapters that it has already stay as they are. Several in one call add up. ``loaded``
    keeps it in the model from call to call.

    Args:
        source: a ``.safetensors`` file, in the format of diffusers, peft or kohya; a folder with one; or a hub id.
        scale: multiplies the change; 0 gives the features of the model alone.
        weight_name: which file of a folder or hub repository, if it has several.
        pickle: allow a file that is no safetensors; opening a pickle can run any code hidden in it.
    """

    source: str | os.PathLike[str]
    scale: float = 1.0
    weight_name: str | None = None
    pickle: bool = False
    _file: Path | None = field(default=None, init=False, repr=False, compare=False)

    @contextmanager
    def applied(self, fx: Any, call: Call) -> Iterator[None]:
        """The model with this LoRA. Prompts are encoded anew inside if it changes a text encoder.

        Raises:
            LoadError: the file is missing, damaged, or a pickle that is not allowed.
            ValueError: it was made for another model, or the model takes none, or its text encoder was released, or the
                caller has fused adapters into its weights.
        """
        file, layers = self._fitting(fx)
        with ExitStack() as stack:
            name = stack.enter_context(adapter(fx, file, layers, self.pickle))
            stack.enter_context(switched_on(fx.pipe, name, self.scale))
            if changes_text(fx, name):
                stack.enter_context(_forgotten_prompts(fx))
            yield

    def loaded(self, fx: Any) -> AbstractContextManager[None]:
        """The LoRA stays in the model inside, switched off: whichever call names the file switches it on.

        Raises:
            LoadError, ValueError: as ``applied``.
        """
        file, layers = self._fitting(fx)
        return held(fx, file, layers, self.pickle)

    def _fitting(self, fx: Any) -> tuple[Path, list[str]]:
        """The file, and the layers that it changes."""
        if not hasattr(fx.pipe, "load_lora_weights"):
            raise ValueError(f"diffusers loads no LoRA into a {type(fx.pipe).__name__}")
        if self._file is None:
            self._file = find_weights(self.source, self.weight_name, self.pickle)
        layers = _layers(self._file)
        if fx._released and any(name.startswith(("text_encoder", "lora_te")) for name in layers):
            raise ValueError(f"{self._file} changes the text encoder, which was released: load without prompts=")
        return self._file, layers


def _layers(path: Path) -> list[str]:
    """The layers that a LoRA file changes, by the names of their down-projections; of a pickle, none are known.

    Raises:
        LoadError: it is damaged, or no LoRA.
    """
    if path.suffix != ".safetensors":
        return []
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise LoadError(f"{path} is no safetensors file, or is damaged ({error}).") from error
    found = sorted(name for name in names if name.endswith(DOWN))
    if not found:
        raise LoadError(f"{path} is no LoRA: its weights are named {', '.join(names[:3])} ...")
    return found


@contextmanager
def _forgotten_prompts(fx: Any) -> Iterator[None]:
    """Prompts are encoded anew inside, by the text encoder as it is there, and nothing of that is kept."""
    before = fx._prompts, fx._recent
    fx._prompts, fx._recent = {}, {}
    try:
        yield
    finally:
        fx._prompts, fx._recent = before
