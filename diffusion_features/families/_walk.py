"""What the families share in reading a module tree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from ..activations import Activation, Kind, Tap


class Found(NamedTuple):
    """An activation whose modules are not named yet."""

    activation: Activation
    module: nn.Module
    layout: nn.Module | None
    whole: nn.Module | None


def found(
    id: str,
    module: nn.Module,
    channels: int,
    stride: int | None,
    kind: Kind = "spatial",
    tap: Tap = "output",
    layout: nn.Module | None = None,
    whole: nn.Module | None = None,
    joint: bool = False,
    index: int = 0,
    start: int | None = None,
) -> Found:
    """An ``Activation`` and the modules it is about; see there for the arguments."""
    activation = Activation(id, kind, "", tap, channels, stride, joint=joint, index=index, start=start)
    return Found(activation, module, layout, whole)


def named(denoiser: nn.Module, all_found: Iterable[Found]) -> list[Activation]:
    """The activations with the dotted paths of their modules."""
    paths: dict[nn.Module | None, str] = {module: path for path, module in denoiser.named_modules()}
    return [
        replace(a, module=paths[module], layout=paths.get(layout), whole=paths.get(whole))
        for a, module, layout, whole in all_found
    ]


def block(prefix: str, block: Any, channels: int, stride: int, layout: nn.Module) -> Iterator[Found]:
    """A transformer block with self-attention ``attn1``, cross-attention ``attn2`` and a feed-forward ``ff``."""
    yield from attention(f"{prefix}-self", block.attn1, stride, layout, text=False)
    if block.attn2 is not None:
        text = not getattr(block, "double_self_attention", False)
        yield from attention(f"{prefix}-cross", block.attn2, stride, layout, text=text)
    yield inner(prefix, block, stride, layout)
    yield found(f"{prefix}-out", block, channels, stride, layout=layout)


def inner(prefix: str, block: Any, stride: int, layout: nn.Module) -> Found:
    """What a feed-forward computes between its two linear layers, after the activation function."""
    first, last = block.ff.net[0], block.ff.net[2]
    return found(f"{prefix}-ffn-inner", first, last.in_features, stride, layout=layout, whole=block)


def attention(prefix: str, attn: Any, stride: int, layout: nn.Module, *, text: bool) -> Iterator[Found]:
    """Query, key, value and map of one attention layer, whose keys are ``text`` or image tokens."""
    yield found(f"{prefix}-q", attn.to_q, attn.to_q.out_features, stride, layout=layout)
    for name, layer in (("k", attn.to_k), ("v", attn.to_v)):
        if text:
            yield found(f"{prefix}-{name}", layer, layer.out_features, None, "text")
        else:
            yield found(f"{prefix}-{name}", layer, layer.out_features, stride, layout=layout)
    yield found(f"{prefix}-map", attn, attn.heads, stride, "map", "attention", layout=layout)


def joint_maps(prefix: str, attn: Any, stride: int, layout: nn.Module) -> Iterator[Found]:
    """The parts of a joint softmax: image→text, image→image and text→image; rows are not normalised again."""
    for name in ("cross-map", "self-map", "text-map"):
        yield found(f"{prefix}-{name}", attn, attn.heads, stride, "map", "attention", layout=layout, joint=True)
