"""Trains a ControlNet of the embedded pipeline on canny edges, then exports it beside the pipeline.

    python training/train_control.py --steps 2000

The pipeline stays as it is: only the ControlNet learns.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from data import Captioned, latents
from diffusers import ControlNetModel, StableDiffusionPipeline
from loop import Batch, Task, arguments, first, train
from noising import Denoising, noised
from scenes import ROOT, load
from skimage.feature import canny
from torch import Generator, Tensor
from train_unet import EXPORT, TOKENS, validation

SEED = 20_261_123
FOLDER = ROOT / "diffusion_features" / "embedded" / "canny"
BATCH = 16


def edges(pixels: np.ndarray) -> Tensor:
    """Canny edges of uint8 [N, H, W, 3]: float32 [N, 3, H, W], 0 or 1."""
    found = np.stack([canny(image.mean(axis=2), sigma=1.0, low_threshold=12, high_threshold=30) for image in pixels])
    return torch.from_numpy(found).float()[:, None].expand(-1, 3, -1, -1)


def main() -> None:
    """Train from the command line."""
    options = arguments(__doc__).parse_args()
    torch.manual_seed(SEED)
    pipeline = StableDiffusionPipeline.from_pretrained(EXPORT, dtype=torch.float32)
    with first():
        sets = {
            name: Captioned(latents(name, pipeline.vae), load(name)[1], pipeline.tokenizer, TOKENS)
            for name in ("large", "validation")
        }
    images = load("large")[0]
    # The hint is at the size of the image, four cells of the latents to a side.
    control = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(16, 32, 64))
    module = Denoising(pipeline.unet.requires_grad_(False), pipeline.text_encoder.requires_grad_(False), control)

    def batches(step: int, share: float, generator: Generator) -> list[Batch]:
        (rows, _), x, ids = sets["large"].draw(round(BATCH * share), generator)
        return [noised(x, ids, generator) | {"hint": edges(images[rows.numpy()])}]

    def measure() -> dict[str, float]:
        return validation(module, sets["validation"], hints=edges(load("validation")[0]))

    def export() -> None:
        copy.deepcopy(control).half().cpu().save_pretrained(FOLDER)

    train(Task("canny", module, batches, measure, export, SEED, rate=5e-4), options)


if __name__ == "__main__":
    main()
