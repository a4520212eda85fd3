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
        special: whether the tokenizer adds its special tokens; a chat template writes them itself.
        padded_left: whether the text is padded before its first token, up to ``limit``.
    """

    tokenizer: Any
    start: int
    limit: int
    lower: bool = False
    around: str = "{}"
    skipped: int = 0
    special: bool = True
    padded_left: bool = False

    def read(self, prompt: str) -> str:
        """The text that the tokenizer is given for a prompt."""
        return self.around.replace("{}", self.written(prompt))

    def written(self, text: str) -> str:
        """A prompt, or its beginning, in lower case where the pipeline writes it so."""
        return text.lower() if self.lower else text

    def length(self, prompt: str) -> int:
        """Tokens of what is read for a prompt."""
        return len(self.tokenizer(self.read(prompt), add_special_tokens=self.special, verbose=False)["input_ids"])

    def columns(self, prompt: str, spans: Sequence[Span]) -> list[int]:
        """Columns of a cross map that belong to spans of the prompt."""
        before = self.around.index("{}")
        # In lower case a text can be longer: "İ" becomes an i and a dot.
        moved = [Span(*(before + len(self.written(prompt[:end])) for end in span)) for span in spans]
        places = token_positions(self.tokenizer, self.read(prompt), moved, special=self.special)
        first = self.start - self.skipped + (self.limit - self.length(prompt) if self.padded_left else 0)
        return [first + place for place in places]


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
        return [TextPart(pipe.tokenizer, 0, _context(pipe), False, _chat(pipe.tokenizer, thinking=True))]
    if family == "flux2":
        return [_flux2(pipe)]
    if family == "sana":
        return [_sana(pipe)]
    known = (
        "UNets, PixArt, HunyuanDiT, Stable Diffusion 3, Flux, AuraFlow, Qwen-Image, Lumina-Image 2, Z-Image and Sana"
    )
    raise ValueError(f"where words stand in the text tokens of {type(pipe).__name__} is not known; it is for {known}")


def fits(parts: Sequence[TextPart], prompt: str) -> bool:
    """Whether every tokenizer reads the whole prompt."""
    return all(part.length(prompt) <= part.limit for part in parts)


def positions(parts: Sequence[TextPart], prompt: str, spans: Sequence[Span]) -> list[int]:
    """Columns of a cross map that belong to some words of the prompt, in every part."""
    return [column for part in parts for column in part.columns(prompt, spans)]


def _flux2(pipe: Any) -> TextPart:
    """A chat, for [dev] with a system message, padded on the side that the tokenizer is set to."""
    if not hasattr(pipe, "system_message"):  # [klein], whose text encoder is Qwen3
        tokenizer, around = pipe.tokenizer, _chat(pipe.tokenizer, thinking=False)
        return TextPart(tokenizer, 0, _context(pipe), around=around, padded_left=tokenizer.padding_side == "left")
    texts = (("system", pipe.system_message), ("user", "{}"))
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts]
    around = pipe.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    tokenizer, left = pipe.tokenizer.tokenizer, pipe.tokenizer.tokenizer.padding_side == "left"
    return TextPart(tokenizer, 0, _context(pipe), around=around, special=False, padded_left=left)


def _sana(pipe: Any) -> TextPart:
    """An instruction before the prompt. Of the tokens, the pipeline keeps the first and the last ``context - 1``."""
    instruction = "\n".join(inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default)
    skipped = len(pipe.tokenizer.encode(instruction)) - 2
    return TextPart(pipe.tokenizer, 0, skipped + _context(pipe), True, instruction + "{}", skipped)


def _chat(tokenizer: Any, *, thinking: bool) -> str:
    message = {"role": "user", "content": "{}"}
    return tokenizer.apply_chat_template(
        [message], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )


def _context(pipe: Any) -> int:
    """Tokens of a long-context text encoder that the pipeline reads."""
    return inspect.signature(pipe.encode_prompt).parameters["max_sequence_length"].default
