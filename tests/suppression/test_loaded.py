"""What stays loaded from call to call, and that nothing of it stays afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffusion_features import FeatureExtractor
from diffusion_features.suppression import FineGrainedPrompt, IPAdapter, LoRA, loaded
from tests.suppression.models import extractor, photo, save_ip_adapter, save_lora
from tests.suppression.traces import left_behind, same, snapshot


def counted(fx: FeatureExtractor) -> list[str]:
    """The files that the pipeline loads LoRAs from, as it does."""
    files: list[str] = []
    load = fx.pipe.load_lora_weights

    def counting(*args: Any, **kwargs: Any) -> None:
        files.append(kwargs["weight_name"])
        load(*args, **kwargs)

    fx.pipe.load_lora_weights = counting
    return files


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_calls_give_the_same_inside_as_outside_and_load_once(name: str, tmp_path: Path) -> None:
    fx = extractor(name)
    a, b = save_lora(fx, tmp_path, "a", text=True), save_lora(fx, tmp_path, "b", seed=1)
    before = snapshot(fx)
    calls: list[Any] = [
        [],
        LoRA(a, 0.5),
        [LoRA(b), LoRA(a)],
        [LoRA(a, 0.2), LoRA(a, 0.3)],
        {"type": "LoRA", "source": str(b)},
    ]
    expected = [fx(photo(), "a cat", suppress=one) for one in calls]
    assert not any(same(expected[0], one) for one in expected[1:])
    files = counted(fx)
    with loaded(fx, [LoRA(a), LoRA(b, 0.1)]):
        for call, features in zip(calls, expected, strict=True):
            assert same(fx(photo(), "a cat", suppress=call), features)
        assert same(fx(photo(), "a cat"), expected[0])
        assert files == ["a.safetensors", "b.safetensors", "a.safetensors"]  # the last for the call that names it twice
    assert left_behind(before, snapshot(fx)) == []
    assert same(fx(photo(), "a cat", suppress=calls[1]), expected[1]) and len(files) == 4


def test_contexts_may_end_in_any_order(tmp_path: Path) -> None:
    fx = extractor("unet")
    a, b = (LoRA(save_lora(fx, tmp_path, n, seed=s)) for s, n in enumerate("ab"))
    before, under_b = snapshot(fx), fx(photo(), suppress=b)
    first, second = loaded(fx, a), loaded(fx, b)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert same(fx(photo(), suppress=b), under_b)
    second.__exit__(None, None, None)
    assert left_behind(before, snapshot(fx)) == []


def test_nothing_stays_when_one_of_them_cannot_be_loaded_or_the_body_fails(tmp_path: Path) -> None:
    fx = extractor("unet")
    good, before = LoRA(save_lora(fx, tmp_path)), snapshot(fx)
    other = LoRA(save_lora(extractor("sd3"), tmp_path, "sd3"))
    with pytest.raises(ValueError, match=r"made for another model|does not fit"):
        with loaded(fx, [good, other]):
            raise AssertionError("not reached")
    with pytest.raises(ZeroDivisionError):
        with loaded(fx, [good, FineGrainedPrompt("a dog")]):
            fx(photo(), suppress=good)
            raise ZeroDivisionError
    assert left_behind(before, snapshot(fx)) == []


def test_adapters_of_the_caller_that_are_off_stay_off_and_fused_ones_are_refused(tmp_path: Path) -> None:
    fx = extractor("unet")
    own, other = save_lora(fx, tmp_path, "own"), LoRA(save_lora(fx, tmp_path, "other", seed=1))
    alone, base = fx(photo(), suppress=other), fx(photo())
    fx.pipe.load_lora_weights(tmp_path, weight_name=own.name, adapter_name="mine")
    fx.pipe.disable_lora()
    assert same(fx(photo()), base)
    for id, feature in fx(photo(), suppress=other).items():
        assert feature.allclose(alone[id], rtol=1e-4, atol=1e-5)
    assert same(fx(photo()), base)
    fx.pipe.enable_lora()
    fx.pipe.fuse_lora()
    fused = fx(photo())
    with pytest.raises(ValueError, match=r"fused into its weights: call pipe\.unfuse_lora"):
        fx(photo(), suppress=other)
    assert same(fx(photo()), fused) and not same(fused, base)


def test_an_ip_adapter_is_read_by_the_first_call_alone(tmp_path: Path) -> None:
    fx = extractor("unet")
    technique = IPAdapter(save_ip_adapter(fx, tmp_path))
    first = fx(photo(), suppress=technique)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    assert same(fx(photo(), suppress=technique), first)
