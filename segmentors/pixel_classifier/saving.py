"""A trained ensemble in one safetensors file, with what it was trained on in its header."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .ensemble import Ensemble

HEADER = "pixel_classifier"


def save(path: str | os.PathLike[str], ensemble: Ensemble, about: dict[str, Any]) -> None:
    """Write an ensemble, all or nothing.

    Args:
        path: a ``.safetensors`` file; its folder is made if it does not exist.
        ensemble: on any device.
        about: what there is to know of its training, as JSON values.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    sizes = {"channels": ensemble.channels, "classes": ensemble.classes, "members": len(ensemble.members)}
    part = target.with_name(f".{target.name}.part")
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in ensemble.state_dict().items()},
        part,
        metadata={HEADER: json.dumps({**sizes, "about": about})},  # the order of activations counts
    )
    part.replace(target)


def load(path: str | os.PathLike[str]) -> tuple[Ensemble, dict[str, Any]]:
    """Read what ``save`` wrote.

    Returns:
        The ensemble on the CPU, in evaluation mode; and ``about``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no classifier {path}")
    try:
        with safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {})[HEADER])
        weights = load_file(path)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is no classifier that 'diffusion-features parts train' wrote") from error
    ensemble = Ensemble(note["channels"], note["classes"], note["members"])
    ensemble.load_state_dict(weights)
    return ensemble.eval(), note["about"]
