"""Remakes the figures of docs/reproduction.md: every claim of the papers that the embedded model can be asked about.

``python benchmarks/reproduce.py`` runs the benchmarks below, each into ``benchmarks/results/NAME.json``, and writes the
page from these files and from ``benchmarks/reproduction.md``, which has the claims, the published numbers and the
commands for real weights. What is there already, of the same command and the same weights, is not run again: killed,
it goes on. ``--page`` writes the page alone, and names run only these.

In the template stand

- ``{{NAME: path}}``: a figure; the path leads through the JSON of the benchmark, its keys separated by ``/``;
- ``{{NAME: path > other path}}``: in how many seeds the first figure is higher, as a verdict;
- ``{{NAME: path > 0}}``: a verdict by the 95% interval of the figure.

A figure without a file is shown as "not measured".
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from figures import digest, save, shown

from diffusion_features.embedded import path as embedded

HERE = Path(__file__).resolve().parent
RESULTS, TEMPLATE, PAGE = HERE / "results", HERE / "reproduction.md", HERE.parent / "docs" / "reproduction.md"
SINGLE = (
    "up-level1-repeat1-vit-block0-cross-q up-level1-repeat2-res-out up-level2-repeat1-vit-block0-cross-q "
    "up-level2-upsampler-out up-level3-repeat0-vit-block0-self-q up-level3-repeat0-vit-block0-self-k"
)
RUNS = {
    "presets": "presets.py --seeds 3",
    "correspondence": "correspondence.py --seeds 3 --head 400 --width 64",
    "single": f"parts.py --seeds 3 --steps 2000 --presets {SINGLE}",
    "atlas": "atlas.py --split test --seeds 3",
    "suppression": "suppression.py --train 32 --scenes 32 --timesteps 50 200 600 --seeds 0 1000 "
    "--records outputs/suppression.pt",
    "segment": "segment.py --split test held-out --t 100",
    "transformer": "segment.py --model embedded-dit --split test held-out --t 100",
    "transformer_small": "segment.py --model embedded-dit-small --split test held-out --t 100",
}
MODELS = {"transformer": "embedded-dit", "transformer_small": "embedded-dit-small"}
ADAPTERS = {"suppression": ("canny", "lora")}
NONE = "not measured"
PLACE = re.compile(r"\{\{(\w+): (.+?)\}\}")


def weights(name: str) -> str:
    """Digest of the weights that the figures of a benchmark depend on: the model's, and its adapters' where used."""
    model = embedded(MODELS.get(name, "embedded"))
    return digest([model, *(model.parent / part for part in ADAPTERS.get(name, ()))])


def measured(name: str, of: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The result of a benchmark with these weights; nothing if it was not run as it is now."""
    file = folder / f"{name}.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    result: dict[str, Any] = found["result"]
    return result if (found["command"], found["weights"]) == (RUNS[name], of) else None


def run(name: str, of: str, folder: Path = RESULTS) -> bool:
    """Run a benchmark and keep its result; false if it failed."""
    script, *options = shlex.split(RUNS[name])
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "result.json"
        if subprocess.run([sys.executable, HERE / script, *options, "--json", file], check=False).returncode:
            return False
        result = json.loads(file.read_text(encoding="utf-8"))
    save(folder / f"{name}.json", {"command": RUNS[name], "weights": of, "result": result})
    return True


def page(template: str, results: Mapping[str, Any]) -> str:
    """The template with every place filled.

    Args:
        results: benchmark -> its result, or nothing.

    Raises:
        KeyError: a place names no benchmark, or what its result does not have.
    """
    return PLACE.sub(lambda place: _filled(results[place[1]], place[2].strip()), template)


def _filled(result: dict[str, Any] | None, wanted: str) -> str:
    if result is None:
        return NONE
    first, _, second = (part.strip() for part in wanted.partition(" > "))
    if not second:
        return _figure(_at(result, first))
    return _by_interval(_at(result, first)) if second == "0" else _by_seeds(_at(result, first), _at(result, second))


def _at(result: Any, path: str) -> Any:
    for key in path.split("/"):
        if key not in result:
            raise KeyError(f"there is no {key!r} of {path!r} in the result, but {', '.join(map(str, result))}")
        result = result[key]
    return result


def _figure(found: Any) -> str:
    if not isinstance(found, dict):
        return f"{found:.3f}" if isinstance(found, float) else str(found)
    if "each" in found and set(found["each"]) <= {0.0, 1.0}:
        return f"{sum(found['each']):g} of {len(found['each'])} seeds"
    if "each" in found:
        whole = found["spread"] == 0 and found["mean"] % 1 == 0
        return f"{found['mean']:g}" if whole else shown(found)
    value = next(found[key] for key in ("difference", "rho", "mean", "miou") if key in found)
    low, high = found["interval"] if "interval" in found else found["miou_interval"]
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _by_interval(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return "holds" if low > 0 else "**does not hold**" if high < 0 else "undecided"


def _by_seeds(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    wins = [a > b for a, b in zip(first["each"], second["each"], strict=True)]
    verdict = "holds" if all(wins) else "undecided" if any(wins) else "**does not hold**"
    return f"{verdict} ({sum(wins)} of {len(wins)} seeds)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--page", action="store_true", help="run nothing")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in RUNS]:
        parser.error(f"there is no benchmark {unknown[0]!r}, but {', '.join(RUNS)}")
    failed = []
    for name in [] if options.page else options.names or RUNS:
        if measured(name, of := weights(name)) is None:
            print(f"{name}: python benchmarks/{RUNS[name]}", flush=True)
            if not run(name, of):
                failed.append(name)
    text = page(TEMPLATE.read_text(encoding="utf-8"), {name: measured(name, weights(name)) for name in RUNS})
    part = PAGE.with_name(PAGE.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(PAGE)
    print(f"{PAGE} written" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
