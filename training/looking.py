"""How much a UNet's cross-attention looks at words."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor


class Watched:
    """An attention processor that keeps, of its last call, how much of the attention falls on each token."""

    def __init__(self) -> None:
        self._share: Tensor | None = None

    def take(self) -> Tensor:
        """Return the mean over heads and cells, [N, tokens], each row summing to 1, and forget it."""
        assert self._share is not None, "the layer has not run"
        share, self._share = self._share, None
        return share

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> Tensor:
        query, key, value = (
            attn.head_to_batch_dim(project(x))
            for project, x in (
                (attn.to_q, hidden_states), (attn.to_k, encoder_hidden_states), (attn.to_v, encoder_hidden_states),
            )
        )  # fmt: skip
        probabilities = attn.get_attention_scores(query, key)
        self._share = probabilities.unflatten(0, (-1, attn.heads)).mean(dim=(1, 2))
        project, dropout = attn.to_out
        mixed: Tensor = dropout(project(attn.batch_to_head_dim(probabilities @ value)))
        return mixed


def watch(unet: UNet2DConditionModel, but: Sequence[str]) -> list[Watched]:
    """Watch all layers of cross-attention outside the blocks whose names begin with one of ``but``."""
    found = dict(unet.attn_processors)
    for name in found:
        if ".attn2." in name and not name.startswith(tuple(but)):
            found[name] = Watched()
    unet.set_attn_processor(dict(found))
    return [one for one in found.values() if isinstance(one, Watched)]
