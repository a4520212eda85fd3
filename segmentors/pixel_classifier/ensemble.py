"""The ensemble: ten small networks that label a pixel by its features, their vote and their disagreement."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_features.sampling import Features

MEMBERS = 10
MANY_CLASSES = 30
"""From here on the layers of a member are twice as wide, and more."""
PIXELS = 2**14
"""Labelled at a time: with 3,840 channels in float32, 240 MiB."""
TOP = 0.1
"""An image's uncertainty is the mean of this share of its pixels, the least certain ones."""


class Prediction(NamedTuple):
    """labels: int64 (H, W), the vote of the members. uncertainty: (H, W), in nats, 0 where all members agree."""

    labels: Tensor
    uncertainty: Tensor

    @property
    def doubt(self) -> float:
        """The mean uncertainty of the tenth of the pixels that are least certain: what to label next."""
        flat = self.uncertainty.flatten()
        return flat.topk(max(1, int(TOP * len(flat)))).values.mean().item()


class Ensemble(nn.Module):
    """Members Linear-ReLU-BatchNorm-Linear-ReLU-BatchNorm-Linear over the channels of one pixel.

    Hidden widths are 128 and 32 for fewer than 30 classes, else 256 and 128 (arXiv 2112.03126, section 4).
    """

    def __init__(self, channels: int, classes: int, members: int = MEMBERS, seed: int = 0) -> None:
        """
        Args:
            channels: of all activations together.
            classes: labels are 0 to classes - 1.
            members: how many networks vote.
            seed: of their initial weights, normal with deviation 0.02.

        Raises:
            ValueError: one of the numbers is too small.
        """
        super().__init__()
        if channels < 1 or classes < 2 or members < 1:
            raise ValueError(f"{channels} channels, {classes} classes and {members} members make no ensemble")
        self.channels, self.classes = channels, classes
        self.members = nn.ModuleList(_member(channels, classes, seed * members + i) for i in range(members))

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of pixels (n, channels) -> logits of each member (members, n, classes)."""
        return torch.stack([member(pixels) for member in self.members])

    @torch.no_grad()
    def predict(self, features: Features, size: tuple[int, int]) -> Prediction:
        """Label every pixel of an image.

        Args:
            features: id -> (C, h, w), the activations of the training, in its order; enlarged bilinearly, some rows of
                pixels at a time.
            size: (height, width) of the result.

        Raises:
            ValueError: the activations have other channels together.
        """
        if (channels := sum(tensor.shape[0] for tensor in features.values())) != self.channels:
            raise ValueError(f"the activations have {channels} channels together; this ensemble is for {self.channels}")
        was_training = self.training
        self.eval()
        weight = next(self.parameters())
        step = max(1, PIXELS // size[1])
        parts = []
        for top in range(0, size[0], step):
            rows = range(top, min(top + step, size[0]))
            cells = torch.cat([_rows(tensor.to(weight), rows, size) for tensor in features.values()])
            parts.append(vote(self(cells.flatten(1).T)))
        self.train(was_training)
        labels, uncertainty = (torch.cat(column).view(size) for column in zip(*parts, strict=True))
        return Prediction(labels, uncertainty)


def vote(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The label that most members choose, the lowest of several; and the Jensen-Shannon divergence of their
    distributions, H(mean p) - mean H(p), in nats.

    Args:
        logits: (members, n, classes).

    Returns:
        int64 (n,) and float (n,).
    """
    counts = F.one_hot(logits.argmax(dim=2), logits.shape[2]).sum(dim=0)
    log_p = logits.log_softmax(dim=2)
    mean = log_p.exp().mean(dim=0)
    divergence = torch.special.entr(mean).sum(dim=1) + (log_p.exp() * log_p).sum(dim=2).mean(dim=0)
    return counts.argmax(dim=1), divergence.clamp(min=0)


def _member(channels: int, classes: int, seed: int) -> nn.Sequential:
    wide, narrow = (128, 32) if classes < MANY_CLASSES else (256, 128)
    member = nn.Sequential(
        nn.Linear(channels, wide), nn.ReLU(), nn.BatchNorm1d(wide),
        nn.Linear(wide, narrow), nn.ReLU(), nn.BatchNorm1d(narrow), nn.Linear(narrow, classes),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for layer in member:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0.0, 0.02, generator=generator)
            nn.init.zeros_(layer.bias)
    return member


def _rows(tensor: Tensor, rows: range, size: tuple[int, int]) -> Tensor:
    """Some rows of ``interpolate(tensor, size, "bilinear")``: (C, len(rows), width)."""
    height = tensor.shape[1]
    centre = (torch.arange(rows.start, rows.stop, device=tensor.device, dtype=tensor.dtype) + 0.5) * height / size[0]
    place = (centre - 0.5).clamp(0, height - 1)
    above = place.long()
    share = (place - above)[:, None]
    below = (above + 1).clamp(max=height - 1)
    mixed = tensor[:, above] * (1 - share) + tensor[:, below] * share
    return F.interpolate(mixed, size[1], mode="linear", align_corners=False)
