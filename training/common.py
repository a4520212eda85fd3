"""What both trainings share: workers, the clock that drives the schedule, averaging, checkpoints, the log."""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: Two processes of one thread each: on a shared two-core machine they lose far less than two threads,
#: which wait for each other in every operation.
WORKERS = 2


def _enter(rank: int, main: Callable[[argparse.Namespace], None], options: argparse.Namespace, meeting: str) -> None:
    # Started in the background, a process ignores this signal, by which a dying parent stops its workers.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORKERS)
    main(options)
    dist.destroy_process_group()


def launch(main: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> None:
    """Run ``main(options)`` in every worker."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (main, options, f"{folder}/meeting"), nprocs=WORKERS)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over the workers."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= WORKERS
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def agree(value: float) -> float:
    """Return the largest ``value`` of all workers, so that all take the same decision."""
    shared = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.item()


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


class Average:
    """An exponential moving average of parameters."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take one step; early steps average over fewer values so that the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged and the current values."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


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


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def norm_(parameters: Iterable[torch.nn.Parameter], limit: float) -> float:
    """Clip the gradient to ``limit`` in place; return its norm before."""
    return float(torch.nn.utils.clip_grad_norm_(list(parameters), limit))
