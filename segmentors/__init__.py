"""What consumes the activations of `diffusion_features` to label pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .training_free import Method, Preset, Segmentation, TrainingFreeSegmentor

__all__ = ["Method", "Preset", "Segmentation", "TrainingFreeSegmentor"]


def __getattr__(name: str) -> Any:
    """Import on first use: torch and diffusers take seconds."""
    if name in __all__:
        from . import training_free

        return getattr(training_free, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
