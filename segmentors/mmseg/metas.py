"""How what mmsegmentation knows of a batch's images reaches the backbone, which it calls with the pixels alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

Metas: TypeAlias = "Sequence[Mapping[str, Any]]"

_CURRENT: ContextVar[Metas | None] = ContextVar("image_metas", default=None)


@contextmanager
def image_metas(metas: Metas | None) -> Iterator[None]:
    """The metainfo of the batch's images, for backbones called inside; each thread has its own."""
    token = _CURRENT.set(metas)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def prompts_of(key: str, batch: int) -> list[str]:
    """The prompt of each image of the batch, from its metainfo.

    Raises:
        ValueError: there is no metainfo, or an image has no prompt in it; the message says which and what to add.
    """
    metas = _CURRENT.get()
    if metas is None or len(metas) != batch:
        raise ValueError(
            f"prompt_key={key!r} takes a prompt from each image's metainfo, which this segmentor does not hand to its "
            'backbone: set type="DiffusionEncoderDecoder" in the model'
        )
    for meta in metas:
        if not isinstance(meta.get(key), str):
            raise ValueError(
                f"the image {meta.get('img_path', '(no path)')} has no {key!r} in its metainfo: add it to meta_keys of "
                "PackSegInputs, and have the dataset or the transform LoadPrompt set it"
            )
    return [str(meta[key]) for meta in metas]
