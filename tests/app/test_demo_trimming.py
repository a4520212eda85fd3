"""Memory that was freed goes back to the system while the page runs."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading

import pytest

from segmentors.demo import trimming

FRAGMENTED = """
import sys, time, psutil
from segmentors.demo.trimming import trimming
held = [bytes(2000) for _ in range(100_000)]
kept = held[::50]  # so that the heap has no free end
del held
before = psutil.Process().memory_info().rss
with trimming():
    deadline = time.monotonic() + 30
    while psutil.Process().memory_info().rss > before - 100 * 2**20:
        if time.monotonic() > deadline:
            sys.exit("nothing was given back")
        time.sleep(0.2)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library frees by itself")
def test_what_is_free_is_given_back() -> None:
    subprocess.run([sys.executable, "-c", FRAGMENTED], check=True)


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trimming.sys, "platform", "win32")
    before = threading.active_count()
    with trimming.trimming():
        assert threading.active_count() == before
