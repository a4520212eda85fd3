"""Where class names stand in a text, and which tokens they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

STOP = frozenset({"a", "an", "the", "and"})
"""Words that name nothing; punctuation is none either."""


_ENDINGS = (("ies", "y"), ("es", ""), ("s", ""))
_LEAVES = {
    **{f"{stem}ves": f"{stem}f" for stem in ("lea", "shel", "loa", "scar", "hal", "wol", "cal", "thie", "shea", "hoo")},
    **{f"{stem}ves": f"{stem}fe" for stem in ("kni", "wi", "li")},
}
"""Others in -ves, such as "gloves", only have lost an e."""
_ALWAYS = frozenset({"news", "goods", "woods", "arms", "lens", "canvas", "species", "series"})
"""Words in -s that without it are others, or none."""


class Span(NamedTuple):
    """Characters ``start`` up to ``stop`` of a text."""

    start: int
    stop: int


def find_phrases(text: str, phrases: Mapping[str, Sequence[str]]) -> dict[str, list[Span]]:
    """Every place where a phrase stands, in any case, in the singular or a regular plural, as whole words.

    "car" is not found in "carpet"; and where a longer phrase stands, a shorter one inside it is not found.

    Args:
        phrases: name → the words that stand for it.

    Returns:
        name → its spans, in order; an empty list where there is none.
    """
    found: dict[str, list[Span]] = {name: [] for name in phrases}
    taken: list[Span] = []
    ordered = sorted(((p, name) for name, all_of in phrases.items() for p in all_of), key=lambda item: -len(item[0]))
    given = {phrase.lower() for phrase, _ in ordered}
    for phrase, name in ordered:
        for hit in re.finditer(rf"(?<!\w){_in_any_number(phrase)}(?!\w)", text, re.IGNORECASE):
            span, said = Span(*hit.span()), " ".join(hit.group().lower().split())
            if said != phrase.lower() and said in given:  # "car" beside "cars": each is found as it is written
                continue
            if not any(span.start < other.stop and other.start < span.stop for other in taken):
                taken.append(span)
                found[name].append(span)
    return {name: sorted(spans) for name, spans in found.items()}


def _in_any_number(phrase: str) -> str:
    """A pattern for the phrase in the singular or the plural, however it is spaced."""
    *before, last = phrase.split()
    forms = "|".join(re.escape(form) for form in sorted({last, *plurals(last), *singulars(last)}))
    return r"\s+".join([*map(re.escape, before), f"(?:{forms})"])


def plurals(word: str) -> set[str]:
    """How a word may end in the plural by the rules of English, in lower case: "box", "boxes"; "leaf", "leaves"."""
    word = word.lower()
    if re.search(r"[^aeiou\W\d_]y$", word):
        return {word[:-1] + "ies"}
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return {word + "es"}
    found = {word + "s"}
    if word.endswith("o"):
        found.add(word + "es")
    return found | {plural for plural, single in _LEAVES.items() if single == word}


def singulars(word: str) -> set[str]:
    """The words, of three letters or more, that have ``word`` as a plural."""
    word = word.lower()
    if word in _ALWAYS:
        return set()
    if word in _LEAVES:
        return {_LEAVES[word]}
    stems = [word[: -len(end)] + begin for end, begin in _ENDINGS if word.endswith(end)]
    return {stem for stem in stems if len(stem) > 2 and stem[-1] not in "iu" and word in plurals(stem)}


def content_words(text: str, span: Span) -> list[Span]:
    """The words of a span that name something; all of it where none does."""
    words = [
        Span(span.start + hit.start(), span.start + hit.end())
        for hit in re.finditer(r"\w+(?:['’]\w+)*", text[span.start : span.stop])
        if hit.group().lower() not in STOP
    ]
    return words or [span]


def token_positions(tokenizer: Any, text: str, spans: Sequence[Span], *, special: bool = True) -> list[int]:
    """Positions, in the tokenized text, of the tokens that lie in any of the spans.

    Args:
        tokenizer: a fast tokenizer of transformers (CLIP, T5, BERT, ...), which knows the characters of each token.
        special: whether it adds its special tokens, as it does by default.

    Returns:
        Positions in order. Tokens without characters of their own (special ones, SentencePiece's bare "▁") and unknown
        ones are left out.
    """
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special, verbose=False)
    pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    without_meaning = {*tokenizer.all_special_tokens, "▁"}
    return [
        position
        for position, (piece, (start, stop)) in enumerate(zip(pieces, encoded["offset_mapping"], strict=True))
        if piece not in without_meaning and _inside(text, start, stop, spans)
    ]


def _inside(text: str, start: int, stop: int, spans: Sequence[Span]) -> bool:
    """Whether a token's characters, without the space some tokenizers count to it, lie in one of the spans."""
    characters = text[start:stop]
    start += len(characters) - len(characters.lstrip())
    return start < stop and any(span.start <= start and stop <= span.stop for span in spans)
