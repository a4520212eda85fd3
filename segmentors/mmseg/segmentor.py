"""``DiffusionEncoderDecoder``: mmsegmentation's encoder-decoder, which lets its backbone know the images' metainfo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from torch import Tensor, nn

from .amalgamation import losses
from .metas import image_metas


@MODELS.register_module()
class DiffusionEncoderDecoder(EncoderDecoder):
    """``EncoderDecoder`` for a ``DiffusionBackbone``.

    Does three things more: each image's metainfo reaches the backbone, which prompts of single images need; what an
    amalgamation adds to the loss is added; and channels that do not fit are an error at once that says what they must
    be.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Arguments as of ``EncoderDecoder``.

        Raises:
            ValueError: ``in_channels`` of the neck or a head is not what comes in.
        """
        super().__init__(*args, **kwargs)
        if self.with_neck:
            _check("neck", self.neck, range(len(self.backbone.channels)), self.backbone.channels)
            return
        heads = {"decode_head": self.decode_head}
        if self.with_auxiliary_head:
            auxiliary = self.auxiliary_head
            several = isinstance(auxiliary, nn.ModuleList)
            heads |= {f"auxiliary_head[{i}]": h for i, h in enumerate(auxiliary)} if several else {
                "auxiliary_head": auxiliary
            }  # fmt: skip
        for name, head in heads.items():
            _check(name, head, head.in_index, self.backbone.channels)

    def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Tensor]:
        with image_metas([sample.metainfo for sample in data_samples]):
            return super().loss(inputs, data_samples) | losses(self.backbone)

    def encode_decode(self, inputs: Tensor, batch_img_metas: Any) -> Tensor:
        with image_metas(batch_img_metas):
            return super().encode_decode(inputs, batch_img_metas)

    def _forward(self, inputs: Tensor, data_samples: Any = None) -> Any:
        with image_metas(None if data_samples is None else [sample.metainfo for sample in data_samples]):
            return super()._forward(inputs, data_samples)


def _check(name: str, module: nn.Module, index: int | Sequence[int], channels: Sequence[int]) -> None:
    """Compare what a neck or head was made for with what the backbone's levels of these places have."""
    places = [index] if isinstance(index, int) else list(index)
    if any(not -len(channels) <= place < len(channels) for place in places):
        raise ValueError(
            f"{name}.in_index is {index}, but the backbone has {len(channels)} levels: {list(range(len(channels)))}"
        )
    right = [channels[place] for place in places]
    given: Any = getattr(module, "in_channels", right)  # not every neck says what it was made for
    if getattr(module, "input_transform", None) == "resize_concat":
        fits = given == sum(right)
    else:
        fits = given == right[0] if isinstance(index, int) else list(given) == right
    if not fits:
        wanted = right[0] if isinstance(index, int) else right
        raise ValueError(f"{name} has in_channels={given}, but the backbone's levels have: in_channels={wanted}")
