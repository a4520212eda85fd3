"""The clock that drives a schedule, checkpoints, the log."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Budget:
    """How long a stage lasts: until a moment (``until``, Unix seconds) or for ``steps`` steps.

    A shared machine makes steps unevenly slow; a schedule over elapsed time still ends annealed at the
    deadline. With ``steps`` the same schedule runs over the step count and is reproducible.
    """

    steps: int = 0
    until: float = 0.0
    start: float = field(default_factory=time.time)

    def progress(self, step: int) -> float:
        """Return the fraction of the stage that is behind, 0..1, after ``step`` of its steps."""
        if self.steps:
            return min(1.0, step / self.steps)
        return min(1.0, (time.time() - self.start) / max(1.0, self.until - self.start))


def clock(text: str) -> float:
    """Turn "HH:MM" (the next such moment in UTC) or "+minutes" into Unix seconds."""
    now = time.time()
    if text.startswith("+"):
        return now + 60 * float(text[1:])
    hours, minutes = (int(part) for part in text.split(":"))
    moment = now - now % 86_400 + hours * 3600 + minutes * 60
    return moment if moment > now - 12 * 3600 else moment + 86_400


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a kill leaves either the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    partial.replace(path)


def log(path: Path, **values: float | int | str) -> None:
    """Append one line to a JSONL log and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()})
    with path.open("a") as stream:
        stream.write(line + "\n")
    print(line, flush=True)
