"""Attention probabilities from the very tensors a fused attention kernel is called with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Scores held at a time: 16 MiB in float32, twice that with their softmax."""
CACHED_ELEMENTS, CACHED_ROWS = 2**20, 32
"""On a CPU: as many as its caches hold, but so many rows at least, since all keys are read again for each block."""


def attention_map(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    head_mean: bool = False,
    rows: slice | Tensor = slice(None),
    columns: slice | Tensor = slice(None),
) -> Tensor:
    """``A = softmax(Q Kᵀ · scale + mask)``, the probabilities inside ``scaled_dot_product_attention``.

    Scores and their softmax are made in float32 (or more) for a block of query rows at a time, so the memory in use is
    the result and a few dozen MiB.

    Args:
        query: (B, H, Q, d), after head split, normalisation and rotary embedding.
        key: (B, H or groups of it, K, d).
        mask: broadcastable to (B, H, Q, K); boolean (true takes part) or added to the scores.
        is_causal: query i sees keys up to i.
        scale: ``1/√d`` if not given.
        enable_gqa: each key head serves several query heads.
        head_mean: return the mean over heads.
        rows, columns: queries and keys to return, as ``take`` reads them; the softmax is over all keys all the same.

    Returns:
        (B, H, Q, K) in the dtype of ``query``, or (B, 1, Q, K) for the mean over heads. Whole rows sum to 1.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    absent = (rows < 0)[:, None, :, None].to(query.device) if isinstance(rows, Tensor) else None
    mask = as_bias(mask, query, key, is_causal)
    if mask is not None and mask.shape[-2] == query.shape[-2]:
        mask = take(mask[(None,) * (4 - mask.ndim)], rows, -2)
    query = take(query, rows, -2)
    batch, heads, queries, _ = query.shape
    row = batch * heads * key.shape[-2]
    elements = max(CACHED_ELEMENTS, CACHED_ROWS * row) if query.device.type == "cpu" else CHUNK_ELEMENTS
    step = max(1, min(elements, CHUNK_ELEMENTS) // row)
    transposed = key.transpose(-2, -1).to(torch.promote_types(key.dtype, torch.float32))

    def block(start: int) -> Tensor:
        scaled = query[..., start : start + step, :].to(transposed.dtype) * scale  # far fewer numbers than the scores
        scores = scaled @ transposed
        if mask is not None:
            scores = scores + (mask[..., start : start + step, :] if mask.shape[-2] == queries else mask)
        part = take(scores.softmax(dim=-1), columns, -1)
        if absent is not None:
            part = part.masked_fill(absent[:, :, start : start + step], 0)
        return (part.mean(dim=1, keepdim=True) if head_mean else part).to(query.dtype)

    starts = range(0, queries, step)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return torch.cat([block(start) for start in starts], dim=-2)
    keys = columns.shape[1] if isinstance(columns, Tensor) else len(range(key.shape[-2])[columns])
    out = query.new_empty(batch, 1 if head_mean else heads, queries, keys)
    for start in starts:
        out[:, :, start : start + step] = block(start)
    return out


def take(tensor: Tensor, positions: slice | Tensor, dim: int) -> Tensor:
    """Some positions of a batch (B, ...) along its last or last but one ``dim``: one slice for all, or an index (B, n)
    with a row for each sample, of which a -1 yields zeros."""
    if isinstance(positions, slice):
        return tensor[..., positions] if dim == -1 else tensor[..., positions, :]
    shape = [1] * tensor.ndim
    shape[0], shape[dim] = positions.shape
    index = positions.to(tensor.device).view(shape)
    return torch.take_along_dim(tensor, index.clamp(min=0), dim).masked_fill(index < 0, 0)


def as_bias(mask: Tensor | None, query: Tensor, key: Tensor, is_causal: bool) -> Tensor | None:
    """What to add to the scores: a boolean mask, or causality, becomes 0 where a key takes part and -∞ elsewhere."""
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill(~mask, -math.inf)
