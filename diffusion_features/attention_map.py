"""Attention probabilities from the very tensors a fused attention kernel is called with."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Scores held at a time: 16 MiB in float32, twice that with their softmax."""


def attention_map(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    head_mean: bool = False,
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

    Returns:
        (B, H, Q, K) in the dtype of ``query``, or (B, 1, Q, K) for the mean over heads. Rows sum to 1.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    batch, heads, queries, _ = query.shape
    keys = key.shape[-2]
    transposed = key.transpose(-2, -1).to(torch.promote_types(key.dtype, torch.float32))
    rows = max(1, CHUNK_ELEMENTS // (batch * heads * keys))
    blocks = _blocks(query, transposed, mask, is_causal, scale, rows)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return torch.cat([_reduce(p, head_mean).to(query.dtype) for _, p in blocks], dim=-2)
    out = query.new_empty(batch, 1 if head_mean else heads, queries, keys)
    for start, probabilities in blocks:
        out[:, :, start : start + rows] = _reduce(probabilities, head_mean)
    return out


def _blocks(
    query: Tensor, transposed_key: Tensor, mask: Tensor | None, is_causal: bool, scale: float, rows: int
) -> Iterator[tuple[int, Tensor]]:
    queries, keys = query.shape[-2], transposed_key.shape[-1]
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        scores = query[..., start:stop, :].to(transposed_key.dtype) @ transposed_key * scale
        if is_causal:
            later = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(1)[start:stop]
            scores = scores.masked_fill(later, -math.inf)
        if mask is not None:
            part = mask[..., start:stop, :] if mask.shape[-2] == queries else mask
            scores = scores.masked_fill(~part, -math.inf) if part.dtype == torch.bool else scores + part
        yield start, scores.softmax(dim=-1)


def _reduce(probabilities: Tensor, head_mean: bool) -> Tensor:
    return probabilities.mean(dim=1, keepdim=True) if head_mean else probabilities
