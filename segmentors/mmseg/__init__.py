"""Diffusion models in mmsegmentation.

``custom_imports = dict(imports=["segmentors.mmseg"])`` in a config registers everything of this package:
backbones, segmentors, a dataset, transforms and a hook.
"""

from .backbone import DiffusionBackbone
from .dataset import EmbeddedWorldDataset
from .hooks import RandomStateHook
from .segmentor import DiffusionEncoderDecoder
from .stack import DiffusionBackbones
from .training_free import TrainingFreeSegmentor
from .transforms import CheckLabels, LoadPrompt

__all__ = [
    "CheckLabels",
    "DiffusionBackbone",
    "DiffusionBackbones",
    "DiffusionEncoderDecoder",
    "EmbeddedWorldDataset",
    "LoadPrompt",
    "RandomStateHook",
    "TrainingFreeSegmentor",
]
