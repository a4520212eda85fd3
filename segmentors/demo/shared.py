"""What all visitors of a page share."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from . import uploads
from .boundary import plain
from .files import Files
from .looking import Features
from .models import Loaded, Models
from .recent import Recent
from .segmenting import Runs
from .settings import Limits, Settings

RUNS: dict[str, Any] = dict(preprocess=False, concurrency_id="model", concurrency_limit=2)
"""Of every event whose function is one of ``Shared.with_model``: the next is ready when one ends. Functions get what
was sent as it is, and check it with ``uploads``."""
LOOKS_UP: dict[str, Any] = dict(preprocess=False, concurrency_id="lists", concurrency_limit=4)
"""Of every event whose function is one of ``Shared.beside``."""


@dataclass(frozen=True)
class Shared:
    """What the tabs are built with.

    Attributes:
        folder: where the page may write.
        thread: a single one, where all models load and run. PyTorch keeps a team of helping threads for each thread
            that computes; of two teams neither has the cores for itself.
        others: threads where nothing computes.
        runs, features: what the models gave last.
    """

    settings: Settings
    models: Models
    folder: Path
    files: Files
    thread: Executor
    others: Executor
    runs: Runs = field(default_factory=lambda: Recent(16))
    features: Recent[Features] = field(default_factory=lambda: Recent(8))

    @property
    def limits(self) -> Limits:
        return self.settings.allowed

    def with_model(self, function: Callable[..., Any]) -> Callable[..., Coroutine[Any, Any, Any]]:
        """A function that computes, as Gradio is to call it; see ``boundary.plain``."""
        return plain(function, self.thread)

    def beside(self, function: Callable[..., Any]) -> Callable[..., Coroutine[Any, Any, Any]]:
        """A function that only looks something up, as Gradio is to call it, even while a model runs."""
        return plain(function, self.others)

    def looked_up(self, name: object) -> Loaded:
        """A model, for the functions of ``beside``: at once where it is loaded."""
        return self.models.loaded(name) or self.thread.submit(self.models, name).result()

    def picture(self, given: object) -> Image.Image:
        """An uploaded picture, checked; see ``uploads.picture``."""
        return uploads.picture(given, self.folder, self.limits)
