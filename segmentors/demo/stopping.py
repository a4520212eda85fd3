"""Runs that end when their visitor cancels them, and not when they would have ended anyway.

A thread cannot be ended from outside. So the model looks, before each of its layers, whether the run that it is in is
still wanted.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextlib import suppress
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")

_UNWANTED: ContextVar[threading.Event | None] = ContextVar("unwanted", default=None)


class Stopped(Exception):
    """The run is not wanted any more."""


def check() -> None:
    """Go on.

    Raises:
        Stopped: the run that this is called in was cancelled.
    """
    unwanted = _UNWANTED.get()
    if unwanted is not None and unwanted.is_set():
        raise Stopped


def stoppable(model: nn.Module) -> None:
    """From now on, a cancelled run of the model ends before its next layer."""
    before_layers(model, check)


def before_layers(model: nn.Module, call: Callable[[], object]) -> None:
    """From now on, ``call`` is called before each layer that has no layers inside."""

    def hook(layer: nn.Module, inputs: object) -> None:
        call()

    for layer in model.modules():
        if next(layer.children(), None) is None:
            layer.register_forward_pre_hook(hook)


def in_thread(function: Callable[..., T], thread: Executor) -> Callable[..., Coroutine[Any, Any, T]]:
    """The function as a coroutine that runs it in a thread.

    Cancelled, it ends at once if the function has not begun, otherwise as soon as it has stopped.
    """

    @functools.wraps(function)
    async def run(*args: Any, **kwargs: Any) -> T:
        unwanted = threading.Event()
        _UNWANTED.set(unwanted)
        begun = thread.submit(copy_context().run, functools.partial(function, *args, **kwargs))
        ended = asyncio.wrap_future(begun)
        try:
            return await asyncio.shield(ended)
        except asyncio.CancelledError:
            unwanted.set()
            if not begun.cancel():
                with suppress(Exception):  # nobody is there to be told
                    await ended
            raise

    return run
