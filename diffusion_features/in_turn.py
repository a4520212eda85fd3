"""Loading one thing at a time: diffusers and transformers build models on the meta device through process-wide patches.

Two threads that load at once leave each other's weights there, "Cannot copy out of meta tensor".
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")
_LOCK = threading.RLock()


def in_turn(load: Callable[Given, Result]) -> Callable[Given, Result]:
    """``load``, which waits until no other thread is in a function of this kind."""

    @wraps(load)
    def alone(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with _LOCK:
            return load(*args, **kwargs)

    return alone
