"""How features are kept on disk: exactly, rounded, or as their main components."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

DTYPES: Final = ("float32", "float16", "int8")


@dataclass(frozen=True)
class Compression:
    """What is lost of a feature when it is kept.

    Attributes:
        dtype: "float32" keeps everything; "float16" keeps 11 bits of each number; "int8" keeps whole multiples of a
            127th of the largest magnitude in the channel.
        components: keep each feature, as a matrix (C, h·w), by its largest ``components`` singular values: the nearest
            matrix of that rank (Eckart and Young 1936), which is principal component analysis of the image's own cells
            without centring. The two factors are kept in ``dtype``. A feature that is smaller itself is kept whole.

    Raises:
        ValueError: another dtype, or less than one component.
    """

    dtype: str = "float32"
    components: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"a cache keeps {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.components is not None and (not isinstance(self.components, int) or self.components < 1):
            raise ValueError(f"components must be a whole number above 0, or None, not {self.components!r}")

    def __str__(self) -> str:
        return self.dtype if self.components is None else f"{self.dtype}, {self.components} components"

    def pack(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """id → (1, C, h, w) as tensors to keep, named ``id:part``.

        Raises:
            FloatingPointError: a feature is too large for float16.
        """
        return {
            f"{id}:{name}{part}": kept
            for id, feature in features.items()
            for name, tensor in self._factors(feature.detach().float()).items()
            for part, kept in self._rounded(id, tensor).items()
        }

    def unpack(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What ``pack`` made, as float32 id → (1, C, h, w)."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in packed.items():
            id, _, part = name.rpartition(":")
            if not part.endswith("-scale"):
                scale = packed.get(f"{name}-scale")
                found.setdefault(id, {})[part] = tensor.float() if scale is None else tensor.float() * scale
        return {id: _product(parts) for id, parts in found.items()}

    def _factors(self, feature: Tensor) -> dict[str, Tensor]:
        """The feature, or (1, k, C) and (1, k, h, w) whose product it nearly is."""
        _, channels, height, width = feature.shape
        k, cells = self.components, height * width
        if k is None or k * (channels + cells) >= channels * cells:
            return {"whole": feature}
        u, s, v = torch.linalg.svd(feature[0].flatten(1), full_matrices=False)
        return {"directions": u[:, :k].T[None], "amounts": (s[:k, None] * v[:k]).reshape(1, k, height, width)}

    def _rounded(self, id: str, tensor: Tensor) -> dict[str, Tensor]:
        if self.dtype == "int8":
            scale = tensor.abs().amax(dim=[d for d in range(tensor.ndim) if d != 1], keepdim=True) / 127
            return {"": (tensor / scale.where(scale > 0, 1)).round().to(torch.int8), "-scale": scale}
        rounded = tensor.to(getattr(torch, self.dtype))
        if not torch.isfinite(rounded).all():
            raise FloatingPointError(f'{id} has values beyond float16; set cache=dict(folder=..., dtype="float32")')
        return {"": rounded}


def _product(parts: Mapping[str, Any]) -> Tensor:
    if "whole" in parts:
        return parts["whole"]
    return torch.einsum("bkc,bkhw->bchw", parts["directions"], parts["amounts"])
