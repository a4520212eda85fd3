"""Trains the UNet and the text encoder of the embedded pipeline, then exports it.

Each step takes scenes of 128 pixels and, as words and shapes are learnt there at a fifth of the cost, of 64.
``python training/train_unet.py --steps 4000`` is reproducible; ``--until 12:05`` (UTC, or ``+minutes``) anneals by
the clock instead. Killed, it goes on from its last checkpoint when started again.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import words
from common import WORKERS, Average, Budget, agree, average_gradients, clock, launch, log, norm_, save, set_rate
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from scenes import ROOT, RUNS, load
from train_vae import FOLDER as VAE_FOLDER
from train_vae import tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion_features.embedded.world import HELD_OUT_SEED, render

SEED = 20_261_122
EXPORT = ROOT / "diffusion_features" / "embedded" / "sd"
CHECKPOINT, LOG = RUNS / "unet.pt", ROOT / "training" / "logs" / "unet.jsonl"
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
EMPTY, DECAY, SNR, WARMUP = 0.1, 0.999, 5.0, 100
#: Scenes of each set in a step, and the learning rate after the warm-up, from where it falls to zero.
BATCH, RATE = {"large": 16, "small": 32}, 8e-4


def networks(tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Return the untrained UNet (SD 1.5's topology, narrower) and text encoder."""
    unet = UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, block_out_channels=(32, 64, 96, 128), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=96, attention_head_dim=(2, 4, 4, 4), norm_num_groups=16,
    )  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=96, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    return unet, text


@torch.no_grad()
def encode(name: str, vae: AutoencoderKL) -> torch.Tensor:
    """Return the scaled latents of the scenes of set ``name``: float16 [N, 4, S/4, S/4].

    The workers encode a part each, and the parts stay on disk for the next start.
    """
    paths = [RUNS / f"{name}_latents_{i}of{WORKERS}.pt" for i in range(WORKERS)]
    own = paths[dist.get_rank()]
    if not own.exists():
        images = np.array_split(load(name)[0], WORKERS)[dist.get_rank()]
        means = [vae.encode(tensor(images[i : i + 16])).latent_dist.mode() for i in range(0, len(images), 16)]
        save(own, {"latents": (torch.cat(means) * vae.config.scaling_factor).half()})
    dist.barrier()
    return torch.cat([torch.load(path)["latents"] for path in paths])


