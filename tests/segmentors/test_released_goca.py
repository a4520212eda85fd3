"""Equal to what the released code of arXiv 2603.06178 gave on a small Stable Diffusion 1.5."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffusion_features import capture, list_activations
from segmentors.training_free.aggregation import Aggregator, output_projection
from segmentors.training_free.refinement import refine
from segmentors.training_free.rescaling import entity_maps
from tests.released import sd15

RELEASED = json.loads((Path(__file__).parents[1] / "data" / "released_goca.json").read_text())
INPUTS, OUTPUTS = RELEASED["inputs"], RELEASED["outputs"]
HEADS = {"average": "average", "dot-product w/o clamp": "dot"}
LAYERS = {"vanilla": "equal", "dot-product similarity": "dot"}
RESCALES = {"per-token renorm+": "none", "sum-1 rescaling + per-token renorm+": "sum"}


def aggregated(heads: str, layers: str, *, as_released: bool = True) -> Aggregator:
    unet, call = sd15()
    found = {a.id: a for a in list_activations(unet)}
    aggregator = Aggregator(
        {id: output_projection(unet, found[id]) for id in INPUTS["cross_layers"]},
        INPUTS["ref"], INPUTS["self_layers"], (INPUTS["size"],) * 2,
        heads=heads, layers=layers, as_released=as_released,
    )  # fmt: skip
    with torch.no_grad(), capture(unet, aggregator.wanted, reduce=aggregator):
        unet(**call)
    return aggregator


def released_maps(aggregator: Aggregator, rescale: str) -> torch.Tensor:
    entities = [*INPUTS["objects"].values(), *INPUTS["background"]]
    return entity_maps(aggregator.tokens()[0], entities, INPUTS["content"], rescale)


@pytest.mark.parametrize("key", [key for key in OUTPUTS if "|" in key])
def test_maps_are_those_released(key: str) -> None:
    heads, layers, rescale = key.split("|")
    found = released_maps(aggregated(HEADS[heads], LAYERS[layers]), RESCALES[rescale])
    # theirs came from maps stored in float16, which alone moves them by up to 6e-4
    assert found.flatten().tolist() == pytest.approx(OUTPUTS[key], abs=1e-3)


def test_refinement_uses_the_released_affinity() -> None:
    """S itself, got by refining unit maps, against the released S: its row sums and every 1111th entry."""
    layers = aggregated("average", "equal").refiners
    first = [layer.__class__(layer.query[:1], layer.key[:1], None, layer.scale, layer.columns, layer.grid)
             for layer in layers.values()]  # fmt: skip
    units = torch.eye(INPUTS["size"] ** 2).unflatten(1, (INPUTS["size"],) * 2)
    s = refine(units[None], first, 1)[0].flatten(1).T
    assert s.sum(1).mean().item() == pytest.approx(OUTPUTS["refine_S_rowsum"], abs=1e-5)
    assert s.flatten()[::1111].tolist() == pytest.approx(OUTPUTS["refine_S_probe"], abs=2e-6)


def test_all_channels_and_renormalised_rows_are_something_else() -> None:
    key = "dot-product w/o clamp|dot-product similarity|sum-1 rescaling + per-token renorm+"
    found = released_maps(aggregated("dot", "dot", as_released=False), "sum")
    assert (found.flatten() - torch.tensor(OUTPUTS[key])).abs().max() > 5e-3
