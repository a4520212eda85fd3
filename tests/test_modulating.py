"""Modulated block outputs against the formula in float64, from the weights and what the block is called with."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_features import FeatureExtractor
from tests.tiny import sd15_pipe
from tests.tiny_dits import build

IMAGE = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
PROMPTS = ["a photo of a cat", "a dog"]
DISCARD = (3, 5)


def features(fx: FeatureExtractor, ids: Any, **options: Any) -> dict[str, Tensor]:
    return fx(IMAGE, PROMPTS, t=300, seed=[1, 2], activations=ids, **options)


def linear(layer: Any, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), layer.weight.double(), bias)


def zero_norm(block: Any, call: dict[str, Any], name: str = "temb") -> tuple[Tensor, Tensor]:
    """β and γ of AdaLN-Zero (arXiv 2212.09748), the first two of all it makes."""
    norm = getattr(block, "norm1", None) or block.norm
    beta, gamma = linear(norm.linear, F.silu(call[name].double())).split(norm.norm.normalized_shape[0], -1)[:2]
    return beta, gamma


def single(block: Any, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """β and γ of adaLN-single (arXiv 2310.00426): a table added to what all blocks share."""
    shared = call["timestep"].double().unflatten(-1, (6, -1))
    table = (block.scale_shift_table.double() + shared).unbind(1)
    return table[0], table[1]


def qwen(block: Any, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    beta, gamma = linear(block.img_mod[1], F.silu(call["temb"].double())).chunk(6, -1)[:2]
    return beta, gamma


def global_flux2(block: Any, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Flux.2 computes the modulation once for all blocks of a kind."""
    double = "temb_mod_img" in call
    beta, gamma = call["temb_mod_img" if double else "temb_mod"].double().chunk(6 if double else 3, -1)[:2]
    return beta.flatten(0, -2), gamma.flatten(0, -2)


