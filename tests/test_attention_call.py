"""Maps that are not made: against softmax(QKᵀ·scale + bias) in float64, and against the maps that capture makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusion_features import AttentionCall, LazyMap, capture
from tests import tiny_dits
from tests.released import sd15, seeded


def lazy_map(columns: slice | Tensor = slice(None), bias: Tensor | None = None, keys: int = 12) -> LazyMap:
    return LazyMap(seeded("q", 2, 3, 8, 5), seeded("k", 2, 3, keys, 5), bias, 0.4, columns, (2, 4))


def naive(lazy: LazyMap) -> Tensor:
    scores = lazy.query.double() @ lazy.key.double().mT * lazy.scale
    return (scores + (0 if lazy.bias is None else lazy.bias.double())).softmax(-1)


BIAS = torch.zeros(2, 1, 1, 12).masked_fill(torch.arange(12) > 9, -torch.inf)
COLUMNS = {
    "all": slice(None),
    "image first": slice(0, 7),
    "text first": slice(5, None),
    "each its own": torch.tensor([[1, 2, 3], [0, 5, 6]]),
    "one shorter": torch.tensor([[0, 1, -1], [0, 5, 6]]),
}


@pytest.mark.parametrize("bias", [None, BIAS, seeded("b", 2, 3, 8, 12)], ids=["none", "keys", "pairs"])
@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
def test_rows_and_products_are_those_of_the_map(columns: slice | Tensor, bias: Tensor | None) -> None:
    lazy = lazy_map(columns, bias)
    whole = naive(lazy)
    if isinstance(columns, slice):
        part = whole[..., columns]
    else:
        part = torch.stack([whole[b][..., columns[b]] * (columns[b] >= 0) for b in range(2)])
    assert torch.allclose(lazy.rows().double(), part, atol=1e-6)
    assert torch.allclose(lazy.rows(slice(2, 5), head_mean=True).double(), part[:, :, 2:5].mean(1, True), atol=1e-6)
    for count in (1, 5, 13):  # fewer, as many and more maps than a head is wide
        maps = seeded("m", 2, part.shape[-1], count)
        assert torch.allclose(lazy.apply(maps).double(), (part @ maps.double()[:, None]).mean(1), atol=1e-6)


def test_apply_in_half_precision_adds_up_in_float32() -> None:
    lazy = lazy_map()
    half = LazyMap(lazy.query.half(), lazy.key.half(), None, lazy.scale, lazy.columns, lazy.grid)
    out = half.apply(torch.ones(2, 12, 1))
    assert out.dtype == torch.float32 and torch.allclose(out, torch.ones(2, 8, 1), atol=2e-3)


def calls_and_maps(denoiser, call, ids):
    calls: dict[str, AttentionCall] = {}

    def keep(id: str, found: AttentionCall) -> int:
        calls[id] = found
        return 7

    with torch.no_grad():
        with capture(denoiser, ids) as maps:
            denoiser(**call)
        with capture(denoiser, ids, reduce=keep) as kept:
            denoiser(**call)
    assert set(kept) == set(maps) and set(kept.values()) == {7}
    return calls, maps


def test_calls_of_a_unet() -> None:
    unet, call = sd15()
    ids = ["up-level1-*-cross-map", "mid-vit-block0-self-map", "mid-vit-block0-cross-q"]
    calls, maps = calls_and_maps(unet, call, ids)
    assert torch.equal(calls.pop("mid-vit-block0-cross-q"), maps.pop("mid-vit-block0-cross-q"))
    for id, found in calls.items():
        assert torch.allclose(found.map.rows(), maps[id], atol=1e-6)
        assert torch.allclose(found.output, maps[id] @ found.value, atol=1e-5)
        assert found.map.grid[0] * found.map.grid[1] == maps[id].shape[-2]
        assert found.module.to_out[0].in_features == found.output.shape[1] * found.output.shape[3]


def flux():
    transformer = tiny_dits.build("flux_dev").transformer.eval()
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(6.0))
    call = dict(
        hidden_states=seeded("x", 2, 24, transformer.config.in_channels),
        encoder_hidden_states=seeded("c", 2, 9, transformer.config.joint_attention_dim),
        pooled_projections=seeded("p", 2, transformer.config.pooled_projection_dim),
        timestep=torch.tensor([0.4, 0.4]), img_ids=ids, txt_ids=torch.zeros(9, 3), guidance=torch.ones(2),
    )  # fmt: skip
    return transformer, call


def sd3():
    transformer = tiny_dits.build("sd3").transformer.eval()
    call = dict(
        hidden_states=seeded("x", 2, 16, 8, 12),
        timestep=torch.tensor([400.0, 400.0]),
        encoder_hidden_states=seeded("c", 2, 9, transformer.config.joint_attention_dim),
        pooled_projections=seeded("p", 2, transformer.config.pooled_projection_dim),
    )
    return transformer, call


@pytest.mark.parametrize("model", [flux, sd3], ids=["text first", "image first"])
def test_calls_of_joint_attention_are_cut_to_their_map(model) -> None:
    transformer, call = model()
    calls, maps = calls_and_maps(transformer, call, ["vit-block*-cross-map", "vit-block*-self-map"])
    assert len(calls) >= 6
    for id, found in calls.items():
        rows = found.map.rows()
        assert rows.shape == maps[id].shape and torch.allclose(rows, maps[id], atol=1e-6)
        assert found.map.grid == (4, 6) and found.output.shape[2] == 24
        own, text = (maps[id.replace("cross-map", "self-map")], maps[id.replace("self-map", "cross-map")])
        both = [text, own] if model is flux else [own, text]
        assert torch.allclose(found.output, torch.cat(both, dim=-1) @ found.value, atol=1e-5)


def test_reducing_stops_early_and_leaves_the_model_as_it_was() -> None:
    unet, call = sd15()
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())
    reached: list[str] = []
    end = unet.up_blocks[1].register_forward_hook(lambda *_: reached.append("behind"))
    with torch.no_grad(), capture(unet, "mid-vit-block0-cross-map", stop_early=True, reduce=lambda *_: None) as kept:
        unet(**call)
        reached.append("never")
    end.remove()
    assert reached == [] and kept == {"mid-vit-block0-cross-map": None}
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())
    assert all(torch.equal(before[name], weight) for name, weight in unet.state_dict().items())


def test_an_error_in_the_reducer_comes_through() -> None:
    unet, call = sd15()

    def fail(id: str, found: object) -> None:
        raise ZeroDivisionError(id)

    with pytest.raises(ZeroDivisionError, match="mid-vit"):
        with torch.no_grad(), capture(unet, "mid-vit-block0-cross-map", reduce=fail):
            unet(**call)
    with torch.no_grad():
        unet(**call)
