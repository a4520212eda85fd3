"""Inner activations of text-to-image diffusion models as dense features of images.

>>> from diffusion_features import FeatureExtractor
>>> fx = FeatureExtractor.from_pretrained("embedded")
>>> features = fx(image, prompt="a photo of a cat", t=50, seed=0)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activations import Activation, UnknownActivation
    from .attention_call import AttentionCall, LazyMap
    from .capturing import CaptureError, CFGPair, capture
    from .extractor import FeatureExtractor, FeatureInfo
    from .families import list_activations
    from .images import ImageError, read_image
    from .loading import LoadError

__version__ = "0.1.0"

_HOMES = {
    "Activation": "activations",
    "AttentionCall": "attention_call",
    "CFGPair": "capturing",
    "CaptureError": "capturing",
    "FeatureExtractor": "extractor",
    "FeatureInfo": "extractor",
    "ImageError": "images",
    "LazyMap": "attention_call",
    "LoadError": "loading",
    "UnknownActivation": "activations",
    "capture": "capturing",
    "list_activations": "families",
    "read_image": "images",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import on first use: torch and diffusers take seconds, and ``--help`` should not wait for them."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
