"""How far a run of the model is, by the layers that it has passed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

from .stopping import before_layers

Step = Callable[[float, str], object]
"""What is told the share that is done, from 0 to 1, and what comes next."""
PAUSE = 0.3
"""Seconds between two tellings: each goes to the visitor's browser."""
_PASSED: ContextVar[Callable[[], object] | None] = ContextVar("passed", default=None)


def counted(model: nn.Module) -> None:
    """From now on, runs of the model inside ``told`` can be followed."""
    before_layers(model, _passed)


def _passed() -> None:
    one = _PASSED.get()
    if one is not None:
        one()


@contextmanager
def told(model: nn.Module, tell: Callable[[float], object]) -> Iterator[None]:
    """Inside, a run of a ``counted`` model in this thread tells the share of its layers behind it, from 0 to 1.

    It is a guess: of layers that run twice, or not at all, nothing is known before.
    """
    layers = sum(next(layer.children(), None) is None for layer in model.modules())
    done, last = 0, time.monotonic()

    def one() -> None:
        nonlocal done, last
        done += 1
        if time.monotonic() - last >= PAUSE:
            last = time.monotonic()
            tell(min(1.0, done / layers))

    token = _PASSED.set(one)
    try:
        yield
    finally:
        _PASSED.reset(token)
