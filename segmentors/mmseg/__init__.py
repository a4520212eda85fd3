"""Diffusion models in mmsegmentation.

``custom_imports = dict(imports=["segmentors.mmseg"])`` in a config registers everything of this package:
backbones, segmentors, a dataset, transforms, a hook and an optimizer wrapper.
"""

from .amp import CpuAmpOptimWrapper
from .backbone import DiffusionBackbone
from .dataset import EmbeddedWorldDataset
from .hooks import RandomStateHook
from .segmentor import DiffusionEncoderDecoder
from .stack import DiffusionBackbones
from .training_free import TrainingFreeSegmentor
from .transforms import CheckLabels, LoadPrompt
from .views import FixedViews

__all__ = [
    "CheckLabels",
    "CpuAmpOptimWrapper",
    "DiffusionBackbone",
    "DiffusionBackbones",
    "DiffusionEncoderDecoder",
    "EmbeddedWorldDataset",
    "FixedViews",
    "LoadPrompt",
    "RandomStateHook",
    "TrainingFreeSegmentor",
]
