"""How many scenes a second the drawn world renders, in one process and in as many as there are cores.

python benchmarks/world.py [--scenes N] [--size PIXELS] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

from measure import machine, spread, table

from diffusion_features.embedded import render

WARM, TURNS = 16, 5


def drawn(size: int, seed: int) -> None:
    render(seed, size)


def rates(processes: int, scenes: int, size: int) -> dict[str, float]:
    """Scenes a second of a pool that has started: median, lowest and highest of several turns."""
    found = []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(partial(drawn, size), range(WARM * processes))
        for turn in range(TURNS):
            began = time.perf_counter()
            pool.map(partial(drawn, size), range(turn * scenes, (turn + 1) * scenes), chunksize=16)
            found.append(scenes / (time.perf_counter() - began))
    return spread(found)


def main() -> None:
    """Print a table and, asked to, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=400, help="a turn (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="of a side, in pixels (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    found = {count: rates(count, options.scenes, options.size) for count in sorted({1, os.cpu_count() or 1})}
    rows = [[str(count), *(f"{one[key]:.0f}" for key in ("median", "min", "max"))] for count, one in found.items()]
    print(table(["processes", "scenes a second", "lowest", "highest"], rows))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "scenes a second": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
