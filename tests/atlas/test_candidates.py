"""Candidates and the published filter: SDXL's 279 and the 63 of tables 4 and 5 of arXiv 2410.03558."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffusion_features import list_activations
from diffusion_features.activations import Activation
from diffusion_features.atlas import PUBLISHED_SHARE, candidates, place_filter, published_filter
from tests.tiny import sd15_unet


@pytest.fixture(scope="module")
def sdxl() -> list[Activation]:
    """SDXL's blocks; how wide they are does not matter here."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=16,
        )
    return list_activations(unet)


def tables_4_and_5() -> set[str]:
    """The rows of the paper's two tables of SDXL, written out by hand."""
    rows = {"up-level0-upsampler-out"}
    for repeat in range(3):
        for part in ("res-out", "vit-out"):
            rows |= {f"up-level{level}-repeat{repeat}-{part}" for level in (0, 1)}
        for part in ("cross-q", "out"):
            rows |= {f"up-level0-repeat{repeat}-vit-block{block}-{part}" for block in (0, 1, 3, 5, 7, 9)}
            rows |= {f"up-level1-repeat{repeat}-vit-block{block}-{part}" for block in (0, 1)}
    return rows | {"up-level1-repeat2-vit-block0-self-k", "up-level1-repeat2-vit-block1-self-k"}


def test_sdxl_has_279_candidates_and_63_of_them_stay(sdxl):
    found = candidates(sdxl)
    dropped = published_filter(found)
    kept = {a.id for a in found} - dropped.keys()
    assert len(found) == 279
    assert len(kept) == 63
    assert kept == tables_4_and_5()


def test_candidates_as_the_paper_takes_them(sdxl):
    ids = {a.id for a in candidates(sdxl)}
    up = [id for id in ids if id.startswith("up-")]
    assert len(up) == 146  # of the 279, by the released configuration
    assert not any(id.startswith("unet-") or id.endswith(("self-v", "-map", "cross-k")) for id in ids)
    blocks = {id.split("-vit-")[1].split("-")[0] for id in ids if id.startswith("mid-vit-block")}
    assert blocks == {f"block{n}" for n in (0, 1, 3, 5, 7, 9)}


def test_every_reason_names_a_property(sdxl):
    dropped = published_filter(candidates(sdxl))
    assert {reason.split(":")[0] for reason in dropped.values()} == {"noise", "locality"}
    assert dropped["mid-vit-out"].startswith("noise") and "up-stage" in dropped["mid-vit-out"]
    assert dropped["up-level0-repeat0-vit-block0-self-q"].startswith("locality")
    assert dropped["up-level0-repeat0-res-increment"] == "noise: an increment"


def test_the_practical_preset_of_sd15_survives():
    found = candidates(list_activations(sd15_unet()))
    dropped = published_filter(found)
    assert len(found) == 146
    for id in (
        "up-level1-repeat1-vit-block0-cross-q", "up-level1-repeat2-res-out", "up-level2-repeat1-vit-block0-cross-q",
        "up-level3-repeat0-vit-block0-self-k",
    ):  # fmt: skip
        assert id not in dropped
    assert "up-level2-upsampler-out" in dropped and "up-level3-repeat2-vit-out" in dropped  # half of the legacy preset


def test_by_place_alone_only_the_early_half_of_the_up_stage_stays(sdxl):
    """Whatever the kind: of SDXL its up-levels 0 and 1 without the upsampler into level 2, of SD1.5 levels 0 to 2."""
    for found, levels in ((sdxl, (0, 1)), (list_activations(sd15_unet()), (0, 1, 2))):
        chosen = candidates(found)
        kept = {a.id for a in chosen} - place_filter(chosen).keys()
        early = {a.id for a in chosen if a.id.startswith(tuple(f"up-level{level}-" for level in levels))}
        keys = {a.id for a in chosen if a.id.startswith(f"up-level{levels[-1] + 1}-") and a.id.endswith("self-k")}
        assert kept == early - {f"up-level{levels[-1]}-upsampler-out"} | keys
        assert {a.id for a in chosen} - published_filter(chosen).keys() < kept
    assert any(id.endswith("ffn-inner") for id in kept) and any(id.endswith("self-q") for id in kept)
    assert round(PUBLISHED_SHARE * 279) == 63


def test_a_transformer_has_no_up_stage():
    found = [
        Activation(f"vit-block{b}-{part}", "spatial", f"b{b}", "output", 8, 1)
        for b in range(4) for part in ("self-q", "self-k", "self-v", "cross-q", "ffn-inner", "out")
    ]  # fmt: skip
    kept = candidates(found)
    assert place_filter(kept) == {}
    assert {a.id for a in kept} - published_filter(kept).keys() == {
        f"vit-block{b}-{part}" for b in (0, 1, 3) for part in ("cross-q", "out")
    }
