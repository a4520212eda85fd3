"""Captions that some resolutions do not hear: the same as an empty caption there, and as any other where all hear."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Generator

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
listening = pytest.importorskip("listening", reason="the training scripts are not part of an installed package")
noising = pytest.importorskip("noising")

from diffusers import UNet2DConditionModel  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

BEGIN, END = 1, 2


@pytest.fixture(scope="module")
def module() -> torch.nn.Module:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2,
    )  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=BEGIN, eos_token_id=END, pad_token_id=END,
    ))  # fmt: skip
    return noising.Denoising(unet, text)


def batch(words: list[list[int]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[BEGIN, *row, *[END] * (7 - len(row))] for row in words])
    x = torch.randn(len(words), 4, 8, 8, generator=Generator().manual_seed(1))
    return noising.noised(x, ids, Generator().manual_seed(2)) | {"silent": ids == END}


def plain(module: torch.nn.Module, **values: torch.Tensor) -> float:
    return module(**values)["plain"].item()


def test_layers_are_grouped_by_resolution(module):
    groups = listening.resolutions(module.unet)
    names = {layer: name for name, layer in module.unet.named_modules()}
    found = [[names[layer].partition(".attentions")[0] for layer in group] for group in groups]
    assert found == [
        ["down_blocks.0", "up_blocks.2", "up_blocks.2"],
        ["down_blocks.1", "mid_block", "up_blocks.1", "up_blocks.1"],
    ]


def test_where_all_hear_nothing_changes(module):
    data = batch([[5, 6, 7], [8]])
    assert plain(module, **data, heard=torch.ones(2, 2, dtype=torch.bool)) == plain(module, **data)


def test_where_none_hears_the_caption_is_empty(module):
    data, empty = batch([[5, 6, 7], [8]]), batch([[], []])
    deaf = plain(module, **data, heard=torch.zeros(2, 2, dtype=torch.bool))
    assert deaf == pytest.approx(plain(module, **empty), abs=1e-6)
    assert deaf != pytest.approx(plain(module, **data), abs=1e-6)


def test_each_scene_has_its_own_listeners_and_no_hook_stays(module):
    data = batch([[5, 6, 7], [8]])
    heard = torch.tensor([[True, False], [False, True]])
    together = plain(module, **data, heard=heard)
    each = [
        plain(module, **{name: value[i : i + 1] for name, value in data.items()}, heard=heard[i : i + 1])
        for i in range(2)
    ]
    assert together == pytest.approx(sum(each) / 2, abs=1e-6)
    assert not any(layer._forward_pre_hooks for group in listening.resolutions(module.unet) for layer in group)


def test_what_is_drawn():
    heard = listening.drawn(6000, 3, Generator().manual_seed(0))
    assert set(heard.sum(1).tolist()) == {1, 3}
    alone = heard[heard.sum(1) == 1]
    assert len(alone) / 6000 == pytest.approx(listening.ALONE, abs=0.03)
    assert alone.float().mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.03)
    assert torch.equal(heard, listening.drawn(6000, 3, Generator().manual_seed(0)))
