"""The models that the page offers, each loaded once and shared by all visitors."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from diffusion_features import FeatureExtractor
from segmentors import TrainingFreeSegmentor


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
    def first_look(self) -> list[str]:
        """Ids of the activations that the papers recommend for this model; without such, the last four."""
        spatial = set(self.looked_at)
        return [id for id in self.fx.presets.get("practical", []) if id in spatial] or self.looked_at[-4:]


class Models:
    """The models that were named at the start, and no others."""

    def __init__(self, names: Sequence[str]) -> None:
        """
        Raises:
            ValueError: there is no name, or one comes twice.
        """
        if not names or len(set(names)) < len(names):
            raise ValueError(f"name at least one model, and each once, not {list(names)}")
        self.names = tuple(names)
        self._loaded: dict[str, Loaded] = {}
        self._locks = {name: threading.Lock() for name in names}

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
                self._loaded[key] = _load(key)
            return self._loaded[key]


def _load(name: str) -> Loaded:
    whole = FeatureExtractor.from_pretrained(name, activations="*")
    # an extractor that owns its pipeline keeps every prompt it was ever given; a server must not
    fx = FeatureExtractor(whole.pipe, "*", model_id=whole.model_id, revision=whole.revision)
    return Loaded(name, fx, TrainingFreeSegmentor(fx))
