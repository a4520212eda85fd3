"""Features of a frozen model on disk, so that an epoch from the second on costs the head alone.

    folder/
      3f0c.../settings.json                 everything the features below depend on besides image and prompt
      3f0c.../7a/7a91....safetensors        one image's features, named by the digest of its pixels and prompt

A file is found by all that its features depend on: the weights, configurations and versions, the options, the prompt,
and the very pixels that reach the model. So a stale feature is never read: what changes anything is simply not there.
An augmented view is another image; only views that come back exactly, as ``FixedViews`` makes them, are found again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from diffusion_features import FeatureExtractor

from .compression import Compression

PACKAGES: Final = ("diffusion-features", "torch", "diffusers", "transformers")


class FeatureCache:
    """A folder of features that any number of processes may read and fill at once.

    Images are computed one at a time: in a batch, the last bits of a feature depend on its neighbours.
    """

    def __init__(
        self, folder: str | os.PathLike[str], settings: Mapping[str, Any], compression: Compression | None = None
    ) -> None:
        """
        Args:
            folder: made if it does not exist.
            settings: everything that features depend on besides the image and its prompt, as JSON values.
            compression: float32, which loses nothing, if not given.

        Raises:
            OSError: the folder cannot be written.
        """
        self.compression = compression or Compression()
        described = json.dumps({**settings, "compression": asdict(self.compression)}, sort_keys=True, indent=1)
        self.folder = Path(folder) / hashlib.sha256(described.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        _publish(self.folder / "settings.json", described.encode())

    def get(self, pixels: Tensor, prompt: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The features of one image as they are kept: id → float32 (1, C, h, w), on the image's device.

        Args:
            pixels: (3, H, W).
            compute: makes them if they are not kept yet.

        Raises:
            FloatingPointError: a feature is too large for float16.
        """
        name = _digest(pixels, prompt)
        path = self.folder / name[:2] / f"{name}.safetensors"
        try:
            packed = load(path.read_bytes())
        except (FileNotFoundError, SafetensorError):  # not made yet, or damaged since
            packed = self.compression.pack(compute())
            path.parent.mkdir(exist_ok=True)
            _publish(path, save({name: tensor.cpu().contiguous() for name, tensor in packed.items()}))
        return self.compression.unpack({name: tensor.to(pixels.device) for name, tensor in packed.items()})


def describe(fx: FeatureExtractor) -> dict[str, Any]:
    """What an extractor's features depend on: weights, configurations, dtype, and versions of the packages."""
    components = {name: part for name, part in sorted(fx.pipe.components.items()) if part is not None}
    return {
        "weights": {name: _weights(part) for name, part in components.items() if isinstance(part, nn.Module)},
        "configs": {name: json.loads(json.dumps(dict(part.config), default=str)) for name, part in components.items()
                    if isinstance(getattr(part, "config", None), Mapping)},
        "dtype": str(fx.dtype),
        "versions": {package: metadata.version(package) for package in PACKAGES},
    }  # fmt: skip


def _weights(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _digest(pixels: Tensor, prompt: str) -> str:
    digest = hashlib.sha256(f"{pixels.dtype} {tuple(pixels.shape)} {prompt}".encode())
    # A GPU rounds otherwise than a CPU.
    digest.update(pixels.device.type.encode())
    digest.update(_bytes(pixels))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _publish(path: Path, data: bytes) -> None:
    """Write beside and rename, so that what has its name is whole, whoever else writes it and whatever is killed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
