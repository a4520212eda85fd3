"""What every benchmark needs: time, peak memory, interleaved ratios, a table, and what it all ran on."""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch

EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""glibc then maps every buffer from 64 KiB on by itself and unmaps it when freed, so that resident memory is what is
in use: peaks repeat to about 1 MiB. With its defaults the same forward differed by over 100 MiB from run to run."""


class Cost(NamedTuple):
    """Seconds on the clock, and seconds of all cores together, which other programs on the machine disturb less."""

    wall: float
    cpu: float


def cost(run: Callable[[], object]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def pair(first: Callable[[], object], second: Callable[[], object], swap: bool) -> tuple[Cost, Cost]:
    """Costs of two runs, one right after the other; ``swap`` starts with the second."""
    if swap:
        b, a = cost(second), cost(first)
        return a, b
    return cost(first), cost(second)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    found = list(values)
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def peak_mib(run: Callable[[], object]) -> float:
    """Highest resident memory of this process while ``run`` runs, in MiB (Linux: VmHWM, reset through clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
    kept = run()  # alive until the peak has been read
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    del kept
    return int(found[1]) / 1024


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in a new interpreter whose memory can be measured (EXACT_MALLOC)."""
    before = dict(os.environ)
    os.environ.update(EXACT_MALLOC)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(function, args)
    finally:
        for name in EXACT_MALLOC:
            os.environ.pop(name)
        os.environ.update(before)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; numbers stand right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> dict[str, str | int]:
    return {
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
