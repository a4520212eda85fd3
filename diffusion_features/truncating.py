"""Loading a part of a model: a denoiser up to the deepest block that is needed, a VAE without its decoder.

diffusers makes a model from its configuration on the meta device and then fills whatever the made model has, tensor by
tensor, from a memory-mapped checkpoint. A model that is cut between the two steps is neither allocated nor read beyond
the cut, and all else (shards, variants, dtypes, quantisation) stays diffusers' own.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .activations import Activation
from .families import family_of, list_activations

_WHOLE: weakref.WeakKeyDictionary[nn.Module, list[Activation]] = weakref.WeakKeyDictionary()


def outline(denoiser_class: Any, folder: Path) -> nn.Module | None:
    """A denoiser on the meta device, which takes no memory; ``None`` if its family does not say what may be cut.

    Args:
        folder: holds the ``config.json`` of the denoiser.
    """
    whole = on_meta(denoiser_class, folder)
    return whole if blocks_of(whole) else None


def on_meta(model_class: Any, folder: Path) -> nn.Module:
    """A model as its configuration has it, on the meta device: with the shapes of its weights, and none of them.

    Args:
        folder: holds its ``config.json``.

    Raises:
        OSError: that is missing or damaged.
    """
    if not (folder / "config.json").is_file():  # diffusers would take the path for a hub id, and ask there
        raise FileNotFoundError(f"{folder} has no config.json: the folder of the model is not whole; fetch it anew")
    with torch.device("meta"):
        model: nn.Module = model_class.from_config(model_class.load_config(folder))
    return model


def blocks_of(denoiser: nn.Module) -> list[str]:
    """Dotted paths of the blocks that run one after another, in forward order; none if the family names no lists."""
    lists = getattr(family_of(denoiser), "BLOCKS", ())
    return [f"{name}.{i}" for name in lists for i in range(len(getattr(denoiser, name)))]


def unneeded_blocks(denoiser: nn.Module, chosen: Sequence[Activation]) -> list[str]:
    """Dotted paths of the blocks behind the last one that holds any of the activations.

    None if one of them is made of what all blocks give.
    """
    if any(a.tap == "composed" for a in chosen):
        return []
    blocks = blocks_of(denoiser)
    holding = [i for i, path in enumerate(blocks) if any(f"{a.module}.".startswith(f"{path}.") for a in chosen)]
    return blocks[holding[-1] + 1 :] if holding else []


def load_part(model_class: Any, folder: Path, without: Sequence[str], **options: Any) -> Any:
    """``model_class.from_pretrained(folder)`` without some of its modules: their weights are not read.

    Args:
        without: their dotted paths; those inside a ``ModuleList`` are its last.
    """

    class Part(model_class):
        _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
            *(model_class._keys_to_ignore_on_load_unexpected or ()),
            *([rf"^(?:{'|'.join(map(re.escape, without))})\."] if without else ()),
        ]

        @classmethod
        def from_config(cls, config: Any, **kwargs: Any) -> Any:
            model = model_class.from_config(config, **kwargs)
            for path in reversed(without):
                parent, _, name = path.rpartition(".")
                owner = model.get_submodule(parent)
                if isinstance(owner, nn.ModuleList):
                    del owner[int(name)]
                else:
                    setattr(owner, name, None)
            return model

    return Part.from_pretrained(folder, **options)


def mark_truncated(denoiser: nn.Module, whole: nn.Module) -> None:
    """Make a call of the denoiser that nothing stops before its missing blocks an error, not a wrong prediction.

    Args:
        whole: its ``outline``.
    """
    _WHOLE[denoiser] = list_activations(whole)
    denoiser.register_forward_hook(_refuse_output)


def untruncated(denoiser: nn.Module) -> list[Activation] | None:
    """What a truncated denoiser would have to capture, in forward order, were it whole; ``None`` for any other."""
    return _WHOLE.get(denoiser)


def _refuse_output(denoiser: nn.Module, args: Any, output: Any) -> None:
    last = list_activations(denoiser)[-1].id
    raise RuntimeError(
        f"this {type(denoiser).__name__} was loaded only up to {last}, so it has no output. What needs one (inversion, "
        "denoise_from, generation) needs all of it: load it with activations='*'"
    )
