"""Trains the autoencoder of the embedded pipeline on crops of drawn scenes.

accelerate launch --multi_cpu --num_processes 2 --num_cpu_threads_per_process 1 training/train_vae.py --steps 2400
accelerate launch training/train_vae.py --steps 2400 --precision bf16       # on a GPU
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from data import tensor
from diffusers import AutoencoderKL
from loop import Batch, Task, arguments, first, train
from scenes import RUNS, load
from torch import Generator, Tensor, nn

SEED = 20_261_121
BATCH = 16
#: Weight of the mean KL term per latent element: enough to keep latents bounded, too little to blur.
KL = 1e-4
#: Crops are this wide in three steps of four, and twice as wide in the fourth: small ones teach colours and edges at a
#: quarter of the cost, large ones the statistics that group normalisation sees on whole images.
CROP = 32
FOLDER = RUNS / "vae"


def model() -> AutoencoderKL:
    """Return the untrained autoencoder: RGB [-1, 1] to 4 latent channels at a quarter of the size."""
    blocks = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(24, 48, 64), layers_per_block=1,
        down_block_types=blocks[0], up_block_types=blocks[1], norm_num_groups=8, mid_block_add_attention=False,
        sample_size=128,
    )  # fmt: skip


def crops(images: np.ndarray, count: int, side: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return ``count`` random squares of ``side`` pixels: uint8 [side, side, 3] each."""
    corners = rng.integers(images.shape[1] - side + 1, size=(count, 2))
    rows = rng.integers(len(images), size=count)
    return [images[i, y : y + side, x : x + side] for i, (y, x) in zip(rows, corners, strict=True)]


class Reconstruction(nn.Module):
    """An autoencoder; calling it returns the losses of a batch."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Return "loss" and "l1", the mean absolute error, of ``x`` [N, 3, H, W]; ``noise`` [N, 4, H/4, W/4]."""
        posterior = self.vae.encode(x).latent_dist
        y = self.vae.decode(posterior.mean + posterior.std * noise).sample
        error = y.float() - x
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        # The square makes a wrong colour on a small object dear, which the absolute error alone forgives.
        loss = error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + KL * kl
        return {"loss": loss, "l1": error.abs().mean().detach()}


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: np.ndarray) -> float:
    """Return the mean peak signal-to-noise ratio in dB over uint8 images [N, H, W, 3]."""
    values = []
    for image in pixels:
        x = tensor(image[None]).to(vae.device)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(10 * torch.log10(4 / F.mse_loss(y, x)).item())
    return float(np.mean(values))


@torch.no_grad()
def normalise(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold a shift by ``mean`` and a scale by ``1 / std`` (both [4]) of the latents into the two 1x1 convolutions.

    Reconstructions stay the same, while each latent channel becomes centred with unit variance, as the noise
    that sampling starts from.
    """
    vae.quant_conv.weight[:4] /= std.view(-1, 1, 1, 1)
    vae.quant_conv.bias[:4] = (vae.quant_conv.bias[:4] - mean) / std
    vae.quant_conv.bias[4:] -= 2 * std.log()
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std.view(1, -1, 1, 1)


@torch.no_grad()
def finish(vae: AutoencoderKL, large: np.ndarray, small: np.ndarray, validation: np.ndarray) -> dict[str, float]:
    """Centre and scale the latents by 256 training scenes, save, and return the closing figures."""
    parts = [vae.encode(tensor(part[i : i + 16])).latent_dist.mode() for part in (large, small)
             for i in range(0, 128, 16)]  # fmt: skip
    flat = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)
    normalise(vae, flat.mean(dim=1), flat.std(dim=1))
    vae.register_to_config(scaling_factor=1.0)
    vae.save_pretrained(FOLDER)
    return {"latent_std_before": flat.std().item(), "scaling_factor": 1.0, "psnr_db": psnr(vae, validation)}


def main() -> None:
    """Train from the command line."""
    options = arguments(__doc__).parse_args()
    torch.manual_seed(SEED)
    with first():
        large, small, held = load("large")[0], load("small")[0], load("validation")[0]
    module = Reconstruction(model())

    def batches(step: int, share: float, generator: Generator) -> list[Batch]:
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        side, half = CROP * (1 + (step % 4 == 3)), max(1, round(BATCH * share / 2))
        x = tensor(np.stack(crops(large, half, side, rng) + crops(small, half, side, rng)))
        return [{"x": x, "noise": torch.randn(len(x), 4, side // 4, side // 4, generator=generator)}]

    def export() -> None:
        print(finish(module.vae.cpu(), large, small, held))

    train(
        Task(
            "vae", module, batches, lambda: {"psnr_db": psnr(module.vae, held[:8])}, export, SEED,
            rate=2e-3, warmup=50, decay=0.99,
        ),
        options,
    )  # fmt: skip


if __name__ == "__main__":
    main()
