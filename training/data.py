"""Scenes as the denoisers are trained on them: latents, made once, and captions as token ids and what they tell."""

from __future__ import annotations

import numpy as np
import torch
from common import save
from diffusers import AutoencoderKL
from scenes import RUNS, load
from torch import Generator, Tensor
from transformers import PreTrainedTokenizerBase

from diffusion_features.embedded.world import BACKGROUNDS, COLOURS, OBJECTS
from diffusion_features.embedded.world.backgrounds import LOOKS
from diffusion_features.embedded.world.captions import SYNONYMS

#: The share of captions that are left empty, for classifier-free guidance.
EMPTY = 0.1


def tensor(pixels: np.ndarray) -> Tensor:
    """Turn uint8 [N, H, W, 3] into float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


@torch.no_grad()
def latents(name: str, vae: AutoencoderKL) -> Tensor:
    """Return the scaled latents of set ``name``, float16 [N, 4, S/4, S/4], from disk if they are there."""
    path = RUNS / f"{name}_latents.pt"
    if not path.exists():
        images = load(name)[0]
        means = [vae.encode(tensor(images[i : i + 16])).latent_dist.mode() for i in range(0, len(images), 16)]
        save(path, {"latents": (torch.cat(means) * vae.config.scaling_factor).half()})
    found: Tensor = torch.load(path)["latents"]
    return found


def telling(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return which tokens name something in a picture or say what it looks like, bool [vocabulary].

    All others, "a", "photo", "of" and commas among them, are nowhere in particular.
    """
    looks = {look for of in LOOKS.values() for look, *_ in of}
    names = {*OBJECTS, *BACKGROUNDS, *(other for of in SYNONYMS.values() for other in of)}
    found = torch.zeros(len(tokenizer), dtype=torch.bool)
    for word in sorted(names | looks | {*COLOURS, "small", "large"}):
        (token,) = tokenizer(word, add_special_tokens=False).input_ids
        found[token] = True
    return found


class Captioned:
    """Latents and captions of one scene set, the captions as token ids of length ``tokens``."""

    def __init__(
        self, latents: Tensor, captions: list[list[str]], tokenizer: PreTrainedTokenizerBase, tokens: int
    ) -> None:
        self.latents = latents
        flat = [text for scene in captions for text in scene]
        ids = tokenizer(
            [*flat, ""], padding="max_length", max_length=tokens, truncation=True, return_tensors="pt"
        ).input_ids
        self.empty = ids[-1]
        self.ids = ids[:-1].view(len(captions), -1, tokens).to(torch.int16)

    def draw(self, size: int, generator: Generator) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Return which scenes and which of their captions, latents [size, 4, h, w] and ids [size, tokens].

        All are int64 but for the latents, float32.
        """
        rows = torch.randint(len(self.latents), (size,), generator=generator)
        captions = torch.randint(self.ids.shape[1], (size,), generator=generator)
        drop = torch.rand(size, generator=generator) < EMPTY
        ids = torch.where(drop[:, None], self.empty, self.ids[rows, captions].long())
        return (rows, captions), self.latents[rows].float(), ids
