"""What the page does while it runs, beside answering: it gives back memory and removes old files."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

TRIM = 5.0
"""Seconds between two returns of free memory."""


@contextmanager
def housekeeping(folder: Path, kept: int) -> Iterator[None]:
    """Until the block ends, return free memory, and remove the files that visitors cause once they are old.

    Gradio's own sweep is not used: the first upload that comes while it goes through its list ends it for good.

    Args:
        folder: what is in it now stays; what comes later is removed.
        kept: seconds after which it is.
    """
    stay = {path for path in folder.rglob("*") if path.is_file()}
    with ExitStack() as both:
        both.enter_context(_every(min(60.0, kept), lambda: remove_old(folder, kept, stay)))
        if trim := _trim():
            both.enter_context(_every(TRIM, trim))
        yield


def remove_old(folder: Path, seconds: float, stay: set[Path]) -> None:
    """Remove the files below ``folder`` that were last changed or copied so long ago, but for those that ``stay``."""
    limit = time.time() - seconds
    for path in {*folder.rglob("*")} - stay:
        with suppress(FileNotFoundError):
            if path.is_file() and path.lstat().st_ctime < limit:
                path.unlink()


def _trim() -> Callable[[], object] | None:
    """A function that gives free memory back to the system; none where the C library is not GNU's.

    That one keeps what its threads free, in pieces between what is still in use: a page that has answered some hundred
    requests then holds a few hundred MiB more than it uses.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return None if trim is None else lambda: trim(0)


@contextmanager
def _every(seconds: float, work: Callable[[], object]) -> Iterator[None]:
    """Do ``work`` in a thread of its own, again and again until the block ends."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            work()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
