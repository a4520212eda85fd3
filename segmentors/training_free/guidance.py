"""Semantic-aware classifier-free guidance (S-CFG): each word's region of an image is guided as strongly as the others.

"Rethinking the Spatial Inconsistency in Classifier-Free Diffusion Guidance" (CVPR 2024, arXiv 2404.05384), with the
regions that arXiv 2603.06178 finds, in the settings of that paper's program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_features import AttentionCall, FeatureExtractor, LazyMap, capture, list_activations
from diffusion_features.activations import select
from diffusion_features.families import unwrap

from .aggregation import Aggregator, output_projection
from .encoders import TextPart, text_parts
from .presets import Preset, preset_for
from .refinement import refine
from .rescaling import blurred, entity_maps, normalised
from .words import Span

LEAST, MOST = 0.8, 3.0
STRONGEST = 15.0
"""Scale times rate at most."""
BLUR, SIGMA = 3, 0.5


def generate(
    pipe: Any, prompt: str | Sequence[str], *, guidance_scale: float = 5.0, preset: Preset | None = None, **options: Any
) -> Any:
    """A call of a text-to-image pipeline under S-CFG: ``ε = ε_u + s·r(p)·(ε_c - ε_u)``, with ``r`` of ``region_rates``.

    Each step's regions come from the very attention of that step. The rate is multiplied into the prediction with the
    prompt by a forward hook of the denoiser, so scheduler, callbacks and all else of the pipeline are its own; the
    pipeline is the same afterwards.

    >>> generate(pipe, "a red car on a road", num_inference_steps=50).images[0]

    Args:
        pipe: of diffusers, that calls its denoiser once a step, on [without the prompt; with it]: Stable Diffusion 1
            to 3, SDXL, PixArt, HunyuanDiT.
        prompt: one, or several.
        guidance_scale: s, above 1.
        preset: which layers are read, and how often maps are refined; by default the model's.
        options: all else that the pipeline takes, such as ``generator`` or ``num_inference_steps``.

    Returns:
        What the pipeline returns.

    Raises:
        ValueError: a scale that does not guide, a pipeline that calls its denoiser otherwise, or a model that has no
            preset.
    """
    if guidance_scale <= 1:
        raise ValueError(f"guidance_scale={guidance_scale}: there is guidance above 1 alone, so nothing to rescale")
    fx = FeatureExtractor.from_pipe(pipe, "*")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    guide = _Guide(fx, preset or preset_for(fx), prompts, guidance_scale)
    denoiser = unwrap(fx.denoiser)
    with capture(fx.denoiser, guide.wanted, reduce=guide.read):
        hooks = [
            denoiser.register_forward_pre_hook(guide.begin, with_kwargs=True),
            denoiser.register_forward_hook(guide.rescale),
        ]
        try:
            return pipe(prompt, guidance_scale=guidance_scale, **options)
        finally:
            for hook in hooks:
                hook.remove()


def region_rates(difference: Tensor, regions: Tensor, foreground: Tensor, scale: float) -> Tensor:
    """How much more or less each pixel is guided, so that regions are guided as much as the foreground is.

    With ``η(p) = ‖ε_c(p) - ε_u(p)‖`` over channels, and the region R of p:
    ``r(p) = mean_{foreground} η / mean_R η``, held between 0.8 and 3, and ``s·r`` below 15; then a Gaussian of 3x3,
    σ = 0.5. Where nothing is foreground, or a region is not guided at all, r is 1 before that.

    Args:
        difference: ``ε_c - ε_u``, (B, C, h, w).
        regions: the number of each pixel's region, int64 (B, h, w).
        foreground: bool (B, h, w).
        scale: s.

    Returns:
        float32 or more, (B, 1, h, w).
    """
    size = difference.to(torch.promote_types(difference.dtype, torch.float32)).norm(dim=1).flatten(1)
    place, front = regions.flatten(1), foreground.flatten(1).to(size)
    zeros = size.new_zeros(len(size), int(place.max()) + 1)
    mean = zeros.scatter_add(1, place, size) / zeros.scatter_add(1, place, torch.ones_like(size)).clamp(min=1)
    benchmark = (size * front).sum(1, keepdim=True) / front.sum(1, keepdim=True).clamp(min=1)
    known = (mean > 0) & (front.sum(1, keepdim=True) > 0)
    rate = (
        torch.where(known, benchmark / torch.where(known, mean, 1), 1).clamp(LEAST, MOST).clamp(max=STRONGEST / scale)
    )
    return blurred(rate.gather(1, place).unflatten(1, regions.shape[1:]), BLUR, SIGMA)[:, None]


class _Guide:
    """What hooks need to rescale the predictions of one generation."""

    def __init__(self, fx: FeatureExtractor, preset: Preset, prompts: Sequence[str], scale: float) -> None:
        self.preset, self.scale = preset, scale
        parts = text_parts(fx)
        self.words = [[column for part in parts for column in _words(part, text)] for text in prompts]
        self.whole = [_whole(parts[0], text) for text in prompts]
        denoiser = unwrap(fx.denoiser)
        cross = select(list_activations(denoiser), list(preset.cross))
        self.projections = {a.id: output_projection(denoiser, a) for a in cross}
        self.reader = self._reader((1, 1))
        self.wanted = self.reader.wanted

    def _reader(self, grid: tuple[int, int]) -> Aggregator:
        return Aggregator(self.projections, self.preset.reference, self.preset.refiners, grid)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A step: maps are gathered on the grid of its latents, (2B, c, h, w)."""
        latents = args[0] if args else kwargs["hidden_states"]
        if len(latents) % (2 * len(self.words)):
            raise ValueError(
                f"the denoiser was called on {len(latents)} latents for {len(self.words)} prompts; this is for "
                "pipelines that call it once a step, on [without the prompt; with it]"
            )
        self.channels = latents.shape[1]
        self.reader = self._reader((latents.shape[-2], latents.shape[-1]))

    def read(self, id: str, found: Tensor | AttentionCall) -> None:
        self.reader(id, found)

    @torch.no_grad()
    def rescale(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The denoiser's output, its second half ``ε_u + r (ε_c - ε_u)``."""
        without, told = output[0].chunk(2)
        difference = told - without
        tokens = self.reader.tokens()
        found = [self._found(tokens, index) for index in range(len(told))]
        regions, foreground = (torch.stack(maps) for maps in zip(*found, strict=True))
        # some models predict a variance behind the noise
        rate = region_rates(difference[:, : self.channels], regions, foreground, self.scale)
        prediction = torch.cat([without, without + rate.to(difference) * difference])
        return (prediction, *output[1:]) if isinstance(output, tuple) else type(output)(sample=prediction)

    def _found(self, tokens: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Regions and foreground of an image: int64 and bool, (h, w)."""
        half = len(tokens) // 2
        mine = index * len(self.words) // half  # a prompt's images are neighbours
        with_prompt, column = self.whole[mine]
        foreground = normalised(tokens[index + half * with_prompt, column][None])[0] < 0.5
        words = [column for column in self.words[mine] if column < tokens.shape[1]]  # long prompts are cut
        if not words:
            return torch.zeros_like(foreground, dtype=torch.int64), foreground
        maps = entity_maps(tokens[half + index], [[word] for word in words], words, "sum")
        layers = [_row(lazy, half + index) for lazy in self.reader.refiners.values()]
        return refine(maps[None], layers, self.preset.k)[0].argmax(dim=0), foreground


def _words(part: TextPart, prompt: str) -> list[int]:
    return part.columns(prompt, [Span(0, len(prompt))])


def _whole(part: TextPart, prompt: str) -> tuple[bool, int]:
    """The token that stands for all that no word does: whether it is read with the prompt, and its column.

    It is the first token without the prompt; of tokenizers that have none, the last one with the prompt.
    """
    first = part.tokenizer(part.read(prompt), add_special_tokens=part.special, verbose=False)["input_ids"][0]
    if first in (part.tokenizer.bos_token_id, part.tokenizer.cls_token_id):
        return False, part.start
    return True, part.start + min(part.length(prompt), part.limit) - part.skipped - 1


def _row(lazy: LazyMap, index: int) -> LazyMap:
    """The map of one image of a batch."""
    only = slice(index, index + 1)
    bias = lazy.bias if lazy.bias is None or len(lazy.bias) == 1 else lazy.bias[only]
    columns = lazy.columns if isinstance(lazy.columns, slice) else lazy.columns[only]
    return replace(lazy, query=lazy.query[only], key=lazy.key[only], bias=bias, columns=columns)
