"""Head-wise aggregation: one map of a layer, each head weighted by how much it contributes to the layer's output.

Equations: "Making Training-Free Diffusion Segmentors Scale with the Generative Power" (arXiv 2603.06178), and for the
alternatives its released code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diffusion_features import LazyMap

Heads: TypeAlias = Literal["dot", "dot-clamped", "cosine", "l2", "dot-spectral", "cosine-spectral", "average"]
Projection: TypeAlias = Callable[[Tensor], Tensor]

BLOCK_ELEMENTS = 2**22
"""Probabilities held at a time: 16 MiB in float32."""


def head_weights(output: Tensor, project: Projection, how: Heads = "dot", value: Tensor | None = None) -> Tensor:
    """How much each head counts at each pixel; the weights of a pixel sum to 1.

    With ``O_h(p) = [A_h V_h](p) W_h``, where ``W_h`` are the head's rows of the output projection, and
    ``O = Σ_h O_h`` (no bias), before normalisation over heads:

    - ``dot``: ``w_h(p) = ⟨O_h(p), O(p)⟩``, whose sum over heads is ``‖O(p)‖²``; a weight may be negative
    - ``dot-clamped``: ``max(0, ⟨O_h, O⟩)``
    - ``cosine``: ``⟨O_h, O⟩ / (‖O_h‖ ‖O‖)``
    - ``l2``: ``‖O_h‖``
    - ``dot-spectral``, ``cosine-spectral``: times ``‖V_h W_h‖₂``, the largest singular value
    - ``average``: 1

    Where the sum over heads vanishes, a pixel's heads count equally.

    Args:
        output: (B, H, P, d), ``A_h V_h`` of the image tokens.
        project: the output projection, (B, P, H·d) → (B, P, C), linear up to a bias; quantised or with a LoRA too.
        value: (B, H, K, d), for the spectral variants.

    Returns:
        float32 (B, H, P).

    Raises:
        ValueError: ``how`` is none of these.
    """
    if how == "average":
        return torch.full(output.shape[:3], 1 / output.shape[1], dtype=torch.float32, device=output.device)
    if how == "l2":
        return _normalised(_norms(output, project))
    if how not in ("dot", "dot-clamped", "cosine", "dot-spectral", "cosine-spectral"):
        raise ValueError(f"head weights are {', '.join(Heads.__args__)}, not {how!r}")  # type: ignore[attr-defined]
    raw = _dots(output, project)
    if how == "dot-clamped":
        raw = raw.clamp(min=0)
    if how.startswith("cosine"):  # ‖O‖ is the same for all heads of a pixel and cancels
        norms = _norms(output, project)
        raw = torch.where(norms > 0, raw / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0)
    if how.endswith("spectral"):
        assert value is not None, "the spectral variants need the layer's values"
        raw = raw * _spectral(value, project)[..., None]
    return _normalised(raw)


def aggregate_heads(lazy: LazyMap, weights: Tensor | None = None) -> Tensor:
    """``Ā(p, q) = Σ_h w_h(p) A_h(p, q)``, a block of pixels at a time.

    Args:
        weights: (B, H, P); ``None`` averages the heads.

    Returns:
        float32 (B, P, columns).
    """
    batch, heads, pixels, _ = lazy.query.shape
    step = max(1, BLOCK_ELEMENTS // (batch * heads * lazy.key.shape[-2]))
    blocks = []
    for start in range(0, pixels, step):
        part = slice(start, start + step)
        rows = lazy.rows(part, head_mean=weights is None).float()
        blocks.append(rows[:, 0] if weights is None else torch.einsum("bhp,bhpk->bpk", weights[..., part], rows))
    return torch.cat(blocks, dim=1)


def _dots(output: Tensor, project: Projection) -> Tensor:
    """``⟨O_h, O⟩ = o_h · (W_hᵀ O)`` for all heads, by one vector-Jacobian product of the projection: (B, H, P)."""
    merged = _merge(output)
    with torch.inference_mode(False), torch.enable_grad():
        # a tensor that was made in inference mode has no gradient, but its copy may
        leaf = (merged.clone() if merged.is_inference() else merged.detach()).requires_grad_()
        projected = project(leaf)
        total = projected.detach() - _bias(merged, project)
        (back,) = torch.autograd.grad(projected, leaf, total)
    products = merged.float() * back.float()
    return products.unflatten(-1, (output.shape[1], output.shape[3])).sum(-1).transpose(1, 2)


def _norms(output: Tensor, project: Projection) -> Tensor:
    """``‖O_h(p)‖``: (B, H, P)."""
    return torch.stack([out.float().norm(dim=-1) for out in _each_head(output, project)], dim=1)


def _spectral(value: Tensor, project: Projection) -> Tensor:
    """``‖V_h W_h‖₂``: (B, H)."""
    return torch.stack([torch.linalg.matrix_norm(v.float(), ord=2) for v in _each_head(value, project)], dim=1)


def _each_head(tensor: Tensor, project: Projection) -> Iterator[Tensor]:
    """What each head alone contributes to the projection, (B, n, C), one at a time."""
    bias = _bias(_merge(tensor[:, :, :1]), project)
    for head in range(tensor.shape[1]):
        alone = torch.zeros_like(tensor)
        alone[:, head] = tensor[:, head]
        yield project(_merge(alone)) - bias


def _merge(tensor: Tensor) -> Tensor:
    """(B, H, n, d) → (B, n, H·d)."""
    return tensor.transpose(1, 2).flatten(2)


def _bias(merged: Tensor, project: Projection) -> Tensor:
    return project(torch.zeros_like(merged[:1, :1])).detach()


def _normalised(raw: Tensor) -> Tensor:
    total = raw.sum(dim=1, keepdim=True)
    size = raw.abs().sum(dim=1, keepdim=True)
    sound = total.abs() > 1e-6 * size
    return torch.where(sound, raw / torch.where(sound, total, 1), 1 / raw.shape[1])
