"""All cross-attention of a model as one map a token, added up while the denoiser runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_features import Activation, AttentionCall, LazyMap

from .heads import Heads, Projection, aggregate_heads, head_weights
from .layers import Affinity, Layers, layer_weight


class Aggregator:
    """``A = Σ_l w_l · resize(Ā_l)``, then ``max(0, A)``, then divided by its sum over all tokens (arXiv 2603.06178).

    Give it to ``FeatureExtractor.stream`` or ``capture`` as ``reduce``. A layer is added as soon as its
    cross-attention, its self-attention and the reference feature have come. Of layers that come before the reference,
    the queries and keys are kept until then; a self-attention map never exists.

    Attributes:
        head_weights: cross-map id → (B, H, P); empty where heads are averaged.
        layer_weights: cross-map id → (B,), not normalised over layers.
        refiners: self-map id → its ``LazyMap``, of the ids asked for.
    """

    def __init__(
        self,
        projections: Mapping[str, Projection],
        reference: str,
        refiners: Sequence[str],
        grid: tuple[int, int],
        *,
        heads: Heads = "dot",
        layers: Layers = "dot",
        renormalise: bool = True,
        as_released: bool = False,
    ) -> None:
        """
        Args:
            projections: cross-map id → the output projection of its layer; these are the layers added up.
            reference: id of the feature that tells layers apart.
            refiners: ids of the self-maps to keep for the refinement.
            grid: (h, w) to add up on.
            heads, layers, renormalise: see ``head_weights`` and ``layer_weight``.
            as_released: weigh layers as the released program does: by the reference's first channel alone, and without
                renormalising.
        """
        self.projections, self.reference, self.grid = projections, reference, grid
        self.heads, self.layers, self.renormalise, self.as_released = heads, layers, renormalise, as_released
        self.head_weights: dict[str, Tensor] = {}
        self.layer_weights: dict[str, Tensor] = {}
        self.refiners: dict[str, LazyMap] = {}
        self._refiners = refiners
        self._affinity: Affinity | None = None
        self._cross: dict[str, Tensor] = {}
        self._grids: dict[str, tuple[int, int]] = {}
        self._self: dict[str, LazyMap] = {}
        self._sum: Tensor | None = None
        self._computed = torch.float32

    @property
    def wanted(self) -> list[str]:
        """The ids to capture."""
        weighted = [] if self.layers == "equal" else [self.reference, *map(self_of, self.projections)]
        return list(dict.fromkeys([*self.projections, *self._refiners, *weighted]))

    def __call__(self, id: str, found: Tensor | AttentionCall) -> None:
        if isinstance(found, Tensor):
            self._affinity = Affinity(found[:, :1] if self.as_released else found)
            for layer in list(self._cross):
                self._settle(layer)
        elif id in self.projections:
            weights = None
            if self.heads != "average":
                weights = head_weights(found.output, self.projections[id], self.heads, found.value)
                self.head_weights[id] = weights
            self._cross[id], self._grids[id] = aggregate_heads(found.map, weights), found.map.grid
            self._computed = found.map.query.dtype
            self._settle(id)
        else:
            if id in self._refiners:
                self.refiners[id] = found.map
            if self.layers != "equal":
                self._self[id] = found.map
                self._settle(cross_of(id))

    def _settle(self, layer: str) -> None:
        """Add a layer if everything about it is known."""
        if layer not in self._cross:
            return
        if self.layers == "equal":
            weight = torch.ones(len(self._cross[layer]))
        elif self._affinity is not None and self_of(layer) in self._self:
            own, renormalise = self._self.pop(self_of(layer)), self.renormalise and not self.as_released
            weight = layer_weight(own, self._affinity, self.layers, renormalise=renormalise)
        else:
            return
        self.layer_weights[layer] = weight
        if len(self.layer_weights) == len(self.projections):
            self._affinity = None  # an aggregator may be kept for long
        small = self._cross.pop(layer).transpose(1, 2).unflatten(-1, self._grids[layer])
        maps = F.interpolate(small, self.grid, mode="bilinear")
        maps = maps * weight.to(maps)[:, None, None, None]
        self._sum = maps if self._sum is None else self._sum + maps

    def head_maps(self, index: int) -> dict[str, Tensor]:
        """Cross-map id → the weights of its heads in an image of the batch, (heads, h, w)."""
        return {id: weights[index].unflatten(-1, self._grids[id]) for id, weights in self.head_weights.items()}

    def layer_shares(self, index: int) -> dict[str, float]:
        """Cross-map id → the weight of its layer in an image of the batch; they sum to 1."""
        weights = {id: weight[index].item() for id, weight in self.layer_weights.items()}
        total = sum(weights.values())
        return {id: weights[id] / total for id in self.projections}

    def tokens(self) -> Tensor:
        """A: float32 (B, T, h, w), at least 0; sums to 1 over the tokens of each pixel.

        Raises:
            FloatingPointError: attention has infinite or undefined values, as where half precision overflows.
        """
        assert self._sum is not None, "the denoiser has not run"
        if not torch.isfinite(self._sum).all():
            half = self._computed == torch.float16
            remedy = " Load the model with dtype=torch.float32 or torch.bfloat16." if half else ""
            raise FloatingPointError(f"attention has infinite or undefined values in {self._computed}.{remedy}")
        total = self._sum.clamp(min=0)
        return total / total.sum(dim=1, keepdim=True).clamp(min=torch.finfo(total.dtype).tiny)


def self_of(cross: str) -> str:
    """Id of the self-attention map in the same block as a cross-attention map."""
    return f"{cross.removesuffix('cross-map')}self-map"


def cross_of(own: str) -> str:
    """Id of the cross-attention map in the same block as a self-attention map."""
    return f"{own.removesuffix('self-map')}cross-map"


def output_projection(denoiser: nn.Module, activation: Activation) -> Projection:
    """The linear map that takes the joined heads of a map's layer, (B, P, H·d), to what the layer adds, (B, P, C).

    ``forward`` is called rather than the module, so that no hook takes these calls for the model's own.
    """
    attention = denoiser.get_submodule(activation.module)
    own: Any = getattr(attention, "to_out", None)
    if isinstance(own, nn.ModuleList):
        return own[0].forward
    # single-stream blocks: one projection takes the heads and, behind them, the feed-forward; Flux.2's is the layer's
    return _first_columns(own or denoiser.get_submodule(activation.module.rpartition(".")[0]).proj_out)


def _first_columns(joined: Any) -> Callable[[Tensor], Tensor]:
    def project(merged: Tensor) -> Tensor:
        return joined.forward(F.pad(merged, (0, joined.in_features - merged.shape[-1])))

    return project
