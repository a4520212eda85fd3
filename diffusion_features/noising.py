"""From ``t`` to what the denoiser sees: exact noise levels, seeded noise, and deterministic steps between levels.

Written on ᾱ_t itself, so that it is the same for every scheduler a pipeline may carry (PNDM, DDIM, Euler, DPM-Solver):
their ``add_noise`` and ``scale_model_input`` differ, the denoiser's input at timestep t does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

Predict = Callable[[Tensor, int], Tensor]


def check_t(t: int, scheduler: Any) -> int:
    """``t`` if the scheduler's model can be conditioned on it: a training timestep, or 1000·σ for flow matching.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is out of range, or the scheduler has neither ᾱ_t nor flow matching (EDM).
    """
    if isinstance(t, bool) or not isinstance(t, (int, np.integer)):
        raise TypeError(f"t must be an integer, not {t!r}")
    if is_flow(scheduler):
        if not 0 <= t <= 1000:
            raise ValueError(f"t={t} is out of range: it is 1000·sigma, between 0 (clean) and 1000 (pure noise)")
        return int(t)
    if not hasattr(scheduler, "alphas_cumprod") or "EDM" in type(scheduler).__name__:
        raise ValueError(f"{type(scheduler).__name__} has no alphas_cumprod: its model is not conditioned on timesteps")
    last = len(scheduler.alphas_cumprod) - 1
    if not 0 <= t <= last:
        raise ValueError(f"t={t} is out of range: it must be between 0 (clean) and {last} (pure noise)")
    return int(t)


def is_flow(scheduler: Any) -> bool:
    """Whether the model was trained by flow matching: ``x = (1-σ) x_0 + σ ε``, and t is 1000·σ after any shift."""
    kind = getattr(scheduler.config, "prediction_type", None)
    return "FlowMatch" in type(scheduler).__name__ or kind == "flow_prediction"


def signal_and_noise(scheduler: Any, t: int) -> tuple[float, float]:
    """What x_0 and ε are multiplied by: (√ᾱ_t, √(1-ᾱ_t)), or (1-σ, σ) for flow matching; computed in float64."""
    if is_flow(scheduler):
        return 1 - t / 1000, t / 1000
    alpha_bar = float(scheduler.alphas_cumprod[t].double())
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def add_noise(clean: Tensor, noise: Tensor, t: int, scheduler: Any) -> Tensor:
    """``x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε`` (DDPM, arXiv 2006.11239, eq. 4), or ``(1-σ) x_0 + σ ε`` for flow matching."""
    signal, sigma = signal_and_noise(scheduler, t)
    return signal * clean + sigma * noise


def ddim_move(noisy: Tensor, prediction: Tensor, t: int, target: int, scheduler: Any) -> Tensor:
    """One deterministic DDIM step from level ``t`` to level ``target``, up (inversion) or down (denoising).

    ``x_target = √ᾱ_target x̂_0 + √(1-ᾱ_target) ε̂`` (arXiv 2010.02502, eq. 12 with σ=0).

    Args:
        noisy: x_t, (B, c, h, w).
        prediction: the denoiser's output at t: ε, v, x_0 or velocity, as the scheduler's ``prediction_type`` says.
    """
    signal, sigma = signal_and_noise(scheduler, t)
    kind = "flow_prediction" if is_flow(scheduler) else scheduler.config.prediction_type
    if kind == "flow_prediction":  # the velocity ε - x_0
        clean = noisy - sigma * prediction
        eps = noisy + signal * prediction
    elif kind == "epsilon":
        eps = prediction
        clean = (noisy - sigma * eps) / signal
    elif kind == "v_prediction":
        eps = signal * prediction + sigma * noisy
        clean = signal * noisy - sigma * prediction
    elif kind == "sample":
        clean = prediction
        eps = (noisy - signal * clean) / sigma
    else:
        raise ValueError(f"prediction type {kind!r} is not known; known are epsilon, v_prediction and sample")
    return add_noise(clean, eps, target, scheduler)


def travel(latents: Tensor, start: int, target: int, steps: int, predict: Predict, scheduler: Any) -> Tensor:
    """Latents carried from level ``start`` to level ``target`` in at most ``steps`` DDIM steps."""
    levels = list(dict.fromkeys(round(x) for x in np.linspace(start, target, steps + 1)))
    for t, following in pairwise(levels):
        latents = ddim_move(latents, predict(latents, t), t, following, scheduler)
    return latents


class Draw:
    """Gaussian draws, one CPU float32 generator an image: image i of a batch draws what it would draw alone.

    Args:
        seed: one for all images, or one an image; ``torch.Generator`` reads the lower 32 bits of each.
        batch: number of images.
        stream: independent draws from the same seed, so that sampling the VAE posterior leaves the noise as it is.

    Raises:
        ValueError: another number of seeds than images.
    """

    def __init__(self, seed: int | Sequence[int], batch: int, stream: int = 0) -> None:
        seeds = [seed] * batch if isinstance(seed, (int, np.integer)) else list(seed)
        if len(seeds) != batch:
            raise ValueError(f"{len(seeds)} seeds for {batch} images: give one seed, or one an image")
        self._generators = [torch.Generator("cpu").manual_seed(_of_stream(int(s), stream)) for s in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        """(B, ...) standard normal in the shape, dtype and device of ``like``."""
        shape = like.shape[1:]
        rows = [torch.randn(shape, generator=g, dtype=torch.float32, device="cpu") for g in self._generators]
        return torch.stack(rows).to(like)


def _of_stream(seed: int, stream: int) -> int:
    """The seed itself for stream 0; for others a mixture of both that fits into the 32 bits that are read."""
    return seed if stream == 0 else int(np.random.SeedSequence([seed % 2**32, stream]).generate_state(1)[0])
