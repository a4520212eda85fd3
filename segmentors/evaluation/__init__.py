"""How good a segmentation is: figures, data sets, and protocols that say what a figure means."""

from .datasets import DATASETS, open_dataset
from .evaluate import evaluate
from .labelled import Dataset, Sample
from .metrics import count, resampled, scores
from .protocols import PROTOCOLS, Protocol

__all__ = [
    "DATASETS",
    "PROTOCOLS",
    "Dataset",
    "Protocol",
    "Sample",
    "count",
    "evaluate",
    "open_dataset",
    "resampled",
    "scores",
]