class Data:
    """Latents and token ids of one scene set."""

    def __init__(self, name: str, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> None:
        self.latents = encode(name, vae)
        texts = load(name)[1]
        flat = [text for scene in texts for text in scene]
        ids = tokenizer(
            [*flat, ""], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        self.empty = ids[-1]
        self.ids = ids[:-1].view(len(texts), -1, 77).to(torch.int16)

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents float32 [size, 4, h, w] and ids int64 [size, 77], a tenth of them of no caption."""
        rows = torch.randint(len(self.latents), (size,), generator=generator)
        ids = self.ids[rows, torch.randint(self.ids.shape[1], (size,), generator=generator)].long()
        drop = torch.rand(size, generator=generator) < EMPTY
        return self.latents[rows].float(), torch.where(drop[:, None], self.empty, ids)


class Trainer:
    """The networks, their averaged copy and the objective."""

    def __init__(self, tokenizer: CLIPTokenizer, vae: AutoencoderKL) -> None:
        self.tokenizer, self.vae = tokenizer, vae
        self.unet, self.text = networks(tokenizer)
        self.parameters = [*self.unet.parameters(), *self.text.parameters()]
        self.average = Average(self.parameters, DECAY)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
        self.cumulative = DDPMScheduler(**NOISE).alphas_cumprod

    def loss(self, x: torch.Tensor, ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted and the plain mean squared error (scalars) of predicting the noise.

        The weights are those of a velocity prediction with the signal-to-noise ratio clipped (min-SNR, Hang et al.
        2023): they favour the levels where the caption still says something that the noisy image does not.
        """
        t = torch.randint(len(self.cumulative), (len(x),), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        kept = self.cumulative[t].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * x + (1 - kept).sqrt() * noise
        error = F.mse_loss(self.unet(noisy, t, self.text(ids).last_hidden_state).sample, noise, reduction="none")
        each = error.mean(dim=(1, 2, 3))
        ratio = (kept / (1 - kept)).flatten()
        return (each * ((ratio + 1).clamp(max=SNR) / ratio).clamp(max=SNR)).mean(), each.mean()

    def step(self, sets: dict[str, Data], seed: int, rate: float, number: int) -> dict[str, float]:
        """Take one step on scenes of all sets; return the losses and the gradient norm."""
        generator, found = torch.Generator().manual_seed(seed), {}
        self.optimizer.zero_grad()
        for name, data in sets.items():
            weighted, plain = self.loss(*data.batch(BATCH[name] // WORKERS, generator), generator)
            (weighted / len(sets)).backward()
            found |= {f"weighted_{name}": weighted.item(), f"loss_{name}": plain.item()}
        average_gradients(self.parameters)
        found["grad"] = norm_(self.parameters, 1.0)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.average.update(number)
        return found

    @torch.no_grad()
    def validate(self, data: Data) -> float:
        """Return the plain loss of the averaged networks on validation scenes with fixed noise."""
        self.average.swap()
        generator = torch.Generator().manual_seed(SEED)
        losses = [self.loss(data.latents[i : i + 16].float(), data.ids[i : i + 16, 0].long(), generator)[1].item()
                  for i in range(0, len(data.latents), 16)]  # fmt: skip
        self.average.swap()
        return float(np.mean(losses))

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs."""
        return {"unet": self.unet.state_dict(), "text": self.text.state_dict(), "average": self.average.values,
                "optimizer": self.optimizer.state_dict()}  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state`."""
        self.unet.load_state_dict(state["unet"])
        self.text.load_state_dict(state["text"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.values = state["average"]

    def export(self, folder: Path) -> None:
        """Write the averaged pipeline as float16 beside ``folder``, then move it there."""
        self.average.swap()
        # The decoder may have been trained on since; the encoder, and so the latents, stay the same.
        vae = AutoencoderKL.from_pretrained(VAE_FOLDER)
        parts = [copy.deepcopy(part).half() for part in (vae, self.text, self.unet)]
        self.average.swap()
        scheduler = PNDMScheduler(**NOISE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
        # SD 1.5 ships this entry too: DDIM and DDPM read it when they are made from this configuration.
        scheduler.register_to_config(clip_sample=False)
        pipeline = StableDiffusionPipeline(
            vae=parts[0], text_encoder=parts[1], unet=parts[2], tokenizer=self.tokenizer, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        fresh, stale = folder.with_name("sd.new"), folder.with_name("sd.old")
        for path in (fresh, stale):
            shutil.rmtree(path, ignore_errors=True)
        pipeline.save_pretrained(fresh, safe_serialization=True)
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(RUNS / "tokenizer" / name, fresh / "tokenizer" / name)
        if folder.exists():
            folder.rename(stale)
        fresh.rename(folder)
        shutil.rmtree(stale, ignore_errors=True)


def learning_rate(done: float, step: int) -> float:
    """A linear warm-up, then linearly down to zero at ``done`` = 1."""
    return min(1.0, (step + 1) / WARMUP) * RATE * (1 - done)


def snapshots(minutes: list[float], began: float) -> Iterator[bool]:
    """Yield, each time it is asked, whether another of the ``minutes`` since ``began`` has passed."""
    due = sorted(m for m in minutes if began + 60 * m > time.time())
    while True:
        ready = bool(due) and time.time() >= began + 60 * due[0]
        if ready:
            due.pop(0)
        yield ready


def train(options: argparse.Namespace) -> None:
    """Train in one worker; the first worker keeps the log and the checkpoints and exports at the end."""
    torch.manual_seed(SEED)
    tokenizer, rank = CLIPTokenizer.from_pretrained(str(RUNS / "tokenizer")), dist.get_rank()
    trainer = Trainer(tokenizer, AutoencoderKL.from_pretrained(VAE_FOLDER).eval())
    sets = {name: Data(name, trainer.vae, tokenizer) for name in BATCH}
    validation = Data("validation", trainer.vae, tokenizer)
    step, began, budget = 0, time.time(), Budget(options.steps, options.until)
    if CHECKPOINT.exists():
        state = torch.load(CHECKPOINT)
        trainer.restore(state)
        step, began, budget = state["step"], state["began"], Budget(**state["budget"])
    elif options.again:
        trainer.restore(torch.load(options.again))
    due, saved = snapshots(options.snapshot, began), time.time()

    def keep(**more: float) -> None:
        log(LOG, step=step, validation=trainer.validate(validation), seconds=round(time.time() - began, 1), **more)
        save(CHECKPOINT, {**trainer.state(), "step": step, "began": began, "budget": vars(budget)})

    while (done := agree(budget.progress(step))) < 1:
        rate = learning_rate(done, step)
        found = trainer.step(sets, SEED + step * WORKERS + rank, rate, step)
        step += 1
        if rank:
            continue
        if step % 20 == 0:
            log(LOG, step=step, progress=done, lr=rate, seconds=round(time.time() - began, 1), **found)
        if next(due):
            trainer.export(EXPORT)
        if time.time() - saved > 180:
            keep()
            saved = time.time()
    if rank == 0:
        keep(finished=1)
        trainer.export(EXPORT)


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--until", type=clock, default=0.0)
    parser.add_argument("--snapshot", type=float, nargs="*", default=[], help="minutes after which to export early")
    parser.add_argument("--again", type=Path, help="a finished unet.pt, moved away, to go on from")
    options = parser.parse_args()
    folder = RUNS / "tokenizer"
    if not folder.exists():
        # The words of the held-out styles are known too, so that an adapter can learn them.
        held_out = (render(seed, 32, supersample=1).caption for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + 500))
        words.build(chain(held_out, (text for name in BATCH for scene in load(name)[1] for text in scene)), folder)
    launch(train, options)


if __name__ == "__main__":
    main()