def rms_lumina(block: Any, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    gamma = linear(block.norm1.linear, F.silu(call["temb"].double())).chunk(4, -1)[0]
    return torch.zeros_like(gamma), gamma


def rms_zimage(block: Any, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    gamma = linear(block.adaLN_modulation[0], call["adaln_input"]).chunk(4, -1)[0]
    return torch.zeros_like(gamma), gamma


FORMULAS = {
    "flux_dev": zero_norm, "sd3": zero_norm, "sd35_medium": zero_norm, "auraflow": zero_norm, "pixart_sigma": single,
    "sana": single, "qwen": qwen, "flux2_klein": global_flux2, "lumina2": rms_lumina, "zimage": rms_zimage,
}  # fmt: skip


def naive(name: str, x: Tensor, block: Any, beta: Tensor, gamma: Tensor) -> Tensor:
    """(B, C, h, w) → (1+γ)·norm(x) + β over the channels of each place, in float64."""
    tokens = x.double().flatten(2).mT
    if name in ("lumina2", "zimage"):
        weight = (block.norm1.norm if name == "lumina2" else block.attention_norm1).weight.double()
        normed = tokens / (tokens.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    else:
        centred = tokens - tokens.mean(-1, keepdim=True)
        eps = 1e-5 if name == "auraflow" else 1e-6
        normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    modulated = normed * (1 + gamma[:, None]) + beta[:, None]
    return modulated.mT.unflatten(2, x.shape[-2:])


def calls_of(fx: FeatureExtractor, names: list[str], ids: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Each named block, and the arguments it was called with, by name."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    handles = []
    for name in names:
        block = fx.denoiser.get_submodule(name)

        def note(module: Any, args: Any, kwargs: Any) -> None:
            calls.append((module, dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)))

        handles.append(block.register_forward_pre_hook(note, with_kwargs=True))
    features(fx, ids)
    for handle in handles:
        handle.remove()
    return calls


@pytest.fixture(scope="module", params=FORMULAS)
def made(request: pytest.FixtureRequest) -> tuple[str, FeatureExtractor]:
    return request.param, FeatureExtractor.from_pipe(build(request.param), "*-out")


def test_modulated_outputs_are_the_formula(made: tuple[str, FeatureExtractor]) -> None:
    name, fx = made
    outputs = [a for a in fx.available if re.fullmatch(r"vit-block\d+-out", a.id)]
    ids = [a.id for a in outputs]
    plain = features(fx, ids)
    blocks = [a.module for a in outputs[1:]]
    calls = calls_of(fx, blocks, ids)
    for discard in ((), DISCARD):
        modulated = features(fx, ids[:-1], modulate=True, discard=discard)
        assert list(modulated) == ids[:-1]
        for id, (block, call) in zip(ids[:-1], calls, strict=True):
            x = plain[id].clone()
            x[:, list(discard)] = 0
            expected = naive(name, x, block, *FORMULAS[name](block, call))
            assert torch.allclose(modulated[id].double(), expected, atol=2e-5, rtol=1e-4), (id, discard)
            assert not torch.allclose(modulated[id], plain[id], atol=1e-2)


def test_others_stay_as_they_are(made: tuple[str, FeatureExtractor]) -> None:
    _, fx = made
    query = next(a.id for a in fx.available if a.id in ("vit-block1-q", "vit-block1-self-q"))
    ids = ["vit-block0-out", query, "vit-block2-out"]
    plain = features(fx, ids)
    discarded = features(fx, ids, discard=DISCARD)
    for id in (ids[0], ids[2]):
        assert not discarded[id][:, list(DISCARD)].any()
        kept = [c for c in range(plain[id].shape[1]) if c not in DISCARD]
        assert torch.equal(discarded[id][:, kept], plain[id][:, kept])
    assert torch.equal(discarded[query], plain[query])
    modulated = features(fx, ids[:2], modulate=True, discard=DISCARD)
    assert torch.equal(modulated[query], plain[query])
    assert all(torch.equal(features(fx, ids)[id], plain[id]) for id in ids)  # the model is as before


def test_fused_projections() -> None:
    pipe = build("flux_dev")
    fx = FeatureExtractor.from_pipe(pipe, "vit-block0-out")
    expected = features(fx, "vit-block0-out", modulate=True)["vit-block0-out"]
    pipe.transformer.fuse_qkv_projections()
    found = features(fx, "vit-block0-out", modulate=True)["vit-block0-out"]
    assert torch.allclose(found, expected, atol=1e-6)


def test_where_they_make_no_sense() -> None:
    fx = FeatureExtractor.from_pipe(build("flux_dev"), "vit-block0-out")
    for options, message in (
        (dict(ids="vit-block0-q", modulate=True), "for block outputs of transformers"),
        (dict(ids="vit-block0-attn-out", discard=[0]), "for block outputs of transformers"),
        (dict(ids="vit-block3-out", modulate=True), "vit-block3-out is the last block's output"),
        (dict(ids="vit-block0-out", discard=[32]), "no channel 32 to discard: they are 0 to 31"),
        (dict(ids="vit-block0-out", discard=[-1]), "no channel -1"),
    ):
        with pytest.raises(ValueError, match=message):
            features(fx, **options)
    unet = FeatureExtractor.from_pipe(sd15_pipe(), "practical")
    with pytest.raises(ValueError, match="for block outputs of transformers"):
        unet(IMAGE, modulate=True)
    hunyuan = FeatureExtractor.from_pipe(build("hunyuan"), "vit-block0-out")
    with pytest.raises(ValueError, match="adaptive layer norm; HunyuanDiT2DModel has others"):
        features(hunyuan, "vit-block0-out", modulate=True)
    assert not features(hunyuan, "vit-block0-out", discard=[1])["vit-block0-out"][:, 1].any()


def test_block_that_reads_must_be_loaded(tmp_path: Any) -> None:
    build("flux_dev").save_pretrained(tmp_path)
    fx = FeatureExtractor.from_pretrained(tmp_path, "vit-block1-out", device="cpu")
    with pytest.raises(ValueError, match=r"vit-block1-out is modulated by .*: name vit-block2-q among the activations"):
        features(fx, "vit-block1-out", modulate=True)
    enough = FeatureExtractor.from_pretrained(tmp_path, ["vit-block1-out", "vit-block2-q"], device="cpu")
    found = features(enough, "vit-block1-out", modulate=True)["vit-block1-out"]
    whole = FeatureExtractor.from_pretrained(tmp_path, "*", device="cpu")
    assert torch.equal(found, features(whole, "vit-block1-out", modulate=True)["vit-block1-out"])
