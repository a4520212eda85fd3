"""A small text-to-image diffusion pipeline that ships with the package, and the drawn world it was trained on.

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


def path() -> Path:
    """Return the folder of the pipeline, for ``StableDiffusionPipeline.from_pretrained``."""
    return Path(__file__).resolve().parent / "sd"
