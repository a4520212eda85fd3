"""Trains the autoencoder of the embedded pipeline on crops of drawn scenes.

``python training/train_vae.py --steps 1200`` (reproducible) or ``--until +12`` (minutes of wall-clock).
Killed, it goes on from its last checkpoint when started again with the same arguments.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import WORKERS, Budget, agree, average_gradients, clock, launch, log, norm_, save, set_rate
from diffusers import AutoencoderKL
from scenes import ROOT, RUNS, load

SEED = 20_261_121
BATCH = 16
#: Crops are 32 pixels wide until this share of the training, then 64: small ones teach colours and edges at a
#: quarter of the cost, large ones the statistics that group normalisation sees on whole images.
SMALL_CROPS = 0.75
RATE, WARMUP = 2e-3, 50
#: Weight of the mean KL term per latent element: enough to keep latents bounded, too little to blur.
KL = 1e-4
CHECKPOINT, FOLDER, LOG = RUNS / "vae.pt", RUNS / "vae", ROOT / "training" / "logs" / "vae.jsonl"


def model() -> AutoencoderKL:
    """Return the untrained autoencoder: RGB [-1, 1] to 4 latent channels at a quarter of the size."""
    blocks = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(24, 48, 64), layers_per_block=1,
        down_block_types=blocks[0], up_block_types=blocks[1], norm_num_groups=8, mid_block_add_attention=False,
        sample_size=128,
    )  # fmt: skip


def tensor(pixels: np.ndarray) -> torch.Tensor:
    """Turn uint8 [N, H, W, 3] into float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def crops(images: np.ndarray, count: int, side: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return ``count`` random squares of ``side`` pixels: uint8 [side, side, 3] each."""
    corners = rng.integers(images.shape[1] - side + 1, size=(count, 2))
    rows = rng.integers(len(images), size=count)
    return [images[i, y : y + side, x : x + side] for i, (y, x) in zip(rows, corners, strict=True)]


def batch(large: np.ndarray, small: np.ndarray, side: int, rng: np.random.Generator) -> torch.Tensor:
    """Return a worker's share of crops of both scene sets: float32 [N, 3, side, side]."""
    half = BATCH // WORKERS // 2
    return tensor(np.stack(crops(large, half, side, rng) + crops(small, half, side, rng)))


def objective(vae: AutoencoderKL, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and the mean absolute error (both scalars) of reconstructing ``x``."""
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample
    error = y - x
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    # The square makes a wrong colour on a small object dear, which the absolute error alone forgives.
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + KL * kl, error.abs().mean()


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: np.ndarray) -> float:
    """Return the mean peak signal-to-noise ratio in dB over uint8 images [N, H, W, 3]."""
    values = []
    for image in pixels:
        x = tensor(image[None])
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


def train(options: argparse.Namespace) -> None:
    """Train in one worker; the first measures and saves ``runs/embedded/vae``."""
    rank, began = dist.get_rank(), time.time()
    torch.manual_seed(SEED)
    large, small, validation = load("large")[0], load("small")[0], load("validation")[0]
    vae = AutoencoderKL.from_pretrained(options.init) if options.init else model()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.99))
    budget, step = Budget(options.steps, options.until), 0
    if CHECKPOINT.exists():
        state = torch.load(CHECKPOINT)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        budget, step = Budget(**state["budget"]), state["step"]
    while (done := agree(budget.progress(step))) < 1:
        rate = RATE * min(1.0, (step + 1) / WARMUP) * (1 - done)
        set_rate(optimizer, rate)
        # Each step has its own generators, so that a resumed run sees what an unbroken one would.
        seed = SEED + step * WORKERS + rank
        torch.manual_seed(seed)
        loss, error = objective(vae, batch(large, small, 32 if done < SMALL_CROPS else 64, np.random.default_rng(seed)))
        optimizer.zero_grad()
        loss.backward()
        average_gradients(vae.parameters())
        norm = norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if rank == 0 and step % 25 == 0:
            log(LOG, step=step, progress=done, loss=loss.item(), l1=error.item(), grad=norm, lr=rate,
                seconds=round(time.time() - began, 1))  # fmt: skip
        if rank == 0 and step % 200 == 0:
            log(LOG, step=step, psnr_db=psnr(vae, validation[:8]))
            save(CHECKPOINT, {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                              "budget": vars(budget)})  # fmt: skip
    if rank == 0:
        log(LOG, step=step, seconds=round(time.time() - began, 1), **finish(vae, large, small, validation))


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--until", type=clock, default=clock("+12"), help="HH:MM UTC or +minutes; unless --steps")
    parser.add_argument("--init", help="folder of an autoencoder to go on from, with a fresh schedule")
    launch(train, parser.parse_args())


if __name__ == "__main__":
    main()
