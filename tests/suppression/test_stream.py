"""Streamed activations under techniques are those of a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffusion_features.suppression import CFG, ControlNet, Denoise, FineGrainedPrompt, LoRA
from tests.suppression.models import control, extractor, photo, save_lora
from tests.suppression.traces import left_behind, same, snapshot


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_streaming_under_techniques_gives_what_a_call_gives(name: str, tmp_path: Path) -> None:
    fx = extractor(name)
    before = snapshot(fx)
    techniques = [
        ControlNet(control(fx)), LoRA(save_lora(fx, tmp_path, text=True)), FineGrainedPrompt("{prompt}, the red"),
        Denoise(20, 2), CFG(3.0, "a dog"),
    ]  # fmt: skip
    seen: list[str] = []

    def keep(id: str, tensor: Any) -> Any:
        seen.append(id)
        return tensor.clone()

    expected = fx(photo(), "a cat", t=100, seed=2, suppress=techniques)
    found = fx.stream(photo(), keep, "a cat", t=100, seed=2, suppress=techniques)
    assert same(found, expected) and sorted(seen) == sorted(expected)  # once each: not at the steps down to t
    for left_out in range(len(techniques)):
        fewer = [t for i, t in enumerate(techniques) if i != left_out]
        if not isinstance(techniques[left_out], Denoise):  # guidance is about its steps
            assert not same(fx.stream(photo(), keep, "a cat", t=100, seed=2, suppress=fewer), expected)
    assert left_behind(before, snapshot(fx)) == []


def test_a_technique_that_would_do_nothing_is_refused_there_too() -> None:
    with pytest.raises(ValueError, match="Add Denoise"):
        extractor("unet").stream(photo(), lambda id, tensor: tensor, suppress=CFG())
