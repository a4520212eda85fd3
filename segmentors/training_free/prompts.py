"""Class names as prompts: what is written, in how many passes, and which text tokens each name has there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .encoders import TextPart, fits, positions
from .words import STOP, Span, content_words, find_phrases

Names = Mapping[str, Sequence[str]]


class Pass(NamedTuple):
    """One prompt.

    Attributes:
        prompt: its text.
        entities: name → columns of its tokens in a cross map.
        content: columns of all words that name something.
    """

    prompt: str
    entities: dict[str, list[int]]
    content: list[int]


def check_names(classes: Sequence[str] | Names, background: Sequence[str]) -> tuple[Names, list[str]]:
    """Classes as name → its words, and background names, both without surplus spaces.

    Raises:
        ValueError: there is no class, a name is empty or no text, the words of a class are one string, or a name comes
            twice (case does not distinguish).
    """
    if isinstance(classes, str) or isinstance(background, str):
        raise ValueError("give a list of names, not one string")
    given = [*classes.items()] if isinstance(classes, Mapping) else [(name, [name]) for name in classes]
    for name, all_of in given:
        if isinstance(all_of, str):
            raise ValueError(f"give a list of words for the class {name!r}, such as [{all_of!r}], not one string")
    for name in (name for key, all_of in given for name in (key, *all_of)):
        _check_text(name)
    for name in background:
        _check_text(name)
    if (twice := _first_twice([_spaced(name) for name, _ in given])) is not None:
        raise ValueError(f"the class {twice!r} is given twice")
    words = {_spaced(name): [_spaced(word) for word in all_of] for name, all_of in given}
    behind = [_spaced(name) for name in background]
    if not words:
        raise ValueError("give at least one class")
    every = [word for all_of in words.values() for word in all_of] + behind
    if not all(every) or not all(words) or not all(words.values()):
        raise ValueError("a class name is empty")
    # what is named as background stands beside the classes, under its name: that may not be the name of a class either
    for names in (every, [*words, *behind]):
        if (twice := _first_twice(names)) is not None:
            raise ValueError(f"the name {twice!r} is given twice among classes and background")
    return words, behind


def _check_text(name: Any) -> None:
    if not isinstance(name, str):
        raise ValueError(f"names are text, not {name!r}")


def _spaced(name: str) -> str:
    return " ".join(name.split())


def _first_twice(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name.lower() in seen:
            return name
        seen.add(name.lower())
    return None


def passes(parts: Sequence[TextPart], names: Names, template: str = "{}", caption: str | None = None) -> list[Pass]:
    """The prompts that name everything: the fewest that the encoders read whole, in the order of the names.

    Args:
        parts: see ``text_parts``.
        names: name → the words that stand for it; all words are written.
        template: what is written around a list of names, at ``{}``.
        caption: a text to write first. Names found in it stand where they stand there; the others follow it. All its
            words count as content, but for articles, "and" and punctuation.

    Raises:
        ValueError: a name, or the caption, is longer than the encoders read, or no tokenizer has a token for a name.
    """
    caption = (caption or "").strip() or None  # some pipelines strip prompts too
    if caption is not None and not fits(parts, caption):
        raise ValueError(f"the caption is longer than this model reads: {caption[:60]!r}...")
    there = {name: spans for name, spans in find_phrases(caption or "", names).items() if spans}
    groups: list[list[str]] = [[]]
    for name in (name for name in names if name not in there):
        if fits(parts, _written([*groups[-1], name], names, template, caption if len(groups) == 1 else None)[0]):
            groups[-1].append(name)
        elif fits(parts, _written([name], names, template, None)[0]):
            groups.append([name])
        else:
            raise ValueError(f"the class name {name!r} is longer than this model reads")
    first = _pass(parts, *_written(groups[0], names, template, caption), there, caption)
    return [first, *(_pass(parts, *_written(group, names, template, None), {}, None) for group in groups[1:])]


def shortened(parts: Sequence[TextPart], caption: str) -> str:
    """As many words of a caption, from its beginning, as the encoders read."""
    words = caption.split()
    while words and not fits(parts, " ".join(words)):
        words.pop()
    return " ".join(words)


def _written(
    group: Sequence[str], names: Names, template: str, caption: str | None
) -> tuple[str, dict[str, list[Span]]]:
    """A prompt that names a group, and where; behind the caption, or inside the template."""
    before, after = template.split("{}") if caption is None else (f"{caption}, " if group else caption, "")
    text = before
    where: dict[str, list[Span]] = {}
    for name in group:
        where[name] = []
        for word in names[name]:
            text += ", " if len(text) > len(before) else ""
            where[name].append(Span(len(text), len(text) + len(word)))
            text += word
    return text + after, where


def _pass(
    parts: Sequence[TextPart],
    prompt: str,
    where: Mapping[str, list[Span]],
    there: Mapping[str, list[Span]],
    caption: str | None,
) -> Pass:
    entities = {}
    for name, spans in {**there, **where}.items():
        words = [word for span in spans for word in content_words(prompt, span)]
        entities[name] = positions(parts, prompt, words)
        if not entities[name]:
            raise ValueError(f"the model's tokenizer has no token for the class {name!r}")
    content = {column for columns in entities.values() for column in columns}
    if caption is not None:
        words = content_words(prompt, Span(0, len(caption)))
        content |= set(positions(parts, prompt, [w for w in words if prompt[slice(*w)].lower() not in STOP]))
    return Pass(prompt, entities, sorted(content))
