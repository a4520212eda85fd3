"""Scenes whose caption is read at one resolution alone, so that the words are looked for at each of them.

Where all cross-attention layers read the caption, those of one resolution find the words and the others need not: they
read it for the scene as a whole. A layer that is sometimes alone with the caption has to find them itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Generator, Tensor

#: The share of scenes whose caption is read at one resolution alone.
ALONE = 2 / 3


def resolutions(unet: UNet2DConditionModel) -> list[list[Attention]]:
    """Cross-attention layers by resolution, finest first; the middle block's with the coarsest of the others."""
    last = max(i for i, block in enumerate(unet.down_blocks) if hasattr(block, "attentions"))
    found: list[list[Attention]] = [[] for _ in range(last + 1)]
    places = [*enumerate(unet.down_blocks), (last, unet.mid_block), *enumerate(reversed(unet.up_blocks))]
    for level, block in places:
        for transformer in getattr(block, "attentions", []):
            found[level] += [part.attn2 for part in transformer.transformer_blocks]
    return found


def drawn(count: int, groups: int, generator: Generator) -> Tensor:
    """Which resolutions read the caption of each scene, bool [count, groups]: all, or one."""
    alone = torch.rand(count, generator=generator) < ALONE
    one = torch.randint(groups, (count,), generator=generator)
    return ~alone[:, None] | (one[:, None] == torch.arange(groups))


@contextmanager
def listening(groups: Sequence[Sequence[Attention]], heard: Tensor, nothing: Tensor) -> Iterator[None]:
    """Inside, the layers of ``groups[g]`` read of scene i what they are told if ``heard[i, g]``, else ``nothing``.

    Args:
        heard: bool [N, groups].
        nothing: the encoded empty caption, [1, tokens, width].
    """
    with ExitStack() as hooks:
        for group, mine in zip(groups, heard.T, strict=True):

            def hear(layer: Any, args: Any, kwargs: dict[str, Any], mine: Tensor = mine) -> tuple[Any, dict[str, Any]]:
                told = torch.where(mine[:, None, None], kwargs["encoder_hidden_states"], nothing)
                return args, {**kwargs, "encoder_hidden_states": told}

            for layer in group:
                hooks.callback(layer.register_forward_pre_hook(hear, with_kwargs=True).remove)
        yield
