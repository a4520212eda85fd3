"""Activations as the feature pyramid that decode heads expect: levels of one stride each, finest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusion_features import FeatureInfo


@dataclass(frozen=True)
class Level:
    """Activations that are concatenated to one (B, channels, H / stride, W / stride) tensor, in this order."""

    activations: tuple[str, ...]
    channels: tuple[int, ...]
    stride: int


def by_stride(info: Mapping[str, FeatureInfo]) -> list[Level]:
    """One level for each stride, finest first; inside a level in forward order.

    Raises:
        ValueError: an activation has no place in an image, or no fixed number of channels.
    """
    _check_spatial(info)
    strides = sorted({one.stride for one in info.values() if one.stride})
    return [_level([id for id, one in info.items() if one.stride == stride], info) for stride in strides]


def as_given(groups: Sequence[Sequence[str]], info: Mapping[str, FeatureInfo]) -> list[Level]:
    """One level for each group of ids.

    Raises:
        ValueError: a group mixes strides, the groups do not go from fine to coarse, or an activation has no place in an
            image, or no fixed number of channels.
    """
    _check_spatial(info)
    for place, group in enumerate(groups):
        if len({info[id].stride for id in group}) > 1:
            found = ", ".join(f"{id} has {info[id].stride}" for id in group)
            raise ValueError(f"level {place} mixes strides: {found}; a level has one stride in image pixels")
    levels = [_level(group, info) for group in groups]
    strides = [level.stride for level in levels]
    if strides != sorted(strides):
        raise ValueError(
            f"levels go from fine to coarse, as decode heads expect: strides {sorted(strides)}, not {strides}. "
            "A head that wants another order says so by in_index"
        )
    return levels


def pick(levels: Sequence[Level], indices: Sequence[int]) -> list[Level]:
    """The levels of these places; negative ones count from the coarsest.

    Raises:
        ValueError: there is no such level.
    """
    if wrong := [index for index in indices if not -len(levels) <= index < len(levels)]:
        strides = ", ".join(f"{place} (stride {level.stride})" for place, level in enumerate(levels))
        raise ValueError(f"out_indices has {wrong[0]}, but the levels are {strides}")
    return [levels[index] for index in indices]


def _level(ids: Sequence[str], info: Mapping[str, FeatureInfo]) -> Level:
    stride = info[ids[0]].stride
    assert stride is not None
    return Level(tuple(ids), tuple(info[id].channels for id in ids), stride)


def _check_spatial(info: Mapping[str, FeatureInfo]) -> None:
    if others := [f"{id} ({one.kind})" for id, one in info.items() if one.kind != "spatial"]:
        raise ValueError(
            f"a backbone gives features of the image, (B, C, h, w); these are none: {', '.join(others)}. "
            "Leave out text-side activations and attention maps"
        )
    if unknown := [id for id, one in info.items() if not one.channels]:
        raise ValueError(
            f"how many channels {unknown[0]} has depends on the image or the prompt, and a head needs to know: make it "
            "of cross-attention alone, in a model whose text encoder gives each prompt the same number of tokens"
        )
