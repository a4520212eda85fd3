"""A small drawn world: captioned scenes with exact label maps, from NumPy and Pillow alone."""

from .classes import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    HELD_OUT_PAIRS,
    HELD_OUT_SEED,
    HELD_OUT_STYLES,
    OBJECTS,
    ORDINARY_STYLES,
    STYLES,
    TEST_SEED,
    TRAIN_SEED,
    VALIDATION_SEED,
    label,
)
from .objects import PARTS
from .scene import Keypoint, Placed, Scene, render

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
    "render",
]
