"""A small drawn world: captioned scenes with exact label maps, from NumPy and Pillow alone."""

from .classes import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    OBJECTS,
    TEST_SEED,
    TRAIN_SEED,
    VALIDATION_SEED,
    label,
)
from .scene import Placed, Scene, render

__all__ = [
    "BACKGROUNDS",
    "CLASSES",
    "COLOURS",
    "OBJECTS",
    "TEST_SEED",
    "TRAIN_SEED",
    "VALIDATION_SEED",
    "Placed",
    "Scene",
    "label",
    "render",
]
