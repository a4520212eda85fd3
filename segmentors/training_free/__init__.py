"""Segmentation by a model's attention, without training: the method of arXiv 2603.06178, a file an idea."""

from .labelling import Segmentation
from .method import PLAIN, Method
from .presets import PRESETS, Preset
from .segmentor import TrainingFreeSegmentor

__all__ = ["PLAIN", "PRESETS", "Method", "Preset", "Segmentation", "TrainingFreeSegmentor"]
