"""A small classifier of single-object scenes, trained on real renderings to judge generated ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diffusion_features.embedded import COLOURS, OBJECTS, TRAIN_SEED, Scene, render

#: Far from the scenes that the diffusion models are trained on.
SEED = TRAIN_SEED + 5_000_000
SIDE = 64


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of 2 SIDE pixels as float32 [N, 3, SIDE, SIDE] in [-1, 1]."""
    small = np.stack([np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)) for image in images])
    return torch.from_numpy(small).permute(0, 3, 1, 2).float() / 127.5 - 1


def single(seed: int) -> Scene:
    """A scene of one object, in the style "clean"."""
    return render(seed, 2 * SIDE, max_objects=1, style="clean")


def targets(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Numbers of the object and of its colour: int64 [N] each."""
    names, colours = OBJECTS, list(COLOURS)
    first = [scene.objects[0] for scene in scenes]
    return torch.tensor([names.index(o.name) for o in first]), torch.tensor([colours.index(o.colour) for o in first])


def train(count: int = 4000, epochs: int = 8) -> nn.Module:
    """Train on ``count`` renderings. [N, 3, SIDE, SIDE] → logits [N, objects + colours], objects first."""
    torch.manual_seed(0)
    scenes = [scene for scene in map(single, range(SEED, SEED + count)) if scene.objects]
    x, (names, colours) = pixels([scene.image for scene in scenes]), targets(scenes)
    model = nn.Sequential(
        *_block(3, 24), *_block(24, 48), *_block(48, 96), *_block(96, 128),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, len(OBJECTS) + len(COLOURS)),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    steps = epochs * (len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: len(x) // 64 * 64].view(-1, 64):
            batch = x[rows].flip(-1) if torch.rand(()) < 0.5 else x[rows]
            logits = model(batch)
            loss = F.cross_entropy(logits[:, : len(OBJECTS)], names[rows])
            loss = loss + F.cross_entropy(logits[:, len(OBJECTS) :], colours[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()]  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, images: Sequence[Image.Image], names: Tensor, colours: Tensor) -> dict[str, float]:
    """Shares of ``images`` whose object, colour, and both are recognised as said."""
    logits = model(pixels(images))
    right = logits[:, : len(OBJECTS)].argmax(1) == names
    tint = logits[:, len(OBJECTS) :].argmax(1) == colours
    return {"object": right.float().mean().item(), "colour": tint.float().mean().item(),
            "both": (right & tint).float().mean().item()}  # fmt: skip
