"""One attention call of a running model, kept as what its map would be made from instead of as the map."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_map import as_bias, attention_map, take


@dataclass(frozen=True)
class LazyMap:
    """An attention map ``A = softmax(Q Kᵀ·scale + bias)``, of which only what is asked for is made.

    Attributes:
        query: (B, H, Q, d), the rows of the map.
        key: (B, H, K, d), everything the softmax is over.
        bias: what is added to the scores, broadcastable to (B, H, Q, K), or nothing.
        scale: of the scores.
        columns: which keys are the map's columns: a slice, or an index (B, n), whose -1 stand for columns of zeros.
        grid: (h, w) of the image tokens of this layer, row-major.
    """

    query: Tensor
    key: Tensor
    bias: Tensor | None
    scale: float
    columns: slice | Tensor
    grid: tuple[int, int]

    def rows(self, which: slice | Tensor = slice(None), *, head_mean: bool = False) -> Tensor:
        """Some rows of the map: (B, H, n, columns), or (B, 1, n, columns) for the mean over heads.

        Args:
            which: a slice, or an index (B, n) with a row for each sample.
        """
        return attention_map(
            self.query, self.key, self.bias, scale=self.scale, head_mean=head_mean, rows=which, columns=self.columns
        )

    def of(self, image: int) -> LazyMap:
        """The map of one image of the batch, in float32 or more."""
        one = slice(image, image + 1)
        bias = self.bias if self.bias is None or len(self.bias) == 1 else self.bias[one]
        columns = self.columns if isinstance(self.columns, slice) else self.columns[one]
        exact = torch.promote_types(self.query.dtype, torch.float32)
        return replace(self, query=self.query[one].to(exact), key=self.key[one], bias=bias, columns=columns)

    def apply(self, maps: Tensor) -> Tensor:
        """``mean_h A_h M``, by attention itself with ``M`` as its value: no map is made.

        Args:
            maps: M, (B, columns, n) of any float dtype.

        Returns:
            (B, Q, n), float32 or more.
        """
        width = self.query.shape[-1]  # with another width of the values, SDPA leaves its fused kernels
        parts = [self._attend(part, width) for part in maps.split(width, dim=-1)]
        return torch.cat(parts, dim=-1)

    def _attend(self, maps: Tensor, width: int) -> Tensor:
        values = F.pad(self._among_all_keys(maps.to(self.query.dtype)), (0, width - maps.shape[-1]))
        out = F.scaled_dot_product_attention(
            self.query, self.key, values[:, None].expand(-1, self.key.shape[1], -1, -1), self.bias, scale=self.scale
        )
        exact = torch.promote_types(out.dtype, torch.float32)
        return out[..., : maps.shape[-1]].to(exact).mean(dim=1)

    def _among_all_keys(self, maps: Tensor) -> Tensor:
        """M with a row for every key: zero where a key is no column of the map."""
        if self.columns == slice(None):
            return maps
        rows = maps.new_zeros(maps.shape[0], self.key.shape[-2], maps.shape[-1])
        if isinstance(self.columns, slice):
            rows[:, self.columns] = maps
            return rows
        index = self.columns.to(maps.device)[..., None].expand_as(maps)
        return rows.scatter_add_(1, index.clamp(min=0), maps.masked_fill(index < 0, 0))


@dataclass(frozen=True)
class AttentionCall:
    """What an attention layer asked of ``scaled_dot_product_attention`` on behalf of one map, and what it got.

    Attributes:
        map: the map, not made.
        value: (B, H, K, d).
        output: (B, H, Q, d), before the output projection; the rows are those of the map.
        module: the attention layer.
    """

    map: LazyMap
    value: Tensor
    output: Tensor
    module: nn.Module


def attention_call(
    module: nn.Module,
    rows: slice | Tensor,
    columns: slice | Tensor,
    grid: tuple[int, int],
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """The call of ``scaled_dot_product_attention`` with these arguments and this ``output``, for the map of some rows
    (queries) and columns (keys)."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, dim=-3), value.repeat_interleave(groups, dim=-3)
    bias = as_bias(attn_mask, query, key, is_causal)
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
        bias = take(bias, rows, -2) if bias.shape[-2] == query.shape[-2] else bias
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return AttentionCall(
        LazyMap(take(query, rows, -2), key, bias, scale, columns, grid), value, take(output, rows, -2), module
    )
