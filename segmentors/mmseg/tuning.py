"""What may learn in a model that is otherwise frozen: low-rank adapters, and the embedding of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_features import FeatureExtractor
from diffusion_features.families import unwrap

#: The projections of attention, as diffusers names them in every family.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(denoiser: nn.Module, r: int = 16, alpha: int = 16, targets: Sequence[str] = TARGETS) -> nn.ParameterDict:
    """Put low-rank adapters (arXiv 2106.09685) beside linear layers and return their weights, the only ones that learn.

    Args:
        denoiser: of diffusers.
        r: the rank.
        alpha: the update is scaled by ``alpha / r``.
        targets: ends of the names of the layers.

    Raises:
        ImportError: peft is not installed.
        ValueError: no layer has such a name.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("tune=dict(type='lora') needs peft: pip install peft") from error
    inner: Any = unwrap(denoiser)
    inner.add_adapter(LoraConfig(r=r, lora_alpha=alpha, target_modules=[*targets]))
    # A parameter's name may not have a dot. The objects are the model's own, so training one trains the other.
    return nn.ParameterDict({name.replace(".", "/"): p for name, p in inner.named_parameters() if "lora_" in name})


class LearntPrompt(nn.Module):
    """The text embedding as a parameter (tokens, C), which every call of the denoiser gets in place of a prompt's.

    What else a family tells its denoiser (the pooled embedding of SDXL, SD3 and Flux) stays that of the prompt.
    """

    def __init__(self, fx: FeatureExtractor, prompt: str) -> None:
        """Begin with the embedding of ``prompt``.

        Raises:
            ValueError: the family has no single text embedding.
        """
        super().__init__()
        with torch.no_grad():
            (conditions,) = fx.family.encode_prompts(fx.pipe, [prompt])
        if not isinstance(getattr(conditions, "text", None), Tensor):
            raise ValueError(f"learn_prompt needs a model with one text embedding; {fx.family.__name__} has several")
        self.embedding = nn.Parameter(conditions.text.detach().float().clone())
        unwrap(fx.denoiser).register_forward_pre_hook(self._put_in, with_kwargs=True)

    def _put_in(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given: Tensor = kwargs["encoder_hidden_states"]
        return args, {**kwargs, "encoder_hidden_states": self.embedding.to(given).expand(len(given), -1, -1)}
