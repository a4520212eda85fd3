"""Segmentation from a few labelled images: an ensemble of small classifiers of single pixels.

After DatasetDDPM (arXiv 2112.03126), as arXiv 2410.03558 uses it to compare activations.
"""

from .ensemble import Ensemble, Prediction
from .labels import ddpm_labels, drawn_parts, masks
from .saving import load, save
from .training import train

__all__ = ["Ensemble", "Prediction", "ddpm_labels", "drawn_parts", "load", "masks", "save", "train"]
