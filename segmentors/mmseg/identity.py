"""What a checkpoint remembers of the frozen model that it leaves out, so that a head never sits on another one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 64
#: Relative difference of two roundings of one weight: bfloat16 has 8 bits.
ROUNDING = 2e-2


def sample_weights(denoiser: nn.Module) -> list[float]:
    """One weight of each of up to 64 matrices spread over the model: enough to tell checkpoints apart in any dtype."""
    matrices = [p for _, p in sorted(denoiser.named_parameters()) if p.ndim > 1 and p.is_floating_point()]
    chosen = [matrices[i * len(matrices) // SAMPLES] for i in range(SAMPLES)] if len(matrices) > SAMPLES else matrices
    return [float(matrix.detach().flatten()[matrix.numel() // 2]) for matrix in chosen]


def pack(identity: Mapping[str, Any]) -> Tensor:
    """JSON as uint8 (n,): checkpoints of mmengine hold tensors."""
    return torch.tensor(list(json.dumps(identity).encode()), dtype=torch.uint8)


def unpack(packed: Tensor) -> dict[str, Any]:
    return json.loads(bytes(packed.tolist()))


def differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """What makes the backbone of a checkpoint another one, a phrase each; empty if it is the same."""
    found = []
    if not _close(saved["weights"], own["weights"]):
        found.append(f"the weights of the model are others (it was {saved['model']!r}, this is {own['model']!r})")
    for name in ("activations", "attention", "tune", "amalgamate"):
        if saved[name] != own[name]:
            found.append(f"{name} were {saved[name]}, here they are {own[name]}")
    return found


def _close(saved: list[float], own: list[float]) -> bool:
    if len(saved) != len(own):
        return False
    return torch.allclose(torch.tensor(saved), torch.tensor(own), rtol=ROUNDING, atol=1e-6)
