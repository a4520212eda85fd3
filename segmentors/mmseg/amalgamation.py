"""Several variants of the same features into one, as arXiv 2410.06719 does."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_features.suppression.amalgamate import WeightAssigner, assigner_loss, averaged, concatenated

from .levels import Level

WAYS = ("concatenated", "averaged", "assigned")


class Amalgamation(nn.Module):
    """Variants side by side, their mean, or mixtures whose weights are learnt with the head.

    Attributes:
        loss: what the last call adds to the loss of the task; ``None`` before one, or where nothing is added.
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        variants: Sequence[Any],
        how: str = "assigned",
        *,
        assigners: int = 1,
        sparsity: float = 0.0,
        diversity: float = 0.0,
    ) -> None:
        """
        Args:
            channels: of each feature, id → C.
            variants: as many as there are.
            how: "concatenated", "averaged", or "assigned", by a ``WeightAssigner`` for each feature.
            assigners: how many mixtures are put side by side.
            sparsity, diversity: γ1 and γ2 of ``assigner_loss``; the released code has neither.

        Raises:
            ValueError: there is no such way.
        """
        super().__init__()
        if how not in WAYS:
            near = difflib.get_close_matches(str(how), WAYS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"variants are {', '.join(WAYS)}, not {how!r}{hint}")
        self.ids, self.variants = [*channels], len(variants)
        self.how, self.sparsity, self.diversity = how, sparsity, diversity
        self.times = {"concatenated": self.variants, "averaged": 1, "assigned": assigners}[how]
        learns = channels if how == "assigned" else {}
        self.assigners = nn.ModuleDict({id: WeightAssigner(count, assigners) for id, count in learns.items()})
        self.loss: Tensor | None = None

    def widened(self, level: Level) -> Level:
        """A level with the channels that its features have afterwards."""
        return replace(level, channels=tuple(self.times * count for count in level.channels))

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``number/id`` → (B, C, h, w) of each variant → id → (B, times · C, h, w)."""
        several = [{id: features[f"{number}/{id}"].float() for id in self.ids} for number in range(self.variants)]
        if self.how != "assigned":
            return concatenated(several) if self.how == "concatenated" else averaged(several)
        mixed = {id: assigner([one[id] for one in several]) for id, assigner in self.assigners.items()}
        if self.sparsity or self.diversity:
            losses = [assigner_loss(weights, self.sparsity, self.diversity) for _, weights in mixed.values()]
            self.loss = torch.stack(losses).mean()
        return {id: features for id, (features, _) in mixed.items()}


def losses(backbone: nn.Module) -> dict[str, Tensor]:
    """What the amalgamations of a backbone add to the loss of the task, as mmengine sums it."""
    found = [m.loss for m in backbone.modules() if isinstance(m, Amalgamation) and m.loss is not None]
    return {"loss_amalgamation": torch.stack(found).sum()} if found else {}
