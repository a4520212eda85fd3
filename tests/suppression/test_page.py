"""GATE's page: everything is in it, nothing of it is elsewhere, and everybody can read it."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from diffusion_features.suppression.gate import BASE, Trial, ranked
from diffusion_features.suppression.page import page

EMPTY = {"meta", "img", "br", "path", "circle"}


class Reader(HTMLParser):
    """Tags with their attributes, and text; fails on a tag that is not closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def picture(seed: int, height: int = 12, width: int = 20) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def made(seeds: int = 2) -> tuple[str, list[Trial], list[torch.Tensor]]:
    names = [BASE, "prompt=<b>&{prompt}"]
    found = [
        Trial(name, image, seed, 0.1, 0.5 + 0.01 * seed + 0.2 * n + 0.02 * image * n, 0.2, {"a": 0.3 * n},
              picture(7 * image + n))
        for image in range(3) for seed in range(seeds) for n, name in enumerate(names)
    ]  # fmt: skip
    images = [picture(100), picture(101, 600, 300), picture(102)]
    settings = {"model": "embedded", "t": 50, "images": ["a", "b"]}
    return page(found, ranked(found), images, ["one <1>.png", 'two ".png', "three.png"], settings), found, images


def test_it_has_the_table_the_distances_the_pictures_and_the_settings() -> None:
    text, found, images = made()
    reader = Reader(text)
    for words in (
        "prompt=<b>&{prompt}",
        "use",
        "+0.2200",
        "+0.1483 to +0.2917",  # 0.02 / √3 times 6.2053, which tables have for 97.5% and 2 degrees of freedom
        "97.5% intervals",
        "0.5050 ± 0.0071",
        "one <1>.png",
        "a, b",
    ):
        assert words in reader.text, words
    shown = [attrs for tag, attrs in reader.tags if tag == "img"]
    assert len(shown) == 3 * 3
    sources = [str(attrs["src"]).removeprefix("data:image/png;base64,") for attrs in shown]
    pictures = [np.array(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]
    for drawn, expected in ((pictures[0], images[0]), (pictures[2], found[1].repainted)):
        np.testing.assert_allclose(drawn, (expected.permute(1, 2, 0).numpy() + 1) * 127.5, atol=0.5001)
    assert pictures[3].shape == (512, 256, 3)  # of 600 x 300


def test_it_refers_to_nothing_outside() -> None:
    text, _, _ = made()
    for tag, attrs in Reader(text).tags:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href", "srcset"):
            assert str(attrs.get(name, "data:")).startswith("data:")
    assert "http" not in text and "url(" not in text


def test_it_can_be_read_without_seeing_it() -> None:
    reader = Reader(made()[0])
    assert ("html", {"lang": "en"}) in reader.tags
    assert all(attrs["alt"] for tag, attrs in reader.tags if tag == "img")
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in reader.tags if tag == "th")
    assert [tag for tag, _ in reader.tags if tag in ("h1", "h2", "h3")] == ["h1", "h2", "h2", "h2", *["h3"] * 3, "h2"]
    assert sum(tag == "caption" for tag, _ in reader.tags) == sum(tag == "table" for tag, _ in reader.tags) == 2
    assert all(attrs.get("aria-hidden") == "true" for tag, attrs in reader.tags if tag == "svg")


@pytest.mark.parametrize("dark", [False, True])
def test_its_colours_have_contrast_in_light_and_dark(dark: bool) -> None:
    style = re.search(r"<style>(.*)</style>", made()[0], re.S)
    assert style is not None
    colours = [dict(re.findall(r"--(\w+): (#\w{6});", part)) for part in style[1].split("@media")]

    def luminance(colour: str) -> float:  # WCAG 2.2
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
                  for c in (v / 255 for v in ImageColor.getrgb(colour))]  # fmt: skip
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    mine = colours[dark]
    for name in ("ink", "faint", "use", "harmful"):
        low, high = sorted((luminance(mine[name]), luminance(mine["paper"])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, name


def test_of_a_single_seed_there_is_no_spread() -> None:
    assert "±" in Reader(made()[0]).text and "±" not in Reader(made(seeds=1)[0]).text
