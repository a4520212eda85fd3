"""Trains the UNet and the text encoder of the embedded pipeline, then exports it.

Stage "small" learns words and shapes on 64-pixel scenes (a fifth of the cost), stage "large" goes on at 128.
``python training/train_unet.py --steps 4000 2200`` is reproducible; ``--until 11:05 12:05`` (UTC, or
``+minutes``) anneals by the clock instead. Killed, it goes on from its last checkpoint when started again.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
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

SEED = 20_261_122
EXPORT = ROOT / "diffusion_features" / "embedded" / "sd"
CHECKPOINT, LOG = RUNS / "unet.pt", ROOT / "training" / "logs" / "unet.jsonl"
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
EMPTY, DECAY, SNR, WARMUP = 0.1, 0.999, 5.0, 200


@dataclass(frozen=True)
class Stage:
    """One resolution: its scene sets, batch size, and learning rate at its start and its end."""

    name: str
    validation: str
    scenes: int
    batch: int
    first: float
    last: float


STAGES = (
    Stage("small", "validation_small", 16_384, 32, 1e-3, 6e-4),
    Stage("large", "validation", 6_144, 16, 6e-4, 0.0),
)


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
def encode(name: str, count: int, vae: AutoencoderKL) -> torch.Tensor:
    """Return the scaled latents of the first ``count`` scenes of set ``name``: float16 [N, 4, S/4, S/4].

    The workers encode a part each, and the parts stay on disk for the next start.
    """
    paths = [RUNS / f"{name}_latents_{i}of{WORKERS}.pt" for i in range(WORKERS)]
    own = paths[dist.get_rank()]
    if not own.exists():
        images = np.array_split(load(name)[0][:count], WORKERS)[dist.get_rank()]
        means = [vae.encode(tensor(images[i : i + 16])).latent_dist.mode() for i in range(0, len(images), 16)]
        save(own, {"latents": (torch.cat(means) * vae.config.scaling_factor).half()})
    dist.barrier()
    return torch.cat([torch.load(path)["latents"] for path in paths])


class Data:
    """Latents and token ids of one scene set."""

    def __init__(self, name: str, count: int, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> None:
        self.latents = encode(name, count, vae)
        texts = load(name)[1][:count]
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
        """Return the min-SNR weighted and the plain mean squared error (scalars) of predicting the noise."""
        t = torch.randint(len(self.cumulative), (len(x),), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        kept = self.cumulative[t].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * x + (1 - kept).sqrt() * noise
        error = F.mse_loss(self.unet(noisy, t, self.text(ids).last_hidden_state).sample, noise, reduction="none")
        each = error.mean(dim=(1, 2, 3))
        ratio = (kept / (1 - kept)).flatten()
        return (each * ratio.clamp(max=SNR) / ratio).mean(), each.mean()

    def step(self, data: Data, size: int, seed: int, rate: float, number: int) -> tuple[float, float, float]:
        """Take one step; return the weighted loss, the plain loss and the gradient norm."""
        generator = torch.Generator().manual_seed(seed)
        weighted, plain = self.loss(*data.batch(size, generator), generator)
        self.optimizer.zero_grad()
        weighted.backward()
        average_gradients(self.parameters)
        norm = norm_(self.parameters, 1.0)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.average.update(number)
        return weighted.item(), plain.item(), norm

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


def rates(stage: Stage, done: float, step: int) -> float:
    """Return the learning rate: a linear warm-up, then linear from the stage's first to its last."""
    return min(1.0, (step + 1) / WARMUP) * (stage.first + (stage.last - stage.first) * done)


def snapshots(minutes: list[float], began: float) -> Iterator[bool]:
    """Yield, each time it is asked, whether another of the ``minutes`` since ``began`` has passed."""
    due = sorted(m for m in minutes if began + 60 * m > time.time())
    while True:
        ready = bool(due) and time.time() >= began + 60 * due[0]
        if ready:
            due.pop(0)
        yield ready


def train_stage(trainer: Trainer, index: int, state: dict[str, Any], options: argparse.Namespace) -> int:
    """Go through one stage from wherever ``state`` stands; return the steps taken in all stages."""
    stage, rank = STAGES[index], dist.get_rank()
    data = Data(stage.name, stage.scenes, trainer.vae, trainer.tokenizer)
    validation = Data(stage.validation, 64, trainer.vae, trainer.tokenizer)
    resumed = index == state["stage"] and "budget" in state
    budget = Budget(**state["budget"]) if resumed else Budget(options.steps[index], options.until[index])
    step, total = state["step"] if resumed else 0, state["total"]
    due, saved = snapshots(options.snapshot, state["began"]), time.time()
    while (done := agree(budget.progress(step))) < 1:
        rate = rates(stage, done, total)
        seed = SEED + total * WORKERS + rank
        weighted, plain, norm = trainer.step(data, stage.batch // WORKERS, seed, rate, total)
        step, total = step + 1, total + 1
        if rank:
            continue
        if total % 20 == 0:
            log(LOG, stage=stage.name, step=total, progress=done, weighted=weighted, loss=plain, grad=norm, lr=rate,
                seconds=round(time.time() - state["began"], 1))  # fmt: skip
        if next(due):
            trainer.export(EXPORT)
        if time.time() - saved > 180:
            log(LOG, stage=stage.name, step=total, validation=trainer.validate(validation))
            save(CHECKPOINT, {**trainer.state(), "stage": index, "step": step, "total": total,
                              "began": state["began"], "budget": vars(budget)})  # fmt: skip
            saved = time.time()
    if rank == 0:
        log(LOG, stage=stage.name, step=total, validation=trainer.validate(validation), finished=1,
            seconds=round(time.time() - state["began"], 1))  # fmt: skip
        save(RUNS / f"unet_{stage.name}.pt", trainer.state())
    return total


def train(options: argparse.Namespace) -> None:
    """Go through the stages in one worker; the first worker exports at the end."""
    torch.manual_seed(SEED)
    tokenizer = CLIPTokenizer.from_pretrained(str(RUNS / "tokenizer"))
    trainer = Trainer(tokenizer, AutoencoderKL.from_pretrained(VAE_FOLDER).eval())
    state: dict[str, Any] = {"stage": 0, "step": 0, "total": 0, "began": time.time()}
    if CHECKPOINT.exists():
        state = torch.load(CHECKPOINT)
        trainer.restore(state)
    elif options.again:
        trainer.restore(torch.load(options.again))
        state["stage"] = len(STAGES) - 1
    for index in range(state["stage"], len(STAGES)):
        state["total"] = train_stage(trainer, index, state, options)
    if dist.get_rank() == 0:
        trainer.export(EXPORT)


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs=2, default=(0, 0), metavar=("SMALL", "LARGE"))
    parser.add_argument("--until", type=clock, nargs=2, default=(0.0, 0.0), metavar=("SMALL", "LARGE"))
    parser.add_argument("--snapshot", type=float, nargs="*", default=[], help="minutes after which to export early")
    parser.add_argument("--again", type=Path, help="weights (unet_large.pt) for one more pass of the last stage")
    options = parser.parse_args()
    folder = RUNS / "tokenizer"
    if not folder.exists():
        words.build((text for name in ("large", "small") for scene in load(name)[1] for text in scene), folder)
    launch(train, options)


if __name__ == "__main__":
    main()
