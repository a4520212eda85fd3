"""One loop for every training, on whatever ``accelerate`` finds: processes on a CPU, or a GPU in mixed precision.

A training is a ``Task``. A kill at any moment costs the steps since the last checkpoint: started again with the same
arguments, the loop goes on from there, and each step draws what it would have drawn in an unbroken run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from common import Budget, clock, log, save
from diffusers.training_utils import EMAModel
from torch import Generator, Tensor, nn

#: Minutes between two checkpoints.
EVERY = 3.0
#: Told so, accelerate joins the processes of a CPU too.
CPU = not torch.accelerator.is_available()
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """What is trained.

    ``module(**batch)`` returns scalars by name; "loss" is minimised and all are logged. ``batches(step, share,
    generator)`` draws one process's share (a fraction of the whole) of a step, in parts that may differ in shape.
    ``validate`` and ``export`` are called in the first process, with the averaged weights in the module.
    """

    name: str
    module: nn.Module
    batches: Callable[[int, float, Generator], list[Batch]]
    validate: Callable[[], dict[str, float]]
    export: Callable[[], None]
    seed: int
    rate: float
    warmup: int = 100
    decay: float = 0.999  # of the moving average that is exported

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all trainings have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, default=0, help="reproducible on a given machine")
    length.add_argument("--until", type=clock, default=0.0, help="HH:MM in UTC, or +minutes; anneals by the clock")
    parser.add_argument("--again", type=Path, metavar="FILE", help="a finished checkpoint, moved away, to start from")
    parser.add_argument("--precision", choices=("no", "fp16", "bf16"), default="no", help="default: %(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs/embedded"), help="checkpoints (default: %(default)s)")
    parser.add_argument("--log-folder", type=Path, default=Path("training/logs"), help="logs (default: %(default)s)")
    return parser


def denoiser(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, with the options that trainings of whole denoisers have too."""
    parser.add_argument("--native", action="store_true", help="scenes of 128 pixels alone: what to finish with")
    parser.add_argument(
        "--priced", action="store_true", help="looking at words has a price where they are hardly found"
    )
    parser.add_argument(
        "--taught", action="store_true", help="elsewhere, in scenes of 128 pixels, it goes where teacher.py has noted"
    )
    parser.add_argument("--shipped", action="store_true", help="start from the weights that the package has")
    options = parser.parse_args()
    if options.shipped and options.again:
        parser.error("--shipped and --again are two places to start from: give one of them")
    return options


def first() -> AbstractContextManager[None]:
    """What is inside runs in the first process, then in the others: there it finds what the first has made."""
    return PartialState(cpu=CPU).main_process_first()


class Loop:
    """The state of a training."""

    def __init__(self, task: Task, options: argparse.Namespace) -> None:
        self.task = task
        self.accelerator = Accelerator(cpu=CPU, mixed_precision=options.precision)
        optimizer = torch.optim.AdamW(task.parameters, lr=task.rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.module, self.optimizer = self.accelerator.prepare(task.module, optimizer)
        self.budget, self.began, self.step = Budget(options.steps, options.until), time.time(), 0
        self.checkpoint, self.log = options.runs / f"{task.name}.pt", options.log_folder / f"{task.name}.jsonl"
        begun = self.checkpoint.exists()
        state = self._restore(self.checkpoint if begun else options.again)
        self.average = EMAModel(task.parameters, decay=task.decay)
        if begun:
            self.step, self.began, self.budget = state["step"], state["began"], Budget(**state["budget"])
            self.average.load_state_dict(state["average"])
            self.average.to(self.accelerator.device)

    def _restore(self, path: Path | None) -> dict[str, Any]:
        """Load the weights and the optimizer's state, if there are any, and return all of a checkpoint."""
        if path is None:
            return {}
        state: dict[str, Any] = torch.load(path, map_location="cpu")
        self.task.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state

    def save(self) -> None:
        """Write a checkpoint in the first process."""
        if self.accelerator.is_main_process:
            save(self.checkpoint, {
                "module": self.task.module.state_dict(), "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict(), "step": self.step, "began": self.began,
                "budget": vars(self.budget),
            })  # fmt: skip

    def averaged(self, use: Callable[[], Any]) -> Any:
        """Call ``use`` in the first process while the module holds the averaged weights."""
        if not self.accelerator.is_main_process:
            return None
        self.average.store(self.task.parameters)
        self.average.copy_to(self.task.parameters)
        try:
            return use()
        finally:
            self.average.restore(self.task.parameters)

    def report(self, **values: float) -> None:
        if self.accelerator.is_main_process:
            log(self.log, step=self.step, seconds=round(time.time() - self.began, 1), **values)

    def advance(self, done: float) -> dict[str, float]:
        """Take one step; ``done`` is the share of the training behind it. Returns what was measured."""
        task, accelerator = self.task, self.accelerator
        count, index = accelerator.num_processes, accelerator.process_index
        generator = Generator().manual_seed(task.seed + self.step * count + index)
        parts = task.batches(self.step, 1 / count, generator)
        found: dict[str, float] = {}
        self.optimizer.zero_grad()
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else accelerator.no_sync(self.module):
                values = self.module(**{name: value.to(accelerator.device) for name, value in part.items()})
                accelerator.backward(values["loss"] / len(parts))
            found |= {f"{name}{i or ''}": value.item() for name, value in values.items()}
        found["grad"] = float(accelerator.clip_grad_norm_(task.parameters, 1.0))
        found["lr"] = min(1.0, (self.step + 1) / task.warmup) * task.rate * (1 - done)
        for group in self.optimizer.param_groups:
            group["lr"] = found["lr"]
        self.optimizer.step()
        self.average.step(task.parameters)
        self.step += 1
        return found

    def progress(self) -> float:
        """The share of the training that is behind, the same in every process."""
        return max(gather_object([self.budget.progress(self.step)]))


def train(task: Task, options: argparse.Namespace) -> None:
    """Train to the end, with a checkpoint every few minutes and the export last."""
    options.runs.mkdir(parents=True, exist_ok=True)
    loop, saved = Loop(task, options), time.time()
    found: dict[str, float] = {}  # of each name what was found last: not every step has every part
    while (done := loop.progress()) < 1:
        found |= loop.advance(done)
        if loop.step % 20 == 0:
            loop.report(progress=done, **found)
            found.clear()
        if time.time() - saved > 60 * EVERY:
            loop.report(**(loop.averaged(task.validate) or {}))
            loop.save()
            saved = time.time()
    loop.report(**(loop.averaged(task.validate) or {}), finished=1)
    loop.save()
    loop.averaged(task.export)
    loop.accelerator.wait_for_everyone()
    loop.accelerator.end_training()
