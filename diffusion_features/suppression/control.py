"""ControlNets: a second network that sees the image without noise, as edges or depth, and steers the denoiser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ..families import unwrap
from ..in_turn import in_turn
from ..loading import PICKLES, LoadError, resolve
from .conditions import NAMED, Condition, checked, precomputed
from .control_models import KINDS, Kind, call_control
from .once import once
from .technique import Call, Technique

SAME = (
    "in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "cross_attention_dim_t5",
    "addition_embed_type", "joint_attention_dim", "pooled_projection_dim", "caption_channels", "patch_size",
)  # fmt: skip
"""Settings that a ControlNet shares with the denoiser it was made for, where both have them."""


@dataclass
class ControlNet(Technique):
    """A ControlNet whose condition is the image itself (arXiv 2302.05543; for features arXiv 2410.06719).

    >>> fx(photo, suppress=[ControlNet("lllyasviel/sd-controlnet-canny")])
    >>> fx(photo, suppress=[ControlNet("lllyasviel/sd-controlnet-depth", condition="depth", scale=0.5)])

    Several in one call add their residuals. UNets (Stable Diffusion, SDXL), SD3, HunyuanDiT, Flux.1, Sana and
    Qwen-Image have ControlNets in diffusers; other models say that they have none.

    Args:
        model: a ControlNet of diffusers, or what to load one from: a folder, a ``.safetensors`` file, or a hub id.
        condition: ``"canny"`` or ``"depth"``; a function from images (B, 3, H, W) in [-1, 1] to conditions
            (B, 3, H, W) in [0, 1]; or the conditions themselves, as PIL images or such a tensor.
        scale: what the residuals are multiplied by; 0 gives the features of the model alone.
        pickle: allow weights that are no safetensors; opening a pickle can run any code hidden in it.
    """

    model: str | os.PathLike[str] | nn.Module
    condition: Any = "canny"
    scale: float = 1.0
    pickle: bool = False
    _loaded: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.condition, str) and self.condition not in NAMED:
            names = " and ".join(map(repr, NAMED))
            raise ValueError(f"there is no condition {self.condition!r}; there are {names}, functions and images")

    @contextmanager
    def applied(self, fx: Any, call: Call) -> Iterator[None]:
        """The denoiser with this ControlNet's residuals, in every call that is made of it.

        Raises:
            ValueError: the model has no ControlNets, or this one is of another model; a condition that does not fit.
            LoadError: the ControlNet cannot be loaded.
        """
        denoiser = unwrap(fx.denoiser)
        kind = kind_of(denoiser)
        control = self._fitting(denoiser, kind, fx.device)

        def encoded() -> Tensor:
            with torch.no_grad():
                return kind.encode(fx, control, self._conditions(call.pixels.to(fx.device)))

        made = isinstance(self.condition, str) or callable(self.condition)
        condition = once(call.pixels, ("control", control, self.condition), encoded) if made else encoded()

        def steer(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            with torch.no_grad():
                given = condition.to(dtype=control.dtype)
                return args, call_control(kind, module, control, given, self.scale, args, kwargs)

        handle = denoiser.register_forward_pre_hook(steer, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _conditions(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] of images in [-1, 1]."""
        size = (pixels.shape[-2], pixels.shape[-1])
        if isinstance(self.condition, str) or callable(self.condition):
            make: Condition = NAMED[self.condition] if isinstance(self.condition, str) else self.condition
            return checked(make(pixels), len(pixels), size)
        return precomputed(self.condition, len(pixels), size).to(pixels)

    def _fitting(self, denoiser: nn.Module, kind: Kind, device: torch.device) -> Any:
        """The ControlNet: the caller's as it is; one that is loaded here, once, in the denoiser's dtype and place.

        Raises:
            ValueError: it was made for another model.
        """
        if isinstance(self.model, nn.Module):
            refuse_other(self.model, denoiser, kind)
            return self.model
        if self._loaded is None:
            self._loaded = load_control(self.model, kind, denoiser.dtype, self.pickle)  # type: ignore[arg-type]
        refuse_other(self._loaded, denoiser, kind)
        return self._loaded.to(device)


def kind_of(denoiser: nn.Module) -> Kind:
    """How ControlNets of a denoiser are called.

    Raises:
        ValueError: there are none for its class.
    """
    name = type(denoiser).__name__
    if name not in KINDS:
        raise ValueError(f"diffusers has no ControlNet for {name}; it has some for {', '.join(KINDS)}")
    return KINDS[name]


def refuse_other(control: Any, denoiser: Any, kind: Kind) -> None:
    """Raises ValueError unless a ControlNet was made for such a denoiser, told by its class and its settings."""
    if kind.control not in {base.__name__ for base in type(control).__mro__}:
        raise ValueError(f"{type(denoiser).__name__} takes a {kind.control}, not a {type(control).__name__}")
    ours, theirs = denoiser.config, control.config
    for name in SAME:
        own, other = ours.get(name), theirs.get(name)
        if own is not None and other is not None and _plain(own) != _plain(other):
            raise ValueError(
                f"this ControlNet was made for another base model: its {name} is {other}, this model's is {own}"
            )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


@in_turn
def load_control(model: str | os.PathLike[str], kind: Kind, dtype: torch.dtype, pickle: bool) -> Any:
    """A ControlNet from a folder, a ``.safetensors`` file or a hub id, frozen and in eval mode.

    Raises:
        LoadError: there is none, it is of another class, or its weights are pickles and these are not allowed.
    """
    source = resolve(model)
    cls: Any = getattr(diffusers, kind.control)
    try:
        if isinstance(source, Path) and source.is_file():
            control = _from_file(cls, source, dtype)
        else:
            control = _from_folder(cls, source, dtype, pickle)
    except LoadError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise LoadError(f"{source} cannot be loaded as a {kind.control}: {' '.join(str(error).split())}") from error
    return control.requires_grad_(False).eval()


def _from_file(cls: Any, source: Path, dtype: torch.dtype) -> Any:
    if not hasattr(cls, "from_single_file"):
        raise LoadError(f"{cls.__name__} is not loaded from a single file: give a folder or a hub id.")
    return cls.from_single_file(str(source), torch_dtype=dtype)


def _from_folder(cls: Any, source: Path | str, dtype: torch.dtype, pickle: bool) -> Any:
    if isinstance(source, Path) and not (source / "config.json").is_file():
        raise LoadError(f"{source} is no ControlNet in diffusers format: it has no config.json.")
    found = cls.load_config(str(source)).get("_class_name")
    if found != cls.__name__:
        raise LoadError(f"{source} is a {found}; this model takes a {cls.__name__}.")
    pickles = [p.name for p in source.iterdir() if p.suffix in PICKLES] if isinstance(source, Path) else []
    if pickles and not pickle and not [*Path(source).glob("*.safetensors")]:
        raise LoadError(
            f"{source} has its weights only as a pickle ({pickles[0]}), and opening one can run any code hidden in it. "
            "Use safetensors, or pass pickle=True if you trust its author."
        )
    return cls.from_pretrained(str(source), torch_dtype=dtype, use_safetensors=None if pickle else True)
