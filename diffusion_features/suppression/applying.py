"""How several techniques act on one call of an extractor, in whichever order they are given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..families import unwrap
from .spec import Spec, as_techniques
from .technique import Call


def asked(specs: Spec | Sequence[Spec], call: Call) -> Call:
    """The call with techniques, in whichever order they are given.

    Args:
        specs: techniques, or what ``as_technique`` makes them of.

    Raises:
        TypeError, ValueError: something that is no technique; two that contradict each other; one that would do
            nothing here.
    """
    found = tuple(as_techniques(specs))
    for kind in {type(t) for t in found if t.alone}:
        if sum(type(t) is kind for t in found) > 1:
            raise ValueError(f"a call takes one {kind.__name__}; several would contradict each other")
    for one in found:
        call = one.asks(call)
    if call.guidance != 1 and call.denoise_from is None:
        raise ValueError(
            "guidance changes the steps between two timesteps, and this call takes none: its features come from one "
            "conditional call of the denoiser. Add Denoise, or give denoise_from"
        )
    return replace(call, techniques=found)


@contextmanager
def applied(fx: Any, call: Call) -> Iterator[None]:
    """The model of an extractor under the techniques of a call, while inside; as it was before, whatever happens.

    Args:
        fx: a ``FeatureExtractor``; its lock is held inside.
        call: what ``asked`` returned.
    """
    with ExitStack() as stack:
        if call.techniques:
            stack.enter_context(fx._lock)
            if _compiled(fx.denoiser):  # hooks and layers added after compiling would be passed by
                stack.enter_context(torch.compiler.set_stance("force_eager"))
        for one in call.techniques:
            stack.enter_context(one.applied(fx, call))
        yield


@contextmanager
def loaded(fx: Any, specs: Spec | Sequence[Spec]) -> Iterator[None]:
    """What techniques load into the model of an extractor stays there from call to call, while inside.

    >>> horses = LoRA("horses.safetensors")
    >>> with loaded(fx, horses):
    ...     for photo in photos:
    ...         fx(photo, suppress=horses)

    It saves time and changes nothing else: calls that name a technique give what they give outside, calls that do not
    name it know nothing of it, and at the end the model is as it was at the beginning, bit for bit. What else is loaded
    into the same parts of the pipeline inside is taken away too. Any thread may call; contexts of one model may end in
    any order, and the last one to end clears up.

    Args:
        fx: a ``FeatureExtractor``.
        specs: techniques, or configurations of them.

    Raises:
        LoadError, ValueError: one of them cannot be loaded, or not into this model.
    """
    with ExitStack() as stack:
        for one in as_techniques(specs):
            stack.enter_context(one.loaded(fx))
        yield


def _compiled(denoiser: torch.nn.Module) -> bool:
    return denoiser is not unwrap(denoiser) or any(
        "_orig_mod" in m._modules or m._compiled_call_impl is not None for m in denoiser.modules()
    )
