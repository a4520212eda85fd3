"""Block outputs of diffusion transformers without their massive activations.

A few channels of the residual stream are larger than all others by orders of magnitude, and drown what tells one place
of an image from another. DiTF ("Unleashing Diffusion Transformers for Visual Correspondence by Modulating Massive
Activations", arXiv 2505.18584) takes the feature x behind the model's own adaptive layer norm,

    y = (1 + γ(t, c)) · LN(x') + β(t, c),    x' = x with its massive channels set to zero (channel discard),

with mean and variance over the channels of each token, and γ, β (channels,) from the timestep and the prompt. Z-Image
and Lumina-Image 2 normalise by the root mean square and have no β. The y of a block output is here that of the block
that reads it, which is the input of that block's attention: it is captured, not computed a second time.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .activations import Activation
from .families import family_of
from .truncating import blocks_of

_OUTPUT = re.compile(r"vit-block(\d+)-out")


def is_block_output(activation: Activation) -> bool:
    """Whether it is the output of a transformer's block: ``vit-block…-out``."""
    return _OUTPUT.fullmatch(activation.id) is not None


def runs(
    denoiser: nn.Module,
    chosen: list[Activation],
    available: Sequence[Activation],
    loaded: Sequence[str],
    modulate: bool,
    discard: Sequence[int],
) -> tuple[list[Activation], list[Activation]]:
    """What one run of the denoiser captures together, and what takes a run each, inside ``discarded``.

    Raises:
        ValueError: ``modulate`` or ``discard`` make no sense here; the message says why.
    """
    if not modulate and not discard:
        return chosen, []
    _check(denoiser, chosen, modulate, discard)
    if not modulate:
        return chosen, []
    reads = {a.id: _as_read(a, available, loaded) for a in chosen if is_block_output(a)}
    if not discard:
        return [reads.get(a.id, a) for a in chosen], []
    return [a for a in chosen if a.id not in reads], list(reads.values())


def _check(denoiser: nn.Module, chosen: Sequence[Activation], modulate: bool, discard: Sequence[int]) -> None:
    """Raises ValueError where ``modulate`` or ``discard`` make no sense."""
    outputs = [a for a in chosen if is_block_output(a)]
    if not outputs:
        raise ValueError(
            "modulate and discard are for block outputs of transformers, such as 'vit-block0-out'; none is asked for"
        )
    if modulate and not getattr(family_of(denoiser), "ADAPTIVE_NORM", False):
        raise ValueError(
            f"modulate needs blocks that begin with an adaptive layer norm; {type(denoiser).__name__} has others"
        )
    fewest = min(a.channels for a in outputs)
    if wrong := [c for c in discard if not 0 <= c < fewest]:
        raise ValueError(f"there is no channel {wrong[0]} to discard: they are 0 to {fewest - 1}")


def _as_read(output: Activation, available: Sequence[Activation], loaded: Sequence[str]) -> Activation:
    """A block output behind the adaptive layer norm of the next block, under the id of the output.

    Raises:
        ValueError: no block reads it, or the one that does was not loaded.
    """
    match = _OUTPUT.fullmatch(output.id)
    assert match is not None
    following = f"vit-block{int(match[1]) + 1}"
    query = next((a for a in available if a.id in (f"{following}-q", f"{following}-self-q")), None)
    if query is None:
        raise ValueError(f"{output.id} is the last block's output: there is no next block to modulate it")
    if query.id not in loaded:
        raise ValueError(
            f"{output.id} is modulated by the block that reads it, which was not loaded: name {query.id} among the "
            "activations of from_pretrained too"
        )
    return replace(output, module=query.module, tap="input", layout=query.layout, joint=query.joint, index=0)


@contextmanager
def discarded(denoiser: nn.Module, read: Activation, channels: Sequence[int]) -> Iterator[None]:
    """While this lasts, the block that ``read`` is inside of sees zeros in some channels of its input."""
    path = next(path for path in blocks_of(denoiser) if read.module.startswith(f"{path}."))
    block = denoiser.get_submodule(path)
    name = next(iter(inspect.signature(block.forward).parameters))

    def zero(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (without(args[0], channels, -1), *args[1:]), kwargs
        return args, {**kwargs, name: without(kwargs[name], channels, -1)}

    handle = block.register_forward_pre_hook(zero, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def without(tensor: Tensor, channels: Sequence[int], dim: int) -> Tensor:
    """A copy with zeros in some of its channels."""
    return tensor.index_fill(dim, torch.tensor(channels, device=tensor.device), 0)
