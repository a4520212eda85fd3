"""An extractor inside a model, through mmengine's own checkpoints: frozen weights stay out, and it loads strictly."""

import pytest
import torch
from mmengine.runner import load_checkpoint, save_checkpoint

from diffusion_features import FeatureExtractor
from tests.tiny import sd15_pipe


class Model(torch.nn.Module):
    def __init__(self, trainable: bool) -> None:
        super().__init__()
        self.backbone = FeatureExtractor.from_pipe(sd15_pipe(), "up-level3-repeat2-vit-out", trainable=trainable)
        self.head = torch.nn.Conv2d(self.backbone.feature_info["up-level3-repeat2-vit-out"].channels, 3, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images)["up-level3-repeat2-vit-out"])


@pytest.mark.parametrize("trainable", [False, True])
def test_saved_and_strictly_reloaded(tmp_path, trainable):
    model, twin = Model(trainable), Model(trainable)
    file = str(tmp_path / "model.pth")
    save_checkpoint({"state_dict": model.state_dict()}, file)
    names = set(torch.load(file, weights_only=False)["state_dict"])
    assert {"head.weight", "head.bias"} <= names
    assert any(name.startswith("backbone.") for name in names) == trainable
    load_checkpoint(twin, file, strict=True)
    images = torch.zeros(1, 3, 32, 32)
    assert torch.equal(model(images), twin(images))
