"""Attention maps against softmax(QKᵀ·scale + mask) written out in float64, and against what SDPA itself returns."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffusion_features import attention_map as module
from diffusion_features.attention_map import attention_map


def naive(q, k, mask=None, causal=False, scale=None):
    """One head and one query at a time, in float64."""
    q, k = q.double(), k.double()
    out = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            group = h * k.shape[1] // q.shape[1]
            for i in range(q.shape[2]):
                scores = [float(q[b, h, i] @ k[b, group, j]) * (scale or q.shape[3] ** -0.5) for j in range(k.shape[2])]
                for j in range(k.shape[2]):
                    if causal and j > i:
                        scores[j] = -math.inf
                    if mask is not None:
                        m = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])[b, h, i, j]
                        scores[j] = (
                            scores[j] + float(m) if mask.dtype != torch.bool else (scores[j] if m else -math.inf)
                        )
                top = max(scores)
                weights = torch.tensor([math.exp(s - top) for s in scores], dtype=torch.float64)
                out[b, h, i] = weights / weights.sum()
    return out


@pytest.fixture
def qkv():
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 4, n, 6, generator=g) for n in (5, 7, 7))


def masks():
    g = torch.Generator().manual_seed(1)
    keep = torch.rand(2, 1, 1, 7, generator=g) > 0.3
    keep[..., 0] = True
    return {
        "none": None,
        "bool over keys": keep,
        "float over keys": torch.randn(2, 1, 1, 7, generator=g),
        "float per query": torch.randn(2, 4, 5, 7, generator=g),
        "two dimensions": torch.randn(5, 7, generator=g),
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("chunk", [1, 60, 2**22])
def test_equals_the_formula(qkv, name, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    q, k, v = qkv
    found = attention_map(q, k, masks()[name])
    assert torch.allclose(found.double(), naive(q, k, masks()[name]), atol=1e-6)
    assert torch.allclose(found.sum(-1), torch.ones(2, 4, 5), atol=1e-6)
    assert torch.allclose(found @ v, F.scaled_dot_product_attention(q, k, v, masks()[name]), atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 60, 2**22])
def test_causal_scale_and_groups(qkv, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    q, k, _ = qkv
    assert torch.allclose(
        attention_map(q, k, is_causal=True, scale=0.3).double(), naive(q, k, None, True, 0.3), atol=1e-6
    )
    grouped = k[:, :2]
    assert torch.allclose(attention_map(q, grouped, enable_gqa=True).double(), naive(q, grouped), atol=1e-6)


def test_head_mean_is_the_mean_over_heads(qkv):
    q, k, _ = qkv
    found = attention_map(q, k, head_mean=True)
    assert found.shape == (2, 1, 5, 7)
    assert torch.allclose(found[:, 0].double(), naive(q, k).mean(1), atol=1e-6)


def test_gradients_are_those_of_the_formula(qkv):
    q, k = (x.double().requires_grad_() for x in qkv[:2])
    weight = torch.randn(2, 4, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (attention_map(q, k) * weight).sum().backward()
    q2, k2 = (x.detach().clone().requires_grad_() for x in (q, k))
    ((q2 @ k2.mT / math.sqrt(6)).softmax(-1) * weight).sum().backward()
    assert torch.allclose(q.grad, q2.grad, atol=1e-6) and torch.allclose(k.grad, k2.grad, atol=1e-6)


def test_half_precision_is_rounded_once(qkv):
    q, k = (x.half() * 30 for x in qkv[:2])  # scores in the hundreds: rounded to float16 they would be off by 0.1
    found = attention_map(q, k)
    assert found.dtype == torch.float16
    assert torch.allclose(found.double(), naive(q, k), atol=1e-3)
