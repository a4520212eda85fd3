"""Notes where two trained models together find the words of the captions, for trainings with ``--taught`` to learn.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 training/teacher.py  # on two CPU cores, eleven minutes

This is distillation of attention: the teachers are the pipelines in the package, the UNet, whose maps have sharp
objects, and the larger transformer, whose maps, spread by its self-attention, have whole backgrounds. They err in
different places, so that both together find words better than either alone. No label takes part. Notes that exist are
kept, also when the package gets new weights. Made anew today they are others than those that the shipped weights
learnt from, for both pipelines have been taught since.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate import PartialState
from common import save
from data import latents, telling
from diffusers import AutoencoderKL, DDPMScheduler, PixArtAlphaPipeline, StableDiffusionPipeline
from loop import CPU, first
from noising import NOISE, Denoising
from notes import CAPTIONS, FOLDER, WORDS, shares
from scenes import load
from torch import Generator, Tensor
from train_dit import Masked
from train_unet import READING
from train_vae import FOLDER as VAE_FOLDER

from diffusion_features import capture, embedded

SEED = 20_261_132
#: The noise at which the teachers look, and scenes at once.
T, BATCH, CHUNK = 100, 16, 512
#: Blocks of the larger transformer that find words, those whose self-attention refines, and how often.
FINDING, REFINING, TIMES = range(2, 6), range(4, 8), 3


def told(maps: Tensor, tells: Tensor) -> Tensor:
    """Return the share of each telling token of the attention to all of them, [N, cells, WORDS], in their order.

    Args:
        maps: attention, [N, cells, tokens].
        tells: bool [N, tokens], the tokens that tell what is seen.

    Raises:
        ValueError: a caption has more such tokens than ``WORDS``.
    """
    if tells.sum(dim=1).max() > WORDS:
        raise ValueError(f"{int(tells.sum(dim=1).max())} words of a caption tell what is seen: at most {WORDS} can")
    tells = F.pad(tells, (0, WORDS))
    place = tells.int().argsort(dim=1, descending=True, stable=True)[:, :WORDS]
    maps = F.pad(maps, (0, WORDS)).gather(2, place[:, None].expand(-1, maps.shape[1], -1))
    return shares(maps * tells.gather(1, place)[:, None])


def stretched(maps: Tensor) -> Tensor:
    """Return maps [N, cells, words], each stretched to [0, 1] over the cells, as shares again."""
    low, high = maps.amin(dim=1, keepdim=True), maps.amax(dim=1, keepdim=True)
    return shares((maps - low) / (high - low).clamp(min=1e-8))


class Teachers:
    """The two pipelines. Calling them returns what they find, [N, WORDS, h/2, w/2] in [0, 1]."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.noise = device, DDPMScheduler(**NOISE)
        self.sd = StableDiffusionPipeline.from_pretrained(embedded.path(), dtype=torch.float32).to(device)
        self.dit = PixArtAlphaPipeline.from_pretrained(embedded.path("embedded-dit"), dtype=torch.float32).to(device)
        self.unet_model = Denoising(self.sd.unet, self.sd.text_encoder).to(device)
        self.dit_model = Masked(self.dit.transformer, self.dit.text_encoder).to(device)
        self.tells = [telling(pipe.tokenizer).to(device) for pipe in (self.sd, self.dit)]

    @torch.no_grad()
    def __call__(self, x: Tensor, captions: Sequence[str], generator: Generator) -> Tensor:
        """Look at latents ``x``, [N, 4, h, w], with noise from ``generator``, under their ``captions``."""
        t = torch.full((len(x),), T)
        noisy = self.noise.add_noise(x, torch.randn(x.shape, generator=generator), t)
        noisy, t = noisy.to(self.device), t.to(self.device)
        found = (self.unet(noisy, t, captions) + self.transformer(noisy, t, captions)) / 2
        return found.transpose(1, 2).unflatten(2, (x.shape[2] // 2, x.shape[3] // 2))

    def unet(self, noisy: Tensor, t: Tensor, captions: Sequence[str]) -> Tensor:
        """Return what the cross-attention of the UNet's layers ``READING`` finds, [N, cells, WORDS].

        Of words that are past the tokens that it reads, one caption in a hundred and fifty, it finds nothing.
        """
        ids = self.sd.tokenizer(
            [*captions], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.to(self.device)  # fmt: skip
        with capture(self.sd.unet, READING, heads="mean") as maps:
            self.unet_model.predict(noisy, t, self.unet_model.read(ids), ids)
        mean = torch.stack([each.flatten(1, 2) for each in maps.values()]).mean(dim=0)
        return stretched(told(mean, self.tells[0][ids]))

    def transformer(self, noisy: Tensor, t: Tensor, captions: Sequence[str]) -> Tensor:
        """Return what the transformer's cross-attention finds, spread ``TIMES`` along its self-attention."""
        ids = self.dit.tokenizer([*captions], padding="longest", return_tensors="pt").input_ids.to(self.device)
        crossed, own = [f"vit-block{i}-cross-map" for i in FINDING], [f"vit-block{i}-self-map" for i in REFINING]
        with capture(self.dit.transformer, [*crossed, *own], heads="mean") as maps:
            self.dit_model.predict(noisy, t, self.dit_model.read(ids), ids)
        found, along = (torch.stack([maps[key].flatten(1, 2) for key in of]).mean(dim=0) for of in (crossed, own))
        found = told(found, self.tells[1][ids])
        return stretched(torch.linalg.matrix_power(along, TIMES) @ found)


def main() -> None:
    """Note what the teachers find in the large scenes, in chunks; those that are there already stay."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    state = PartialState(cpu=CPU)
    teachers = Teachers(state.device)
    with first():
        x, captions = latents("large", AutoencoderKL.from_pretrained(VAE_FOLDER).eval()), load("large")[1]
    for begin in range(state.process_index * CHUNK, len(x), state.num_processes * CHUNK):
        path = FOLDER / f"{begin:05d}.pt"
        if path.exists():
            continue
        generator, found, end = Generator().manual_seed(SEED + begin), [], min(begin + CHUNK, len(x))
        for i in range(begin, end, BATCH):
            rows = slice(i, min(i + BATCH, end))
            each = [teachers(x[rows].float(), [one[k] for one in captions[rows]], generator) for k in range(CAPTIONS)]
            found.append((255 * torch.stack(each, dim=1)).round().to("cpu", torch.uint8))
        save(path, {"shown": torch.cat(found)})
        print(path, flush=True)


if __name__ == "__main__":
    main()
