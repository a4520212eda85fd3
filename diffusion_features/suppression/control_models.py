"""How diffusers' ControlNets are called: one row a denoiser class that has them.

A ControlNet takes what its denoiser is called with, and the condition; its residuals are more arguments of the
denoiser. So the call is made from the denoiser's own, and works wherever that is called from.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ..truncating import untruncated

Residuals = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """ControlNets of one denoiser class.

    Attributes:
        control: their class in diffusers.
        encode: (extractor, ControlNet, pixels in [0, 1]) → the condition as the ControlNet takes it.
        residuals: (denoiser, ControlNet, what it returned) → arguments of the denoiser.
        adapt: (denoiser, ControlNet, the denoiser's arguments) → changes to what the ControlNet shares of them.
    """

    control: str
    encode: Callable[[Any, Any, Tensor], Tensor]
    residuals: Callable[[Any, Any, Any], Residuals]
    adapt: Callable[[Any, Any, Mapping[str, Any]], Mapping[str, Any]] = lambda denoiser, control, call: {}


def call_control(
    kind: Kind, denoiser: nn.Module, control: Any, condition: Tensor, scale: float, args: Any, kwargs: Any
) -> dict[str, Any]:
    """The denoiser's keyword arguments with the residuals of one ControlNet added to those that are there already."""
    call = inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments
    taken = inspect.signature(control.forward).parameters
    shared = {name: value for name, value in call.items() if name in taken and "kwargs" not in name}
    shared |= {"added_cond_kwargs": call["added_cond_kwargs"]} if "added_cond_kwargs" in call else {}
    shared |= {**kind.adapt(denoiser, control, call), "return_dict": False}
    rows = len(next(iter(call.values())))  # more than conditions if a pipeline guides: [unconditional; conditional]
    repeated = condition.repeat(rows // len(condition), *[1] * (condition.ndim - 1))
    shared = _in_dtype_of(control, {**shared, "controlnet_cond": repeated, "conditioning_scale": scale})
    mask = None if "encoder_attention_mask" in taken else call.get("encoder_attention_mask")
    found = control(**shared) if mask is None else _by_length(control, shared, mask)
    residuals = _in_dtype_of(denoiser, kind.residuals(denoiser, control, found))
    return {**kwargs, **{name: _added(call.get(name), value) for name, value in residuals.items()}}


def _by_length(control: Any, shared: Mapping[str, Any], mask: Tensor) -> Any:
    """What a ControlNet that takes no mask of the prompts returns for prompts of several lengths: one call for each.

    Args:
        mask: (B, tokens), 1 for the tokens of a prompt, then 0 for padding.
    """
    lengths = mask.long().sum(dim=1)
    parts: dict[int, Any] = {}
    for length in lengths.unique().tolist():
        own = lengths == length

        def taken(value: Any, own: Tensor = own) -> Any:
            batched = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(own)
            return value[own.to(value.device)] if batched else value

        few = torch.utils._pytree.tree_map(taken, dict(shared))
        parts[length] = control(**{**few, "encoder_hidden_states": few["encoder_hidden_states"][:, :length]})
    order = torch.cat([(lengths == length).nonzero().flatten() for length in parts]).argsort()
    return torch.utils._pytree.tree_map(lambda *each: torch.cat(each)[order.to(each[0].device)], *parts.values())


def _in_dtype_of(model: Any, values: Any) -> Any:
    """Tensors of an activation's dtype cast to the model's, in nested dicts, lists and tuples."""

    def cast(value: Any) -> Any:
        return value.to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return torch.utils._pytree.tree_map(cast, values)


def _added(first: Any, second: Any) -> Any:
    """The sum of two sets of residuals: tensors, or sequences of them, the shorter of which ends in zeros."""
    if first is None:
        return second
    if isinstance(second, Tensor):
        return first + second
    pairs = zip_longest(first, second)
    return type(second)(b if a is None else a if b is None else a + b for a, b in pairs)


# ---- conditions -----------------------------------------------------------------------------------------------------


def _as_pixels(fx: Any, control: Any, pixels: Tensor) -> Tensor:
    return pixels


def _as_latents(fx: Any, control: Any, pixels: Tensor) -> Tensor:
    """Encoded like an image; by the posterior's mean, so that the same condition is the same."""
    return fx.family.encode_images(fx.pipe, pixels * 2 - 1, None)


def _sd3_latents(fx: Any, control: Any, pixels: Tensor) -> Tensor:
    latents, config = _as_latents(fx, control, pixels), fx.pipe.vae.config
    shifted = control.config.force_zeros_for_pooled_projection  # these were trained without the shift
    return latents + config.shift_factor * config.scaling_factor if shifted and config.shift_factor else latents


def _packed_latents(fx: Any, control: Any, pixels: Tensor) -> Tensor:
    if getattr(control, "input_hint_block", None) is not None:  # reads pixels by a small network of its own
        return pixels
    latents = _as_latents(fx, control, pixels)
    return fx.pipe._pack_latents(latents, *latents.shape)


# ---- residuals ------------------------------------------------------------------------------------------------------


def _unet(denoiser: Any, control: Any, found: Any) -> Residuals:
    down, mid = found
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}


def _sd3(denoiser: Any, control: Any, found: Any) -> Residuals:
    whole, loaded = _depths(denoiser, "transformer_blocks", "num_layers")
    ratio = whole / len(found[0])
    return {"block_controlnet_hidden_states": [found[0][int(i / ratio)] for i in range(loaded)]}


def _sd3_adapt(denoiser: Any, control: Any, call: Mapping[str, Any]) -> Mapping[str, Any]:
    changes: dict[str, Any] = {}
    if control.config.force_zeros_for_pooled_projection:
        changes["pooled_projections"] = torch.zeros_like(call["pooled_projections"])
    if control.context_embedder is None:
        changes["encoder_hidden_states"] = None
    if control.pos_embed is None:
        changes["hidden_states"] = denoiser.pos_embed(call["hidden_states"])
    return changes


def _flux(denoiser: Any, control: Any, found: Any) -> Residuals:
    double, single = found
    repeat = getattr(control, "input_hint_block", None) is not None
    return {
        "controlnet_block_samples": _spread(double, *_depths(denoiser, "transformer_blocks", "num_layers"), repeat),
        "controlnet_single_block_samples": _spread(
            single, *_depths(denoiser, "single_transformer_blocks", "num_single_layers")
        ),
    }


def _flux_adapt(denoiser: Any, control: Any, call: Mapping[str, Any]) -> Mapping[str, Any]:
    if not control.config.guidance_embeds:
        return {"guidance": None}
    ones = torch.ones(len(call["hidden_states"]), device=call["hidden_states"].device)
    return {"guidance": call.get("guidance") if call.get("guidance") is not None else ones}


def _qwen(denoiser: Any, control: Any, found: Any) -> Residuals:
    return {"controlnet_block_samples": _spread(found, *_depths(denoiser, "transformer_blocks", "num_layers"))}


def _depths(denoiser: Any, blocks: str, setting: str) -> tuple[int, int]:
    """How many blocks the whole model has, and how many are loaded."""
    loaded = len(getattr(denoiser, blocks))
    return (loaded if untruncated(denoiser) is None else denoiser.config[setting]), loaded


def _spread(samples: Any, whole: int, loaded: int, repeat: bool = False) -> list[Tensor] | None:
    """One residual for each block that is loaded, as the whole model would share them out.

    A denoiser divides by the number of its blocks, which is wrong for one that was loaded only in part.
    """
    if not samples:
        return None
    every = math.ceil(whole / len(samples))
    return [samples[i % len(samples) if repeat else i // every] for i in range(loaded)]


KINDS: dict[str, Kind] = {
    "UNet2DConditionModel": Kind("ControlNetModel", _as_pixels, _unet),
    "SD3Transformer2DModel": Kind("SD3ControlNetModel", _sd3_latents, _sd3, _sd3_adapt),
    "HunyuanDiT2DModel": Kind(
        "HunyuanDiT2DControlNetModel", _as_latents, lambda d, c, found: {"controlnet_block_samples": list(found[0])}
    ),
    "FluxTransformer2DModel": Kind("FluxControlNetModel", _packed_latents, _flux, _flux_adapt),
    "SanaTransformer2DModel": Kind(
        "SanaControlNetModel", _as_latents, lambda d, c, found: {"controlnet_block_samples": tuple(found[0])}
    ),
    "QwenImageTransformer2DModel": Kind("QwenImageControlNetModel", _packed_latents, _qwen),
}
