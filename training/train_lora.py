"""Trains two LoRA adapters of the embedded pipeline on scenes in the style "sketch", which its own training never saw.

    python training/train_lora.py sketch --steps 600
    python training/train_lora.py sketch-overfitted --steps 600

The first learns from many scenes, the second from two, which it ends up repeating. Both are
exported as safetensors for ``pipe.load_lora_weights``.
"""

from __future__ import annotations

import numpy as np
import torch
from data import Captioned, tensor
from diffusers import StableDiffusionPipeline
from loop import Batch, Task, arguments, train
from noising import Denoising, noised
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from scenes import ROOT
from torch import Generator, Tensor
from train_unet import EXPORT, TOKENS, validation

from diffusion_features.embedded.world import TRAIN_SEED, VALIDATION_SEED, render

SEED = 20_261_124
FOLDER = ROOT / "diffusion_features" / "embedded" / "lora"
#: Scenes that each adapter learns from, its rank, and its learning rate.
ADAPTERS = {"sketch": (2000, 8, 1e-3), "sketch-overfitted": (2, 32, 3e-3)}
FIRST, BATCH = TRAIN_SEED + 4_000_000, 16


@torch.no_grad()
def sketches(pipeline: StableDiffusionPipeline, first: int, count: int) -> Captioned:
    """Draw scenes in the style "sketch" and encode them."""
    scenes = [render(first + i, style="sketch") for i in range(count)]
    pixels: Tensor = tensor(np.stack([np.asarray(scene.image) for scene in scenes]))
    found = torch.cat([pipeline.vae.encode(x).latent_dist.mode() for x in pixels.split(16)])
    return Captioned(
        found * pipeline.vae.config.scaling_factor, [[s.caption] for s in scenes], pipeline.tokenizer, TOKENS
    )


def main() -> None:
    """Train from the command line."""
    parser = arguments(__doc__)
    parser.add_argument("adapter", choices=list(ADAPTERS))
    options = parser.parse_args()
    count, rank, rate = ADAPTERS[options.adapter]
    torch.manual_seed(SEED)
    pipeline = StableDiffusionPipeline.from_pretrained(EXPORT, dtype=torch.float32)
    scenes, held = sketches(pipeline, FIRST, count), sketches(pipeline, VALIDATION_SEED, 64)
    unet = pipeline.unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian"))
    module = Denoising(unet, pipeline.text_encoder.requires_grad_(False))

    def batches(step: int, share: float, generator: Generator) -> list[Batch]:
        _, x, ids = scenes.draw(round(BATCH * share), generator)
        return [noised(x, ids, generator)]

    def export() -> None:
        layers = {name: value.half().cpu() for name, value in get_peft_model_state_dict(unet).items()}
        StableDiffusionPipeline.save_lora_weights(FOLDER, layers, weight_name=f"{options.adapter}.safetensors")

    train(
        Task(options.adapter, module, batches, lambda: validation(module, held), export, SEED, rate, decay=0.99),
        options,
    )


if __name__ == "__main__":
    main()
