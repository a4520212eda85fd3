"""diffusers' own quantisation and offloading, under an extractor that is loaded in part."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PipelineQuantizationConfig, QuantoConfig, TorchAoConfig

from diffusion_features import FeatureExtractor, LoadError
from tests.tiny_dits import build

IMAGE = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
IDS = ["vit-block0-out", "vit-block2-q", "vit-block2-cross-map"]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("flux")
    build("flux_dev").save_pretrained(path)
    return path


def load(folder: Path, **options: Any) -> FeatureExtractor:
    return FeatureExtractor.from_pretrained(folder, IDS, device="cpu", **options)


def features(fx: FeatureExtractor, **options: Any) -> dict[str, torch.Tensor]:
    return fx(IMAGE, "a cat", t=300, seed=1, **options)


@pytest.mark.parametrize(
    "kind", [dict(offload_type="leaf_level"), dict(offload_type="block_level", num_blocks_per_group=1)]
)
def test_group_offload_gives_the_same(flux: Path, kind: dict[str, Any]) -> None:
    expected = features(load(flux))
    fx = load(flux)
    fx.pipe.enable_group_offload(onload_device=torch.device("cpu"), **kind)
    for _ in range(2):  # the first leaves the denoiser half-way
        found = features(fx)
        assert all(torch.equal(found[id], expected[id]) for id in IDS)
    options = dict(activations="vit-block0-out", modulate=True, discard=[1])
    modulated, expected = (features(x, **options)["vit-block0-out"] for x in (fx, load(flux)))
    assert torch.equal(modulated, expected)


def model_offload(pipe: Any) -> None:
    """As on a GPU, with the CPU in its place: hooks move every component, to where it is already."""
    pipe.enable_model_cpu_offload(device="cpu")


def group_offload(pipe: Any) -> None:
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def hooks(pipe: Any) -> int:
    """How many modules have a hook that moves them."""
    modules = [m for part in pipe.components.values() if isinstance(part, torch.nn.Module) for m in part.modules()]
    return sum(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in modules)


@pytest.mark.parametrize("offload", [model_offload, group_offload])
@pytest.mark.parametrize("name", ["flux_dev", "pixart_sigma"])
def test_offloaded_pipeline_of_the_caller(name: str, offload: Any) -> None:
    ids = ["*-cross-map", "vit-block1-out"]
    expected = features(FeatureExtractor.from_pipe(build(name), ids))
    pipe = build(name)
    offload(pipe)
    hooked = hooks(pipe)
    assert hooked > 2
    fx = FeatureExtractor.from_pipe(pipe, ids)
    for _ in range(2):
        found = features(fx)
        assert list(found) == list(expected) and all(torch.equal(found[id], expected[id]) for id in found)
    assert hooks(pipe) == hooked
    prompt = dict(num_inference_steps=1, height=64, width=96, output_type="latent", guidance_scale=1.0)
    assert torch.isfinite(pipe("a cat", **prompt).images).all()  # and it still generates


@pytest.mark.skipif(importlib.util.find_spec("optimum") is not None, reason="quanto is installed")
def test_quantisation_reaches_the_denoiser(flux: Path) -> None:
    """Without the library that quantises, diffusers says which one is missing, for the component that asks for it."""
    config = PipelineQuantizationConfig(quant_mapping={"transformer": QuantoConfig(weights_dtype="int8")})
    with pytest.raises(ImportError, match="quanto"):
        load(flux, quantization_config=config)
    other = PipelineQuantizationConfig(quant_mapping={"image_encoder": QuantoConfig(weights_dtype="int8")})
    assert features(load(flux, quantization_config=other)).keys() == set(IDS)


def by_torchao() -> Any:
    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


def by_quanto() -> Any:
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(weights_dtype="int8")


@pytest.mark.parametrize("config", [by_torchao, by_quanto])
def test_quantised_denoiser(flux: Path, config: Any) -> None:
    """Run where one of the libraries is installed; neither is needed by this package."""
    quantization = PipelineQuantizationConfig(quant_mapping={"transformer": config()})
    exact = load(flux, dtype=torch.bfloat16)
    fx = load(flux, dtype=torch.bfloat16, quantization_config=quantization)
    assert type(fx.denoiser.get_submodule("transformer_blocks.0.attn.to_q").weight.data) is not torch.Tensor
    assert len(fx.denoiser.get_submodule("single_transformer_blocks")) == 1
    found, expected = features(fx), features(exact)
    for id in IDS:
        assert torch.nn.functional.cosine_similarity(found[id].flatten(), expected[id].flatten(), dim=0) > 0.99


def test_single_file_is_not_quantised(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    config = PipelineQuantizationConfig(quant_mapping={"transformer": QuantoConfig(weights_dtype="int8")})
    with pytest.raises(LoadError, match="does not quantise"):
        load(tmp_path / "model.safetensors", quantization_config=config)
