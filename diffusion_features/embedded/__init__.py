"""Small text-to-image diffusion pipelines that ship with the package, and the drawn world they were trained on.

Importing this module loads no PyTorch: :func:`path` only says where the weights are.
"""

from __future__ import annotations

from pathlib import Path

from .world import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    HELD_OUT_PAIRS,
    HELD_OUT_SEED,
    HELD_OUT_STYLES,
    OBJECTS,
    ORDINARY_STYLES,
    PARTS,
    STYLES,
    TEST_SEED,
    TRAIN_SEED,
    VALIDATION_SEED,
    Keypoint,
    Placed,
    Scene,
    label,
    render,
)

__all__ = [
    "BACKGROUNDS",
    "CLASSES",
    "COLOURS",
    "HELD_OUT_PAIRS",
    "HELD_OUT_SEED",
    "HELD_OUT_STYLES",
    "MODELS",
    "OBJECTS",
    "ORDINARY_STYLES",
    "PARTS",
    "STYLES",
    "TEST_SEED",
    "TRAIN_SEED",
    "VALIDATION_SEED",
    "Keypoint",
    "Placed",
    "Scene",
    "label",
    "path",
    "render",
]


MODELS = {"embedded": "sd", "embedded-dit": "dit", "embedded-dit-small": "dit-small"}
"""Name → folder beside this file: a UNet, and a transformer in two sizes."""


def path(model: str = "embedded") -> Path:
    """Return the folder of a shipped pipeline, for its ``from_pretrained``.

    Args:
        model: "embedded", for ``StableDiffusionPipeline``, "embedded-dit" or "embedded-dit-small", for
            ``PixArtAlphaPipeline``.

    Raises:
        KeyError: no shipped pipeline has this name.
    """
    return Path(__file__).resolve().parent / MODELS[model]
