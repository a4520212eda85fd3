"""Denoisers that nobody wrote a family for: a plain refusal, and ``capture`` by module paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogView4Transformer2DModel, DiTTransformer2DModel
from torch import Tensor, nn

from diffusion_features import CaptureError, FeatureExtractor, LoadError, UnknownActivation, capture, list_activations
from diffusion_features.loading import load_pipeline
from tests.tiny_dits import build

REFUSAL = (
    r"DiTTransformer2DModel is not a denoiser this library knows; known are AuraFlow.*ZImage.* dotted paths of its"
)


@pytest.fixture(scope="module")
def dit() -> Any:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    ).eval()  # fmt: skip


def run(dit: Any) -> Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return dit(latents, timestep=torch.tensor([5, 5]), class_labels=torch.tensor([1, 2])).sample


def test_outputs_of_modules_are_captured_under_their_paths(dit: Any) -> None:
    before, seen = run(dit), {}
    paths = ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1"]
    handles = [
        dit.get_submodule(path).register_forward_hook(lambda m, args, out, path=path: seen.update({path: out.clone()}))
        for path in paths
    ]
    with capture(dit, paths) as features:
        assert torch.equal(run(dit), before)
    for handle in handles:
        handle.remove()
    assert list(features) == paths and all(torch.equal(features[path], seen[path]) for path in paths)
    with capture(dit, "transformer_blocks.*.to_?", stop_early=True) as found:
        run(dit)
    assert list(found) == [f"transformer_blocks.{b}.attn1.to_{n}" for b in (0, 1) for n in "qkv"]
    with capture(dit, "transformer_blocks.1", steps=[1], dtype=torch.float64) as later:
        run(dit), run(dit)
    assert torch.equal(later["transformer_blocks.1"][1], seen["transformer_blocks.1"].double())


def test_wrong_paths(dit: Any) -> None:
    with pytest.raises(UnknownActivation, match=r"did you mean transformer_blocks\.0\.attn1\.to_q"):
        with capture(dit, "transformer_blocks.0.attn1.toq"):
            pass


class Named(nn.Module):
    """Returns no tensor."""

    def forward(self) -> dict[str, str]:
        return {"a": "b"}


class Stranger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = Named()

    def forward(self) -> Tensor:
        return torch.zeros(len(self.inside()))


def test_what_is_no_tensor_is_refused() -> None:
    stranger = Stranger()
    with pytest.raises(CaptureError, match=r"inside returns a dict, no tensor: name a part of it"):
        with capture(stranger, "inside"):
            stranger()


def test_refusals_say_what_is_known_and_that_capture_works(dit: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=REFUSAL):
        list_activations(dit)
    pipe = build("pixart_sigma")
    pipe.save_pretrained(tmp_path)
    pipe.transformer = dit
    with pytest.raises(TypeError, match=REFUSAL):
        FeatureExtractor.from_pipe(pipe)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["transformer"] = ["diffusers", CogView4Transformer2DModel.__name__]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    for refused in (FeatureExtractor.from_pretrained, load_pipeline):  # before any weight is read
        with pytest.raises(LoadError, match=r"cannot be loaded: CogView4Transformer2DModel is not a denoiser"):
            refused(tmp_path, device="cpu")
