"""Giving memory back: what one request has freed is not left in the process until another needs it.

The GNU C library keeps what its threads free, in pieces between what is still in use: a page that has answered some
hundred requests then holds a few hundred MiB more than it uses.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 5.0


@contextmanager
def trimming() -> Iterator[None]:
    """Return free memory to the system every few seconds until the block ends; does nothing on other C libraries."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        yield
        return
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(SECONDS):
            trim(0)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
