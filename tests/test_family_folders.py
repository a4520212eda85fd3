"""Every family's folder loads, as the pipeline and the denoiser that the released model has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffusion_features.loading import load_pipeline
from tests import tiny_families
from tests.tiny import save_sd15

FAMILIES = [
    (save_sd15, "StableDiffusionPipeline", "PNDMScheduler"),
    (tiny_families.save_sd21, "StableDiffusionPipeline", "DDIMScheduler"),
    (tiny_families.save_sdxl, "StableDiffusionXLPipeline", "EulerDiscreteScheduler"),
    (tiny_families.save_playground_v2, "StableDiffusionXLPipeline", "EulerDiscreteScheduler"),
    (tiny_families.save_if, "IFPipeline", "DDPMScheduler"),
]


@pytest.mark.parametrize(("save", "pipeline", "scheduler"), FAMILIES, ids=lambda value: getattr(value, "__name__", ""))
def test_folder_loads(
    save: Callable[[Path], Path],
    pipeline: str,
    scheduler: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    save(tmp_path)
    capfd.readouterr()
    pipe = load_pipeline(tmp_path, device="cpu")
    assert (type(pipe).__name__, type(pipe.scheduler).__name__) == (pipeline, scheduler)
    assert capfd.readouterr().err == ""
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())


@pytest.mark.parametrize("save", [row[0] for row in FAMILIES], ids=lambda save: save.__name__)
def test_folder_is_the_same_every_time(save: Callable[[Path], Path], tmp_path: Path) -> None:
    first, second = save(tmp_path / "first"), save(tmp_path / "second")
    files = [path.relative_to(first) for path in sorted(first.rglob("*.safetensors"))]
    assert files
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_playground_has_weights_of_its_own(tmp_path: Path) -> None:
    unets = [
        load_pipeline(save(tmp_path / save.__name__), device="cpu").unet
        for save in (tiny_families.save_sdxl, tiny_families.save_playground_v2)
    ]
    assert not torch.equal(unets[0].conv_in.weight, unets[1].conv_in.weight)
    assert unets[0].config.transformer_layers_per_block == unets[1].config.transformer_layers_per_block == [1, 2, 10]


def test_text_that_conditions_sdxl_comes_from_both_encoders(tmp_path: Path) -> None:
    pipe = load_pipeline(tiny_families.save_sdxl(tmp_path), device="cpu")
    embeddings, _, pooled, _ = pipe.encode_prompt("a photo of a cat", do_classifier_free_guidance=False)
    assert embeddings.shape == (1, 77, pipe.unet.config.cross_attention_dim)
    assert pooled.shape == (1, pipe.text_encoder_2.config.projection_dim)
    assert pipe.tokenizer.pad_token != pipe.tokenizer_2.pad_token == "!"
