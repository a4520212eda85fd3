"""Several variants of the features of the same images, with everything shared that is the same in all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..images import Picture
from .applying import asked
from .once import remembering
from .spec import Spec
from .technique import Call

if TYPE_CHECKING:
    from ..extractor import FeatureExtractor


def variants(
    fx: FeatureExtractor,
    images: Picture | Sequence[Picture],
    techniques: Mapping[str, Spec | Sequence[Spec]],
    prompt: str | Sequence[str] = "",
    *,
    size: int | tuple[int, int] | None = None,
    **options: Any,
) -> dict[str, dict[str, Tensor]]:
    """Features of the same images under several sets of techniques, for less than as many calls cost.

    The images are encoded by the VAE once, and each prompt by the text encoder once (again where a LoRA changes it).
    What techniques make of the images (captions, conditions, image embeddings) they make once, however many of the sets
    they are in. The noise is the same, because it comes from the seed.

    >>> found = variants(fx, photo, {"base": [], "canny": [canny], "both": [canny, lora]}, "a cat", t=50)
    >>> found["canny"]["up-level1-upsampler-out"].shape

    Args:
        techniques: name → what to suppress content shift with; ``[]`` for none.
        options: of ``FeatureExtractor.forward``.

    Returns:
        name → id → feature, each equal to that of a call of its own.
    """
    seed = options.get("seed", 0)
    steps = {name: options[name] for name in ("t", "denoise_from", "solver_steps") if name in options}
    asks = Call(images, prompt, size=size, multiple=fx.multiple, **steps)
    with fx._lock, remembering(), _kept_prompts(fx, [asked(suppress, asks) for suppress in techniques.values()]):
        latents, _ = fx._clean(images, size, None, seed if options.get("sample_posterior") else None)
        return {
            name: fx(images, prompt, size=size, latents=latents, suppress=suppress, **options)
            for name, suppress in techniques.items()
        }


@contextmanager
def _kept_prompts(fx: FeatureExtractor, calls: Sequence[Call]) -> Iterator[None]:
    """The calls' prompts encoded and kept while inside: an extractor forgets those of a pipeline of its caller."""
    before = dict(fx._prompts)
    prompts = [p for call in calls for p in ([call.prompts] if isinstance(call.prompts, str) else call.prompts)]
    prompts += [call.negative for call in calls if call.guidance != 1]
    try:
        if not fx._released:
            fx.encode_prompts(prompts)
        yield
    finally:
        fx._prompts = before
