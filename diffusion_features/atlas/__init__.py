"""An atlas of a model's activations: which of them are worth trying as features, measured without labels.

The three properties and the filter by kind are those of arXiv 2410.03558, sections 4 and 5.
"""

from .candidates import PUBLISHED_SHARE, candidates, place_filter, published_filter
from .choosing import Choice, Limits, choose, granularity, preset
from .measuring import Entry, measure
from .probing import Labelled, probe
from .properties import Properties, properties

__all__ = [
    "PUBLISHED_SHARE",
    "Choice",
    "Entry",
    "Labelled",
    "Limits",
    "Properties",
    "candidates",
    "choose",
    "granularity",
    "measure",
    "place_filter",
    "preset",
    "probe",
    "properties",
    "published_filter",
]
