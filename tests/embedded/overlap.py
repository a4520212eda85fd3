"""How well a segmentor finds the classes of drawn scenes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffusion_features.embedded import CLASSES, Scene, label
from segmentors import TrainingFreeSegmentor


def mean_iou(segment: TrainingFreeSegmentor, scenes: Sequence[Scene]) -> float:
    """Mean IoU over classes, each scene told its own classes; scene i is seen with seed i."""
    both, either = np.zeros(len(CLASSES)), np.zeros(len(CLASSES))
    for i, scene in enumerate(scenes):
        labels = segment(scene.image, classes=list(scene.classes), seed=i).labels.numpy()
        for place, name in enumerate(scene.classes):
            found, truth = labels == place, scene.semantic == label(name)
            both[label(name)] += (found & truth).sum()
            either[label(name)] += (found | truth).sum()
    return float(np.mean(both[either > 0] / either[either > 0]))
