"""What all visitors of a page share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from . import uploads
from .downloads import Downloads
from .looking import Features
from .models import Models
from .recent import Recent
from .segmenting import Runs
from .settings import Limits, Settings

RUNS: dict[str, Any] = dict(preprocess=False, concurrency_id="model", concurrency_limit=2)
"""Of every event that runs a model: while one has the model, another reads or draws pictures. Functions get what was
sent as it is, and check it with ``uploads``."""


@dataclass(frozen=True)
class Shared:
    """What the tabs are built with.

    Attributes:
        folder: where the page may write.
        runs, features: what the models gave last.
    """

    settings: Settings
    models: Models
    folder: Path
    downloads: Downloads
    runs: Runs = field(default_factory=lambda: Recent(16))
    features: Recent[Features] = field(default_factory=lambda: Recent(8))

    @property
    def limits(self) -> Limits:
        return self.settings.allowed

    def picture(self, given: object) -> Image.Image:
        """An uploaded picture, checked; see ``uploads.picture``."""
        return uploads.picture(given, self.folder, self.limits)
