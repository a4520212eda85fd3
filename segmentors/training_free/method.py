"""How the maps of a model are put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from .background import Background
from .edges import Edges
from .heads import Heads
from .layers import Layers
from .rescaling import Rescale


@dataclass(frozen=True)
class Method:
    """The method of arXiv 2603.06178; ``PLAIN`` is the practice before it.

    Attributes:
        heads: see ``head_weights``.
        layers, renormalise: see ``layer_weight``.
        rescale: see ``entity_maps``.
        refine: whether to refine.
        edges: see ``to_edges``.
        background, threshold: see ``background_score``.
        as_released: weigh layers as the released program does: not renormalised, by one channel of the reference.
    """

    heads: Heads = "dot"
    layers: Layers = "dot"
    renormalise: bool = True
    rescale: Rescale = "sum"
    refine: bool = True
    edges: Edges = "none"
    background: Background = "offset"
    threshold: float = 0.0
    as_released: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a value that is none of a field's."""
        fields = {"heads": Heads, "layers": Layers, "rescale": Rescale, "edges": Edges, "background": Background}
        for field, choices in fields.items():
            if (value := getattr(self, field)) not in get_args(choices):
                raise ValueError(f"{field} of a Method is {', '.join(get_args(choices))}, not {value!r}")


PLAIN = Method(heads="average", layers="equal", rescale="none")
