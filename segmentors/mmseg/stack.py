"""``DiffusionBackbones``: several diffusion models side by side, as in the largest setting of arXiv 2410.03558."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn

from .backbone import DiffusionBackbone, projection_of
from .levels import Level


@MODELS.register_module()
class DiffusionBackbones(BaseModule):
    """Levels of the same stride are joined, those of the first model first; finest level first.

    Attributes:
        feature_info, channels: as of ``DiffusionBackbone``.
    """

    def __init__(
        self, backbones: Sequence[dict[str, Any]], projection: dict[str, Any] | None = None, init_cfg: Any = None
    ) -> None:
        """
        Args:
            backbones: configurations of ``DiffusionBackbone``.
            projection: of the joined levels, as ``DiffusionBackbone`` has it for its own.

        Raises:
            ValueError: a model has two levels of one stride, so that it is not clear what to join.
        """
        super().__init__(init_cfg)
        models: list[DiffusionBackbone] = [MODELS.build(config) for config in backbones]
        self.models = nn.ModuleList(models)
        of_model = [[level.stride for level in model.feature_info] for model in models]
        if twice := [strides for strides in of_model if len(set(strides)) < len(strides)]:
            raise ValueError(f"models are joined level by level: each needs one level a stride, not {twice[0]}")
        strides = sorted({stride for one in of_model for stride in one})
        self._places = [
            [(m, one.index(stride)) for m, one in enumerate(of_model) if stride in one] for stride in strides
        ]
        parts = [[models[m].channels[i] for m, i in places] for places in self._places]
        self.feature_info = tuple(
            Level(
                tuple(f"{m}:{id}" for m, i in places for id in models[m].feature_info[i].activations),
                tuple(count for m, i in places for count in models[m].feature_info[i].channels),
                stride,
            )
            for places, stride in zip(self._places, strides, strict=True)
        )
        self.projections = nn.ModuleList(projection_of(channels, projection) for channels in parts)
        self.channels = tuple(sum(p) if projection is None else projection["channels"] for p in parts)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """As of ``DiffusionBackbone``; where models work at different sizes, levels get the size of the first's."""
        features = [model(x) for model in self.models]
        return tuple(
            project(_same_size([features[m][i] for m, i in places]))
            for places, project in zip(self._places, self.projections, strict=True)
        )


def _same_size(features: list[Tensor]) -> list[Tensor]:
    size = features[0].shape[-2:]
    return [f if f.shape[-2:] == size else F.interpolate(f, size, mode="bilinear") for f in features]
