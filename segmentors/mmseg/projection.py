"""What brings activations of unlike scale to one level of a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import ConvModule
from torch import Tensor, nn


class Projection(nn.Module):
    """Normalise each activation, then mix all to ``out_channels`` by a 1x1 convolution, a norm and ReLU.

    Activations of one stride may differ in scale by orders of magnitude, so each is normalised over its channels and
    pixels (group normalisation with one group) with a learnt scale and shift a channel. The released code of arXiv
    2410.03558 has a residual block here whose convolutions and norms all begin at zero, so that nothing but the last
    bias ever learns; this one begins at random and learns everywhere.
    """

    def __init__(self, channels: Sequence[int], out_channels: int, norm: dict[str, Any]) -> None:
        """
        Args:
            channels: of each activation.
            out_channels: of the level.
            norm: mmcv's configuration of the norm behind the convolution, such as ``dict(type="GN", num_groups=32)``.
        """
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(1, count) for count in channels)
        self.mix = ConvModule(sum(channels), out_channels, 1, norm_cfg=norm)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """float32 (B, C_i, h, w) each → (B, out_channels, h, w)."""
        return self.mix(torch.cat([norm(one) for norm, one in zip(self.norms, features, strict=True)], dim=1))


class Concatenation(nn.Module):
    """No projection: the activations as they are, side by side."""

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(B, C_i, h, w) each → (B, ΣC_i, h, w)."""
        return torch.cat(list(features), dim=1)
