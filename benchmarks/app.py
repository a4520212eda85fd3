"""What the demo's page adds to a bare call of the segmentor.

    python benchmarks/app.py [--scenes N] [--json FILE]

The page is served by a process of its own with the embedded model, and asked as a browser asks it, over one connection.
A request and the same call of ``TrainingFreeSegmentor`` are timed one right after the other, in alternating order, on
scenes not seen before. The request also uploads the picture, computes the plain segmentation to compare with, draws and
encodes all results, and fetches the pictures that a browser shows at once. The ratios are of seconds on the clock, and
of seconds of all cores together, the asking side left out, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
from measure import Cost, cost, machine, spread, table

from diffusion_features import FeatureExtractor
from diffusion_features.embedded import TEST_SEED, render
from segmentors import TrainingFreeSegmentor


def measured(count: int, folder: Path) -> dict[str, Any]:
    """Seconds of requests and calls, each name → median, lowest and highest; and the median of their ratios."""
    began = time.perf_counter()
    segment = TrainingFreeSegmentor(FeatureExtractor.from_pretrained("embedded"))
    loading = time.perf_counter() - began
    with served() as (address, server), httpx.Client(base_url=address, timeout=120) as browser:
        page = cost(lambda: browser.get("/").raise_for_status())
        segmented = asking(browser, "segment")
        request, again, call = [], [], []
        for number in range(count + 1):
            scene = render(TEST_SEED + number)
            file = folder / f"{number}.png"
            scene.image.save(file)
            words, told = [*scene.classes], ", ".join(scene.classes)
            ask = partial(segmented, file, caption=told)
            bare = partial(segment, scene.image, words, caption=told)
            before = cost(bare) if number % 2 else None
            asked = cost_of(server, partial(ask, classes=words))
            called = before or cost(bare)
            changed = cost_of(server, partial(ask, classes=words[1:]))
            if number == 0:
                first = asked.wall
                continue
            request.append(asked)
            call.append(called)
            again.append(changed)
    pairs = [*zip(request, call, strict=True)]
    return {
        "loading the model, s": loading,
        "first page, s": page.wall,
        "first request, s": first,
        "a request, s": spread(one.wall for one in request),
        "other classes, all of them in the caption, s": spread(one.wall for one in again),
        "a bare call, s": spread(one.wall for one in call),
        "the request over the call, s": spread(a.wall - b.wall for a, b in pairs),
        "request / bare call": spread(a.wall / b.wall for a, b in pairs),
        "request / bare call, of all cores": spread(a.cpu / b.cpu for a, b in pairs),
        "scenes": count,
    }


def asking(browser: httpx.Client, name: str) -> Callable[..., None]:
    """A function that asks an event of the page as a browser does: upload, join the queue, listen, fetch pictures."""
    (number,) = [one["id"] for one in browser.get("/config").json()["dependencies"] if one["api_name"] == name]
    told = browser.get("/gradio_api/info").json()["named_endpoints"][f"/{name}"]["parameters"]
    usual = {one["parameter_name"]: one.get("parameter_default") for one in told}
    session = {"session_hash": uuid.uuid4().hex}

    def ask(picture: Path, **given: Any) -> None:
        with picture.open("rb") as file:
            (uploaded,) = browser.post("/gradio_api/upload", files={"files": file}).json()
        sent = {"path": uploaded, "meta": {"_type": "gradio.FileData"}}
        asked = {"data": [*{**usual, "picture": sent, **given}.values()], "fn_index": number, **session}
        browser.post("/gradio_api/queue/join", json=asked).raise_for_status()
        with browser.stream("GET", "/gradio_api/queue/data", params=session) as said:
            messages = [json.loads(line[5:]) for line in said.iter_lines() if line.startswith("data:")]
        (completed,) = [one for one in messages if one["msg"] == "process_completed"]
        if not completed["success"]:
            raise RuntimeError(f"the page said: {completed['output'].get('error')}")
        output = completed["output"]["data"]
        shown = [*urls([output[0], output[2]])]
        assert len(shown) > 3, "the picture, a mask, before and after"
        for url in shown:
            browser.get(url).raise_for_status()

    return ask


@contextmanager
def served() -> Iterator[tuple[str, psutil.Process]]:
    """The page's address, and the process that serves it."""
    command = [sys.executable, "-m", "diffusion_features", "app"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
            yield address, psutil.Process(process.pid)
        finally:
            process.terminate()


def cost_of(process: psutil.Process, run: Callable[[], object]) -> Cost:
    """Seconds on the clock until ``run`` is over, and those that ``process`` spends meanwhile."""
    before = process.cpu_times()
    found, after = cost(run), process.cpu_times()
    return Cost(found.wall, after.user + after.system - before.user - before.system)


def urls(answer: Any) -> Iterator[str]:
    """Addresses of all files in an answer, at whatever depth."""
    if isinstance(answer, dict) and isinstance(answer.get("url"), str):
        yield answer["url"]
    elif isinstance(answer, (dict, list, tuple)):
        for one in answer.values() if isinstance(answer, dict) else answer:
            yield from urls(one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(args.scenes, Path(folder))
    rows = [
        [name, *(f"{value[key]:.2f}" for key in ("median", "min", "max"))]
        if isinstance(value, dict)
        else [name, f"{value:.2f}" if isinstance(value, float) else str(value), "", ""]
        for name, value in found.items()
    ]
    print(table(["", "median", "lowest", "highest"], rows))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "figures": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
