"""Truncated loading, for every transformer family: the same bytes as full loading, from less."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_features import FeatureExtractor, LoadError, UnknownActivation
from diffusion_features.loading import has_decoder, load_pipeline
from diffusion_features.truncating import blocks_of, outline
from tests.tiny import save_sd15
from tests.tiny_dits import PIPELINES, build

IMAGE = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
WEIGHTS = "diffusion_pytorch_model.safetensors"


SAME_DENOISER = ("pixart_alpha", "pixart_alpha_1024", "flux_schnell", "flux2_dev")  # as another of the pipelines


@pytest.fixture(scope="module", params=[name for name in PIPELINES if name not in SAME_DENOISER])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    build(request.param).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def whole(folder: Path) -> FeatureExtractor:
    return load(folder, ["*", "*-map"])


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux")
    build("flux_dev").save_pretrained(path)
    return path


def load(folder: Path, activations: Any, **options: Any) -> FeatureExtractor:
    return FeatureExtractor.from_pretrained(folder, activations, device="cpu", prompts="a cat", **options)


def features(fx: FeatureExtractor, **options: Any) -> dict[str, torch.Tensor]:
    return fx(IMAGE, "a cat", t=300, seed=1, **options)


def remove(file: Path, pattern: str) -> int:
    """Take the tensors whose names match out of a checkpoint; returns how many elements they had."""
    tensors = load_file(file)
    gone = [name for name in tensors if re.match(pattern, name)]
    save_file({name: tensor.clone() for name, tensor in tensors.items() if name not in gone}, file, {"format": "pt"})
    return sum(tensors[name].numel() for name in gone)


def test_bytes_are_those_of_full_loading(
    folder: Path, whole: FeatureExtractor, capfd: pytest.CaptureFixture[str]
) -> None:
    expected, paths = features(whole), blocks_of(whole.denoiser)
    for number in (0, len(paths) - 2):
        ids = [a.id for a in whole.available if a.id.startswith(f"vit-block{number}-")]
        capfd.readouterr()
        cut = load(folder, ids)
        assert capfd.readouterr().err == ""
        assert blocks_of(cut.denoiser) == paths[: number + 1]
        assert cut.available == whole.available
        found = features(cut)
        assert list(found) == ids
        assert all(torch.equal(found[id], expected[id]) for id in ids)


def test_later_blocks_and_the_vae_decoder_need_not_even_be_there(
    folder: Path, whole: FeatureExtractor, tmp_path: Path
) -> None:
    """Neither read nor allocated: the checkpoint has them no more, and the model is as much smaller."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    later = "|".join(map(re.escape, blocks_of(whole.denoiser)[2:]))
    gone = remove(copy / "transformer" / WEIGHTS, rf"({later})\.")
    assert gone and remove(copy / "vae" / WEIGHTS, r"decoder\.")
    cut = load(copy, "vit-block1-out")
    expected = features(whole, activations="vit-block1-out")["vit-block1-out"]
    assert torch.allclose(features(cut)["vit-block1-out"], expected, atol=1e-6)  # rounding follows memory alignment
    sizes = [sum(p.numel() for p in fx.denoiser.parameters()) for fx in (whole, cut)]
    assert sizes[0] - sizes[1] == gone
    assert not any(name.startswith("decoder.") for name, _ in cut.pipe.vae.named_parameters())
    assert not any(p.is_meta for p in [*cut.denoiser.parameters(), *cut.pipe.vae.parameters()])


def test_what_was_not_loaded_is_refused_with_the_remedy(flux: Path) -> None:
    cut = load(flux, "vit-block1-out")
    for spec in ("vit-block2-out", "*-out", ["vit-block0-out", "vit-block2-out"]):
        with pytest.raises(ValueError, match=r"block\d-out was not loaded: .* up to vit-block1-.* of from_pretrained"):
            cut(IMAGE, "a cat", activations=spec)
    with pytest.raises(UnknownActivation, match="vit-block2-out"):
        cut(IMAGE, "a cat", activations="vit-block2-oat")


def test_a_preset_by_depth_leaves_the_later_blocks_out(flux: Path) -> None:
    part, whole = load(flux, "study"), load(flux, ["*"])
    (id,) = part.activations
    assert torch.equal(features(part)[id.id], features(whole)[id.id])
    assert sum(p.numel() for p in part.denoiser.parameters()) < sum(p.numel() for p in whole.denoiser.parameters())


def test_output_of_a_truncated_model_is_refused(flux: Path) -> None:
    cut = load(flux, "vit-block1-out")
    with pytest.raises(RuntimeError, match=r"loaded only up to vit-block1-.*activations='\*'"):
        features(cut, denoise_from=400, solver_steps=1)
    assert features(cut)["vit-block1-out"].isfinite().all()


def test_whole_model_is_no_truncated_one(flux: Path) -> None:
    fx = load(flux, "*-out")
    assert len(features(fx, denoise_from=400, solver_steps=1)) == len(fx.activations)


def test_sharded_checkpoint(flux: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(flux, device="cpu")
    pipe.save_pretrained(tmp_path)
    (tmp_path / "transformer" / WEIGHTS).unlink()
    pipe.transformer.save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 3
    found = features(load(tmp_path, "vit-block1-*"))
    expected = features(load(tmp_path, "*"), activations="vit-block1-*")
    assert all(torch.equal(found[id], expected[id]) for id in expected) and list(found) == list(expected)


def test_variant_of_one_component_and_dtype(flux: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(flux, device="cpu")
    pipe.save_pretrained(tmp_path)
    (tmp_path / "transformer" / WEIGHTS).unlink()
    pipe.transformer.to(torch.float16).save_pretrained(tmp_path / "transformer", variant="fp16")
    fx = load(tmp_path, "vit-block0-out", variant="fp16", dtype=torch.bfloat16)
    assert fx.dtype == fx.pipe.vae.dtype == torch.bfloat16
    half, full = pipe.transformer.x_embedder.weight, fx.denoiser.x_embedder.weight
    assert torch.equal(half.to(torch.bfloat16), full)
    with pytest.raises(LoadError, match="variants present: fp16"):
        load(tmp_path, "vit-block0-out", variant="bf16")


def test_unknown_activation_is_told_before_weights_are_read(flux: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(flux, device="cpu")
    pipe.save_pretrained(tmp_path)
    (tmp_path / "transformer" / WEIGHTS).write_bytes(b"")
    with pytest.raises(UnknownActivation, match="vit-block3-attn-out"):
        load(tmp_path, "vit-block3-atn-out")
    with pytest.raises(LoadError, match=rf"transformer/{WEIGHTS} is damaged"):
        load(tmp_path, "vit-block3-attn-out")


def test_unet_is_loaded_whole_without_the_decoder(tmp_path: Path) -> None:
    folder = save_sd15(tmp_path)
    assert remove(folder / "vae" / WEIGHTS, r"decoder\.")
    fx = FeatureExtractor.from_pretrained(folder, "mid-vit-out", device="cpu")
    assert not has_decoder(fx.pipe)
    assert len(fx(IMAGE, activations="unet-out")) == 1


def test_outline_takes_no_memory(flux: Path) -> None:
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel

    whole = outline(FluxTransformer2DModel, flux / "transformer")
    assert whole is not None and all(p.is_meta for p in whole.parameters())
    assert outline(UNet2DConditionModel, Path(__file__).parents[1] / "diffusion_features/embedded/sd/unet") is None
