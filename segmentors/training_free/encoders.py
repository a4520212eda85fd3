"""Which tokenizers a model reads its prompt with, and where their tokens stand among the text tokens of attention."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from diffusion_features import FeatureExtractor

from .words import Span, token_positions


class TextPart(NamedTuple):
    """One tokenizer's share of the text tokens.

    Attributes:
        tokenizer: of transformers.
        start: where its tokens begin among the columns of a cross map.
        limit: tokens it may give, special ones and those around the prompt among them.
        lower: whether the pipeline writes prompts in lower case first.
        around: what the pipeline writes around a prompt, at ``{}``.
        skipped: tokens at the beginning that the pipeline drops once they are encoded.
    """

    tokenizer: Any
    start: int
    limit: int
    lower: bool = False
    around: str = "{}"
    skipped: int = 0


def text_parts(fx: FeatureExtractor) -> list[TextPart]:
    """The parts of a model's text tokens, in the order they stand.

    Raises:
        ValueError: it is not known for this family of models.
    """
    pipe: Any = fx.pipe
    family = fx.family.__name__.rpartition(".")[2]
    if family == "unet":
        tokenizer = getattr(pipe, "tokenizer", None) or pipe.tokenizer_2
        return [TextPart(tokenizer, 0, tokenizer.model_max_length)]
    if family == "pixart":
        return [TextPart(pipe.tokenizer, 0, _context(pipe), lower=True)]
    if family == "flux":
        return [TextPart(pipe.tokenizer_2, 0, _context(pipe))]
    if family == "sd3":
        clip = TextPart(pipe.tokenizer, 0, pipe.tokenizer_max_length)
        return [clip, TextPart(pipe.tokenizer_3, clip.limit, _context(pipe))] if pipe.tokenizer_3 else [clip]
    if family == "hunyuan":
        bert, t5 = pipe.transformer.config.text_len, pipe.transformer.config.text_len_t5
        return [TextPart(pipe.tokenizer, 0, bert), TextPart(pipe.tokenizer_2, bert, t5)]
    if family == "auraflow":
        return [TextPart(pipe.tokenizer, 0, _context(pipe))]
    if family == "qwen":
        skipped = pipe.prompt_template_encode_start_idx
        return [TextPart(pipe.tokenizer, 0, skipped + _context(pipe), False, pipe.prompt_template_encode, skipped)]
    if family == "lumina2":
        return [TextPart(pipe.tokenizer, 0, _context(pipe), False, pipe.system_prompt + " <Prompt Start> {}")]
    if family == "zimage":
        return [TextPart(pipe.tokenizer, 0, _context(pipe), False, _chat(pipe.tokenizer))]
    known = "UNets, PixArt, HunyuanDiT, Stable Diffusion 3, Flux.1, AuraFlow, Qwen-Image, Lumina-Image 2 and Z-Image"
    raise ValueError(f"where words stand in the text tokens of {type(pipe).__name__} is not known; it is for {known}")


def fits(parts: Sequence[TextPart], prompt: str) -> bool:
    """Whether every tokenizer reads the whole prompt."""
    return all(len(part.tokenizer(_read(part, prompt), verbose=False)["input_ids"]) <= part.limit for part in parts)


def positions(parts: Sequence[TextPart], prompt: str, spans: Sequence[Span]) -> list[int]:
    """Columns of a cross map that belong to some words of the prompt, in every part."""
    found = []
    for part in parts:
        before = part.around.index("{}")
        moved = [Span(start + before, stop + before) for start, stop in spans]
        places = token_positions(part.tokenizer, _read(part, prompt), moved)
        found += [part.start + place - part.skipped for place in places]
    return found


def _read(part: TextPart, prompt: str) -> str:
    """The text that a tokenizer is given for a prompt."""
    return part.around.replace("{}", prompt.lower() if part.lower else prompt)


def _chat(tokenizer: Any) -> str:
    message = {"role": "user", "content": "{}"}
    return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True, enable_thinking=True)


def _context(pipe: Any) -> int:
    """Tokens of a long-context text encoder that the pipeline reads."""
    return inspect.signature(pipe.encode_prompt).parameters["max_sequence_length"].default
