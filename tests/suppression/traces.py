"""Whether two calls gave the same, and whether anything was left behind in a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion_features import FeatureExtractor
from tests.suppression.models import photo


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[id], b[id]) for id in a)


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for id in a:
        torch.testing.assert_close(a[id], b[id], rtol=1e-4, atol=1e-5)


def snapshot(fx: FeatureExtractor) -> dict[str, Any]:
    """Everything that a technique could leave behind in the denoiser and the text encoders.

    VAEs are left out, because some note how they were called last; so do other models at their first call.
    """
    fx(photo(), "a cat")
    found: dict[str, Any] = {}
    for name, part in fx.pipe.components.items():
        if isinstance(part, torch.nn.Module) and name != "vae":
            found |= {f"{name} {key}": value.clone() for key, value in part.state_dict().items()}
            found |= {f"{name} {key} grad": p.requires_grad for key, p in part.named_parameters()}
            found |= {
                f"{name} {key} module": (
                    type(m), id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__)
                )
                for key, m in part.named_modules()
            }  # fmt: skip
            found |= {f"{name} loaded": getattr(part, "_hf_peft_config_loaded", None)}
    return found


def left_behind(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs; and in which order the parts come counts too."""
    names = [key for key in before if key not in after] + [key for key in after if key not in before]
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        if not (torch.equal(a, b) if isinstance(a, Tensor) else a == b):
            names.append(f"{key}: {a} became {b}")
    return names if names or [*before] == [*after] else ["the order"]
