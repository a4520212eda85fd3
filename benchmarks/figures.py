"""Figures over several seeds, and their files."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def across(values: Iterable[float]) -> dict[str, Any]:
    """The mean, the standard deviation (divisor n - 1, zero for a single seed), and the figure of each seed."""
    each = [float(value) for value in values]
    return {"mean": statistics.fmean(each), "spread": statistics.stdev(each) if each[1:] else 0.0, "each": each}


def shown(figure: dict[str, Any]) -> str:
    """``0.412 ± 0.013``."""
    return f"{figure['mean']:.3f} ± {figure['spread']:.3f}"


def save(path: Path, result: dict[str, Any]) -> None:
    """Write JSON, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def digest(folders: Iterable[Path]) -> str:
    """SHA-256 of all safetensors files in the folders."""
    found = hashlib.sha256()
    for file in (file for folder in folders for file in sorted(folder.rglob("*.safetensors"))):
        found.update(file.read_bytes())
    return found.hexdigest()
