"""xformers as an optional speed-up: used where a trial call proves that it works, PyTorch's own attention otherwise."""

from __future__ import annotations

import importlib
import logging
from functools import cache

import torch
from diffusers import ModelMixin

logger = logging.getLogger("diffusion_features")


def use_fast_attention(denoiser: ModelMixin) -> str:
    """Lets a denoiser on CUDA attend through xformers if that works there; otherwise leaves the denoiser alone.

    Why xformers is not used is logged in one line at level INFO, once a process.

    Returns:
        ``"xformers"``, or ``"sdpa"`` for PyTorch's ``scaled_dot_product_attention``.
    """
    weight = next(denoiser.parameters())
    reason = _why_not(weight.device, weight.dtype) or _enable(denoiser)
    if not reason:
        return "xformers"
    _notice(reason)
    return "sdpa"


def xformers_works(device: str | torch.device, dtype: torch.dtype) -> bool:
    """Whether xformers computes attention on this kind of device and in this dtype, found out by a trial call.

    Its own ``is_available`` is no answer: it is true where no kernel exists. The trial runs once for each kind of
    device and dtype.
    """
    return _trial(torch.device(device).type, dtype) is None


def _why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"the model is on {device.type}, not on CUDA"
    return _trial(device.type, dtype)


@cache
def _trial(device_type: str, dtype: torch.dtype) -> str | None:
    """Attention over a few tokens by xformers; returns why it failed, or None."""
    try:
        ops = importlib.import_module("xformers.ops")
    except ModuleNotFoundError as error:
        # A package that xformers itself misses is a broken installation, not an absent one.
        return "it is not installed" if (error.name or "").startswith("xformers") else f"its import failed ({error})"
    except Exception as error:  # a binary built for another PyTorch fails to import in many ways
        return f"its import failed ({_first_line(error)})"
    try:
        tokens = torch.ones(1, 16, 2, 40, device=device_type, dtype=dtype)
        ops.memory_efficient_attention(tokens, tokens, tokens)
    except Exception as error:  # no kernel: NotImplementedError, RuntimeError or AssertionError, by version
        return f"a trial call on {device_type} in {dtype} failed ({_first_line(error)})"
    return None


def _enable(denoiser: ModelMixin) -> str | None:
    """Switches xformers on; returns why that failed, or None."""
    try:
        denoiser.enable_xformers_memory_efficient_attention()
    except Exception as error:  # diffusers makes a trial call of its own, in float32, before it changes anything
        return f"diffusers refused it ({_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


_noticed: list[str] = []


def _notice(reason: str) -> None:
    if not _noticed:
        _noticed.append(reason)
        logger.info("xformers is not used: %s; attention runs through PyTorch's own kernels.", reason)
