"""The models that the page offers, each loaded once and shared by all visitors."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_features import FeatureExtractor
from diffusion_features.activations import select
from diffusion_features.attention import use_fast_attention
from diffusion_features.loading import load_pipeline, model_revision
from segmentors import TrainingFreeSegmentor

from .pacing import counted
from .stopping import stoppable


@dataclass(frozen=True)
class Loaded:
    """A model and its segmentor with the model's preset."""

    name: str
    fx: FeatureExtractor
    segmentor: TrainingFreeSegmentor

    @property
    def looked_at(self) -> list[str]:
        """Ids of what has a place in the image, in forward order."""
        return [a.id for a in self.fx.available if a.kind == "spatial"]

    @property
    def presets(self) -> dict[str, list[str]]:
        """Name → ids of what has a place in the image, of the presets for this model that have any."""
        spatial, fx = set(self.looked_at), self.fx
        found = {name: [a.id for a in select(fx.available, ids) if a.id in spatial] for name, ids in fx.presets.items()}
        return {name: ids for name, ids in found.items() if ids}

    @property
    def first_look(self) -> list[str]:
        """Ids of the preset that is recommended for this model; without such, the last four."""
        return self.presets.get("practical") or self.presets.get("study") or self.looked_at[-4:]


class Models:
    """The models that were named at the start, and no others.

    Attributes:
        names: what visitors know them by: of a folder only its last part, as its path is none of their business.
    """

    def __init__(self, models: Sequence[str]) -> None:
        """
        Args:
            models: as ``FeatureExtractor.from_pretrained`` takes them.

        Raises:
            ValueError: there is none, or two have one name.
        """
        self.names = tuple(Path(model).resolve().name if Path(model).exists() else model for model in models)
        if not models or len(set(self.names)) < len(models):
            raise ValueError(f"name at least one model, and each by another name, not {list(models)}")
        self._sources = dict(zip(self.names, models, strict=True))
        self._loaded: dict[str, Loaded] = {}
        self._locks = {name: threading.Lock() for name in self.names}

    def loaded(self, name: object) -> Loaded | None:
        """A model by its name, if it is loaded by now."""
        return self._loaded.get(str(name))

    def __call__(self, name: object) -> Loaded:
        """A model by its name, loaded at the first call.

        Raises:
            ValueError: it is not offered.
            LoadError: it cannot be loaded.
        """
        if name not in self.names:
            raise ValueError(f"This page offers {', '.join(self.names)}, and no other model.")
        key = str(name)
        with self._locks[key]:
            if key not in self._loaded:
                self._loaded[key] = _load(key, self._sources[key])
            return self._loaded[key]


def _load(name: str, source: str) -> Loaded:
    pipe = load_pipeline(source)  # whole: the test of content shift decodes what it repaints
    # an extractor that owns its pipeline keeps every prompt it was ever given; a server must not
    fx = FeatureExtractor(pipe, "*", model_id=source, revision=model_revision(pipe))
    use_fast_attention(fx.denoiser)
    stoppable(fx.denoiser)
    counted(fx.denoiser)
    return Loaded(name, fx, TrainingFreeSegmentor(fx))
