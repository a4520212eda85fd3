"""Class names in texts and in tokens."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BertTokenizer

from segmentors.training_free.encoders import TextPart
from segmentors.training_free.prompts import check_names, passes
from segmentors.training_free.words import Span, content_words, find_phrases, token_positions
from tests.tiny import clip_tokenizer
from tests.tiny_families import _t5_tokenizer


def found(text: str, **phrases: list[str]) -> dict[str, list[str]]:
    return {name: [text[a:b] for a, b in spans] for name, spans in find_phrases(text, phrases).items()}


def test_whole_words_in_any_case_and_number() -> None:
    text = "Cars on a carpet, a CAR; no scar, no car-park's cars."
    assert found(text, car=["car"]) == {"car": ["Cars", "CAR", "car", "cars"]}
    assert found("two boxes, a box, buses", box=["box"], bus=["bus"]) == {"box": ["boxes", "box"], "bus": ["buses"]}
    assert found("cherries, a toy, toys", cherry=["cherry"], toy=["toy"]) == {
        "cherry": ["cherries"],
        "toy": ["toy", "toys"],
    }


def test_only_what_english_makes_a_plural_is_one() -> None:
    text = "a woman cares for pines, tubes, stages and manes"
    assert not any(found(text, car=["car"], pin=["pin"], tub=["tub"], stag=["stag"], man=["man"]).values())
    text = "leaves, knives, roofs, potatoes, photos, dishes, glasses, churches, foxes, Ä-Häuser"
    singular = ["leaf", "knife", "roof", "potato", "photo", "dish", "glass", "church", "fox"]
    assert list(found(text, **{word: [word] for word in singular}).values()) == [
        [plural] for plural in text.split(", ")[:-1]
    ]


def test_a_name_in_the_plural_is_found_in_the_singular() -> None:
    text = "a berry, a house, a bus, a leaf, a glove, a shelf; leave new good wood, an arm, and shelve a box of glass"
    names = ["berries", "houses", "buses", "leaves", "gloves", "shelves", "boxes", "news", "goods", "woods", "arms"]
    assert found(text, **{name: [name] for name in (*names, "glasses")}) == {
        "berries": ["berry"], "houses": ["house"], "buses": ["bus"], "leaves": ["leaf"], "gloves": ["glove"],
        "shelves": ["shelf"], "boxes": ["box"], "glasses": ["glass"], "news": [], "goods": [], "woods": [], "arms": [],
    }  # fmt: skip
    assert found("a ga, a bu, a gras", gas=["gas"], bus=["bus"], grass=["grass"]) == {"gas": [], "bus": [], "grass": []}


def test_beside_each_other_singular_and_plural_are_found_as_written() -> None:
    text = "a car, two cars; one red  car"
    assert found(text, one=["car"], many=["cars"]) == {"one": ["car", "car"], "many": ["cars"]}
    assert found(text, one=["red car"], many=["cars"]) == {"one": ["red  car"], "many": ["car", "cars"]}


def test_several_words_and_the_longer_phrase_first() -> None:
    text = "a potted  plant near a plant, and potted plants"
    assert found(text, plant=["plant"], potted=["potted plant"]) == {
        "plant": ["plant"], "potted": ["potted  plant", "potted plants"],
    }  # fmt: skip


def test_synonyms_and_signs() -> None:
    assert found("a kitten and c++", cat=["cat", "kitten"], cpp=["C++"], dot=["."]) == {
        "cat": ["kitten"], "cpp": ["c++"], "dot": [],
    }  # fmt: skip


def test_content_words_leave_out_articles_and_punctuation() -> None:
    text = "the salt and pepper, a cat's bowl!"
    assert [text[a:b] for a, b in content_words(text, Span(0, len(text)))] == ["salt", "pepper", "cat's", "bowl"]
    assert content_words("the", Span(0, 3)) == [Span(0, 3)]


def bert_tokenizer() -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "car", "##pet", "red", ",", "dog"]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)})


TOKENIZERS = {"clip": clip_tokenizer, "t5": _t5_tokenizer, "bert": bert_tokenizer}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_positions(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    text = "a carpet, a red cat,dog, car"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)

    def pieces(phrase: str) -> list[str]:
        spans = find_phrases(text, {"it": [phrase]})["it"]
        return [tokens[i].replace("</w>", "").strip("▁#") for i in token_positions(tokenizer, text, spans)]

    assert pieces("red") == ["red"] and pieces("cat") == ["cat"]
    assert "".join(pieces("car")) == "car" and "".join(pieces("carpet")) == "carpet"
    assert "".join(pieces("dog")) == "dog"
    assert "".join(pieces("red cat")) == "redcat"
    assert pieces("umbrella") == []


def parts(limit: int = 77) -> list[TextPart]:
    return [TextPart(clip_tokenizer(), 0, limit)]


def words_of(part: TextPart, prompt: str, columns: list[int]) -> list[str]:
    tokens = part.tokenizer.convert_ids_to_tokens(part.tokenizer(prompt).input_ids)
    return [tokens[column - part.start].removesuffix("</w>") for column in columns]


def named(*names: str) -> dict[str, list[str]]:
    return {name: [name] for name in names}


def test_one_pass_names_everything() -> None:
    (only,) = passes(parts(), named("cat", "red dog", "the grass"), "a photo of {} on")
    assert only.prompt == "a photo of cat, red dog, the grass on"
    where = {name: words_of(parts()[0], only.prompt, columns) for name, columns in only.entities.items()}
    assert where == {"cat": ["cat"], "red dog": ["red", "dog"], "the grass": ["grass"]}
    assert words_of(parts()[0], only.prompt, only.content) == ["cat", "red", "dog", "grass"]


def test_all_synonyms_are_written() -> None:
    (only,) = passes(parts(), {"pet": ["cat", "dog"]})
    assert only.prompt == "cat, dog"
    assert words_of(parts()[0], only.prompt, only.entities["pet"]) == ["cat", "dog"]


def test_more_names_than_fit_are_told_in_several_passes() -> None:
    told = passes(parts(limit=6), named("cat", "dog", "red", "photo", "grass"))  # two special tokens, commas
    assert [one.prompt for one in told] == ["cat, dog", "red, photo", "grass"]
    assert [list(one.entities) for one in told] == [["cat", "dog"], ["red", "photo"], ["grass"]]
    with pytest.raises(ValueError, match=r"'umbrella' is longer than this model reads"):
        passes(parts(limit=6), named("cat", "umbrella"))


def test_a_caption_is_used_where_it_names_the_classes() -> None:
    told = passes(parts(), named("dog", "cat"), "unused {}", "A photo of the red cats on grass, and a CAT")
    assert [one.prompt for one in told] == ["A photo of the red cats on grass, and a CAT, dog"]
    assert words_of(parts()[0], told[0].prompt, told[0].entities["cat"])[-1] == "cat"
    assert words_of(parts()[0], told[0].prompt, told[0].entities["dog"]) == ["dog"]
    content = words_of(parts()[0], told[0].prompt, told[0].content)
    assert not {"the", "a", ",", "and"} & set(content) - {"a"} and {"photo", "red", "grass", "dog"} <= set(content)


def test_a_caption_that_names_all_is_left_as_it_is_and_one_that_is_full_is_followed_by_a_pass() -> None:
    assert [one.prompt for one in passes(parts(), named("cat"), "{}", "a cat")] == ["a cat"]
    told = passes(parts(limit=6), named("cat", "dog", "red"), "photo of {}", "a photo of cat")
    assert [one.prompt for one in told] == ["a photo of cat", "photo of dog", "photo of red"]
    with pytest.raises(ValueError, match="the caption is longer"):
        passes(parts(limit=4), named("cat"), "{}", "a photo of a cat")


def test_two_encoders_give_both_copies() -> None:
    both = [TextPart(clip_tokenizer(), 0, 77), TextPart(_t5_tokenizer(), 77, 77, lower=True)]
    (only,) = passes(both, named("Cat", "dog"))
    assert only.prompt == "Cat, dog"
    assert only.entities == {"Cat": [1, 77], "dog": [3, 79]}


def test_a_letter_that_is_two_in_lower_case_moves_no_word() -> None:
    part, prompt = TextPart(_t5_tokenizer(), 0, 77, lower=True), "İİİİ İzmir cat, dog"
    columns = part.columns(prompt, [Span(prompt.index("cat"), prompt.index("cat") + 3)])
    assert columns and "".join(words_of(part, part.read(prompt), columns)) == "▁cat"


def test_a_name_without_tokens() -> None:
    with pytest.raises(ValueError, match="no token for the class 'zebra'"):
        passes([TextPart(bert_tokenizer(), 0, 77)], named("cat", "zebra"))


@pytest.mark.parametrize(
    ("classes", "background", "message"),
    [
        ([], [], "at least one class"),
        (["cat", "Cat"], [], "'Cat' is given twice"),
        (["cat", "cat"], [], "'cat' is given twice"),
        (["cat"], ["sky", "cat"], "'cat' is given twice among classes and background"),
        ({"cat": ["cat"], "dog": ["dog", "cat"]}, [], "'cat' is given twice"),
        (["cat", "  "], [], "a class name is empty"),
        ({"cat": []}, [], "a class name is empty"),
        (["cat"], [""], "a class name is empty"),
        ("cat", [], "a list of names, not one string"),
        ({"cat": "kitten"}, [], r"a list of words for the class 'cat', such as \['kitten'\], not one string"),
        ({"cat": [1]}, [], "names are text, not 1"),
        ([3], [], "names are text, not 3"),
        (["cat"], [None], "names are text, not None"),
        ({"building": ["house"], "x": ["sea"]}, ["Building"], "'Building' is given twice among classes and background"),
    ],
)
def test_bad_names(classes: Any, background: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_names(classes, background)


def test_names_lose_surplus_spaces() -> None:
    assert check_names([" potted   plant "], [" blue sky"]) == ({"potted plant": ["potted plant"]}, ["blue sky"])
