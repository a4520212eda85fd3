"""One module a family of denoisers; a new family is one new file here.

A family module offers:

    DENOISERS: tuple[str, ...]
        class names of the denoisers it knows
    BLOCKS: tuple[str, ...]
        the denoiser's lists of blocks, in forward order; left out where what runs last is needed first, as in a UNet,
        and the denoiser is then loaded whole
    ADAPTIVE_NORM: bool
        True if what a block's attention reads is the block before, behind a norm that the timestep scales; may be left
        out
    list_activations(denoiser) -> list[Activation]
        all there is to capture, in forward order
    layout(module, args, kwargs) -> Layout
        where tokens stand, read from the call of the module an ``Activation.layout`` names
    preset_model(denoiser, name) -> str | None
        which file of ``configs/activations`` is about this model
    pixels_per_cell(pipe) -> int, pixels_per_latent(pipe) -> int, multiple(pipe) -> int
        image pixels along a side of a denoiser cell, and of a cell of the latents that ``encode_images`` makes; what
        image sides must be multiples of
    text_tokens(pipe) -> int
        how many tokens of text image tokens attend to; 0 where that depends on the prompt
    encode_prompts(pipe, prompts) -> list[Conditions]
        one entry a prompt, tensors without a batch axis
    encode_images(pipe, images, draw) -> Tensor
        (B, 3, H, W) in [-1, 1] → clean latents (B, c, h, w)
    decode_latents(pipe, latents) -> Tensor
        and back
    denoise(pipe, latents, t, conditions, size) -> Tensor
        one call of the denoiser, conditioned on the integer ``t``
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn

from ..activations import Activation


@cache
def _families() -> list[ModuleType]:
    return [import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__) if m.name[0] != "_"]


def unwrap(denoiser: nn.Module) -> nn.Module:
    """The denoiser itself, out of torch.compile, (Distributed)DataParallel and PEFT wrappers."""
    inner: Any = denoiser
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = inner.module
        else:
            return inner


def family_of(denoiser: nn.Module) -> ModuleType:
    """The family module of a denoiser, wrapped or not.

    Raises:
        TypeError: nobody wrote a family for this class; the message lists the known ones.
    """
    name = type(unwrap(denoiser)).__name__
    for family in _families():
        if name in family.DENOISERS:
            return family
    raise TypeError(refusal(name))


def denoiser_classes() -> list[str]:
    """Names of the denoiser classes that have a family."""
    return sorted(name for family in _families() for name in family.DENOISERS)


def refusal(name: str) -> str:
    """What to say of a denoiser class that has no family."""
    return (
        f"{name} is not a denoiser this library knows; known are {', '.join(denoiser_classes())}. What its modules "
        "return can still be captured: give capture the denoiser, and dotted paths of its modules as the activations"
    )


def list_activations(denoiser: nn.Module) -> list[Activation]:
    """Everything that can be captured in a denoiser, in forward order, read from its module tree.

    Args:
        denoiser: a diffusers denoiser, possibly compiled, distributed or wrapped by PEFT.

    Raises:
        TypeError: the class of the denoiser is not known.
    """
    inner = unwrap(denoiser)
    return family_of(inner).list_activations(inner)


def offered(denoiser: nn.Module) -> list[Activation]:
    """What ``capture`` takes: ``list_activations``; or, of a denoiser that has no family, the output of every module,
    as it is, under the module's dotted path. How many channels that has shows when the denoiser runs: it says 0."""
    if type(denoiser).__name__ in denoiser_classes():
        return list_activations(denoiser)
    return [Activation(path, "module", path, "output", 0, None) for path, _ in denoiser.named_modules() if path]
