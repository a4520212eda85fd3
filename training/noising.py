"""The objective that the UNet, its ControlNet and its adapters share: predicting noise, weighted by level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from fnmatch import fnmatch
from typing import Any, Final

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Generator, Tensor, nn

from diffusion_features import capture

NOISE: Final[dict[str, Any]] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
}  # fmt: skip
#: t = 1000 u^LEAN for u uniform in [0, 1): at low t the image says everything and the caption nothing.
LEAN = 0.7
SNR = 5.0
#: Weight of the loss of tokens that shall say nothing.
SILENCE = 0.2
#: Price of the share of attention that falls on words, or on all that tells nothing, in the maps that have one.
PRICE = 0.01
#: Weight of how far attention is from where it was shown to be.
FOLLOWING = 0.1


class Denoising(nn.Module):
    """A denoiser and a text encoder; calling it returns the losses of a batch."""

    def __init__(
        self,
        unet: nn.Module,
        text: nn.Module,
        control: nn.Module | None = None,
        priced: Sequence[str] = (),
        reading: Sequence[str] = (),
        telling: Tensor | None = None,
        following: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if reading and telling is None:
            raise ValueError("reading needs telling: which tokens say what is seen")
        self.unet, self.text, self.control = unet, text, control
        self.priced, self.reading, self.following = [*priced], [*reading], [*following]
        self.register_buffer("telling", telling, persistent=False)
        self.register_buffer("kept", DDPMScheduler(**NOISE).alphas_cumprod, persistent=False)

    def forward(
        self,
        latents: Tensor,
        ids: Tensor,
        t: Tensor,
        noise: Tensor,
        hint: Tensor | None = None,
        silent: Tensor | None = None,
        shown: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return "loss", weighted, "plain", the mean squared error of the noise, and its other parts (scalars).

        Args:
            latents, noise: [N, 4, h, w], clean and standard normal.
            ids: token ids, int64 [N, tokens].
            t: int64 [N], 0 to 999.
            hint: [N, 3, H, W] in [0, 1], for a ControlNet.
            silent: bool [N, tokens], those that shall say nothing: the denoiser reads an empty caption's instead, and
                how far the text encoder's are from these, "spoken", is part of the loss.
            shown: [N, cells, tokens], where attention shall be in the maps that are ``following``, all of it in each
                cell (less, if words were cut off) or, where nothing is known, none; how far their mean is from it,
                times the share of the signal that is left at t, "strays", is part of the loss.

        Of maps that are ``priced``, the share of attention that falls on words, "looks", is part of the loss too; of
        those that are ``reading``, the share that falls on anything but tokens that are ``telling``, "idles".

        With ``r`` the signal-to-noise ratio at t, the weight is min(min(r + 1, 5) / r, 5): that of a velocity
        prediction with ``r`` clipped (min-SNR, Hang et al. 2023). It favours the levels where the caption still says
        something that the noisy image does not.
        """
        kept = self.kept[t].view(-1, 1, 1, 1)  # type: ignore[index]
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        text, spoken = self.read(ids), {}
        watched = [*self.priced, *self.reading, *(self.following if shown is not None else ())]
        if silent is not None:
            nothing = self.nothing(ids)
            spoken["spoken"] = F.mse_loss(text[silent], nothing.detach().expand_as(text)[silent])
            text = torch.where(silent[..., None], nothing, text)
        with capture(self.unet, watched, heads="mean", grad=True) if watched else nullcontext({}) as maps:
            predicted = self.predict(noisy, t, text, ids, hint)
        shares = self.attended(maps, ids)
        strays = {} if shown is None else {"strays": astray(maps, self.following, shown, kept.flatten())}
        each = F.mse_loss(predicted.float(), noise, reduction="none").mean(dim=(1, 2, 3))
        ratio = (kept / (1 - kept)).flatten()
        weight = ((ratio + 1).clamp(max=SNR) / ratio).clamp(max=SNR)
        loss = (weight * each).mean() + SILENCE * sum(spoken.values()) + PRICE * sum(shares.values())
        loss = loss + FOLLOWING * sum(strays.values())
        return {"loss": loss, "plain": each.mean().detach(), **spoken, **shares, **strays}

    def attended(self, maps: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        """Return the shares of attention that have a price, scalars, from maps [N, heads, cells, tokens]."""
        found = {}
        if self.priced:
            found["looks"] = share(maps, self.priced, self.words(ids)).mean()
        if self.reading:
            tells = self.telling[ids]  # type: ignore[index]
            some = tells.any(dim=1)  # captions without such a word do not count
            found["idles"] = ((1 - share(maps, self.reading, tells)) * some).sum() / some.sum().clamp(min=1)
        return found

    def read(self, ids: Tensor) -> Tensor:
        """Return the text encoder's last hidden state, [N, tokens, width]."""
        text: Tensor = self.text(ids).last_hidden_state
        return text

    def words(self, ids: Tensor) -> Tensor:
        """Where the words of a caption are, bool [N, tokens]: after its start token and before its end token."""
        return (ids != ids[:, :1]) & (ids != ids[:, -1:])

    def nothing(self, ids: Tensor) -> Tensor:
        """Return what ``read`` returns of an empty caption, [1, tokens, width]."""
        start, end = ids[:1, :1], ids[:1, -1:]
        return self.read(torch.where(torch.arange(ids.shape[1], device=ids.device) > 0, end, start))

    def predict(self, noisy: Tensor, t: Tensor, text: Tensor, ids: Tensor, hint: Tensor | None = None) -> Tensor:
        """Return the predicted noise, [N, 4, h, w]."""
        residuals = {}
        if self.control is not None:
            down, mid = self.control(noisy, t, text, hint, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        predicted: Tensor = self.unet(noisy, t, text, **residuals).sample
        return predicted


def share(maps: Mapping[str, Tensor], which: Sequence[str], tokens: Tensor) -> Tensor:
    """Return the share [N] of attention on ``tokens``, bool [N, tokens], in maps [N, heads, cells, tokens]."""
    means = torch.stack([each.mean(dim=(1, 2)) for each in named(maps, which)]).mean(dim=0)
    return (means * tokens).sum(dim=1)


def astray(maps: Mapping[str, Tensor], which: Sequence[str], shown: Tensor, kept: Tensor) -> Tensor:
    """Return kept * KL(shown || the mean of the maps), in nats: the mean over the cells of which something is shown.

    Args:
        maps: attention, [N, heads, cells, tokens] each.
        shown: the same as [N, cells, tokens]; it sums to at most 1 in a cell, or to 0 where nothing is known.
        kept: [N], the share of each image's signal that noise has left: what noise hides, attention cannot know.
    """
    mean = torch.stack(named(maps, which)).float().mean(dim=(0, 2))
    each = F.kl_div(mean.clamp(min=1e-6).log(), shown, reduction="none").sum(dim=2)
    some = shown.sum(dim=2) > 0
    return (kept[:, None] * each * some).sum() / some.sum().clamp(min=1)


def named(maps: Mapping[str, Tensor], which: Sequence[str]) -> list[Tensor]:
    """Return those of ``maps`` that a pattern of ``which`` names."""
    return [each for key, each in maps.items() if any(fnmatch(key, one) for one in which)]


def noised(latents: Tensor, ids: Tensor, generator: Generator) -> dict[str, Tensor]:
    """A batch for ``Denoising``: latents and ids with timesteps and noise drawn for them."""
    t = 1000 * torch.rand(len(latents), generator=generator, dtype=torch.float64) ** LEAN
    return {"latents": latents, "ids": ids, "t": t.long(), "noise": torch.randn(latents.shape, generator=generator)}
