"""Semantic correspondence: where the parts of one image are in another.

>>> source, target = ({id: f[0] for id, f in fx(image).items()} for image in (first, second))
>>> match(source, target, torch.tensor([[120.0, 80.0]]), source_size=(256, 256), target_size=(192, 320)).points
"""

from .head import AggregationHead, contrastive_loss, train_head
from .matching import Matches, match, nearest, returns, similarity, soft_argmax
from .pairs import Pair, embedded_pairs, spair_pairs
from .pck import THRESHOLDS, Measured, measure, summary

__all__ = [
    "THRESHOLDS",
    "AggregationHead",
    "Matches",
    "Measured",
    "Pair",
    "contrastive_loss",
    "embedded_pairs",
    "match",
    "measure",
    "nearest",
    "returns",
    "similarity",
    "soft_argmax",
    "spair_pairs",
    "summary",
    "train_head",
]
