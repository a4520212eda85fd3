"""Techniques against content shift as a config names them, and what their effect depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from torch import Tensor

from diffusion_features import FeatureExtractor
from diffusion_features.suppression import (
    ControlNet,
    FineGrainedPrompt,
    IPAdapter,
    LoRA,
    Technique,
    as_technique,
    variants,
)
from diffusion_features.suppression.conditions import DEPTH_MODEL
from diffusion_features.suppression.lora import find_weights

Config = Mapping[str, Any]


@dataclass(frozen=True)
class TechniqueSets:
    """Sets of techniques under which features are taken: one, or several to amalgamate.

    Attributes:
        configs, built: of each set.
    """

    configs: Sequence[Sequence[Config]]
    built: Sequence[Sequence[Technique]]

    @classmethod
    def of(cls, common: Sequence[Config], several: Sequence[Sequence[Config]]) -> TechniqueSets:
        """
        Args:
            common: techniques of all sets.
            several: those that each set has besides; of none, there is one set.

        Raises:
            TypeError, ValueError: as ``as_technique``.
        """
        configs = [[*_checked(common), *_checked(one)] for one in several or [()]]
        return cls(configs, [[as_technique(config) for config in one] for one in configs])

    def __bool__(self) -> bool:
        """Whether there is any technique."""
        return any(self.built)

    def has(self, kind: type[Technique]) -> bool:
        return any(isinstance(technique, kind) for one in self.built for technique in one)

    def features(self, fx: FeatureExtractor, images: Tensor, prompts: list[str], **options: Any) -> dict[str, Tensor]:
        """id → feature under the only set; of several, ``number/id`` → feature under that set."""
        if len(self.built) == 1:
            return fx(images, prompts, suppress=self.built[0], **options)
        found = variants(fx, images, {str(i): one for i, one in enumerate(self.built)}, prompts, **options)
        return {f"{number}/{id}": feature for number, one in found.items() for id, feature in one.items()}

    def fingerprints(self) -> list[list[dict[str, Any]]]:
        """Of each technique, everything that its effect depends on.

        Raises:
            LoadError, OSError: weights are not there.
        """
        return [
            [fingerprint(technique, config) for technique, config in zip(built, configs, strict=True)]
            for built, configs in zip(self.built, self.configs, strict=True)
        ]


def _checked(configs: Any) -> Sequence[Config]:
    """Raises TypeError unless these are configurations of techniques."""
    if isinstance(configs, (str, Mapping)) or not all(isinstance(config, Mapping) for config in configs):
        raise TypeError(f'techniques of a config are a list, [dict(type="ControlNet", model=...)], not {configs!r}')
    return configs


def fingerprint(technique: Technique, config: Config) -> dict[str, Any]:
    """Everything that the effect of a technique depends on: its configuration, and the weights that it names.

    Raises:
        LoadError, OSError: the weights are not there.
    """
    found: dict[str, Any] = dict(config)
    if isinstance(technique, LoRA):
        found["weights"] = _contents(find_weights(technique.source, technique.weight_name, technique.pickle))
    if isinstance(technique, ControlNet):
        found["weights"] = _contents(str(technique.model))
        if technique.condition == "depth":
            found["depth"] = _contents(DEPTH_MODEL)
    if isinstance(technique, IPAdapter):
        file = find_weights(technique.source, technique.weight_name, technique.pickle, "IP-Adapter", None)
        found["weights"] = _contents(file)
        if (encoder := file.parent / technique.image_encoder).is_dir():  # else a hub's, which the source names
            found["image_encoder"] = _contents(encoder)
    if isinstance(technique, FineGrainedPrompt) and technique.captioner is not None:
        found["captioner"] = _contents(str(technique.captioner))
    return found


def _contents(source: str | Path) -> str:
    """The digest of a file or of what a folder holds, or the commit of a hub repository."""
    path = Path(source).expanduser()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if not files:
        return Path(hf_hub_download(str(source), "config.json")).parent.name
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
