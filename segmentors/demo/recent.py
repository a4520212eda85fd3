"""A small memory of what was computed last, shared by all visitors."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """The last few results by what they were computed from; safe in threads. Results must not be changed."""

    def __init__(self, most: int) -> None:
        """
        Args:
            most: results kept; the one not used for longest goes first.
        """
        self._most, self._lock = most, threading.Lock()
        self._kept: OrderedDict[Hashable, T] = OrderedDict()

    def __call__(self, key: Hashable, make: Callable[[], T]) -> tuple[T, bool]:
        """What ``make`` returned for this key, now or before, and whether it was before.

        Two threads that ask for the same new thing at once may both make it; holding a lock meanwhile would let one
        visitor wait for another.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key], True
        made = make()
        with self._lock:
            self._kept[key] = made
            self._kept.move_to_end(key)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return made, False
