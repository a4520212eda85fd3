"""A real browser for the tests of the page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from diffusion_features import FeatureExtractor
from diffusion_features.embedded import Scene
from segmentors import Method, TrainingFreeSegmentor
from tests.app.serving import Server

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE = 180_000
"""Milliseconds a step may take on a busy machine."""


@contextmanager
def browsing() -> Iterator[Any]:
    """A browser; without one, or without Playwright, the tests in it are skipped."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="browser tests need it: pip install playwright")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"there is no browser: none of {', '.join(BROWSERS)} is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def visit(browser: Any, server: Server, **options: Any) -> Iterator[Any]:
    """A fresh visit; at its end nothing has gone wrong in the browser, and nothing came from elsewhere.

    Args:
        options: of Playwright's ``new_context``.
    """
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 960}, "accept_downloads": True, **options})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if _foreign(request.url, server) else None)
    page.goto(server.address)
    page.locator("#run").wait_for()
    yield page
    assert wrong == []
    context.close()


def _foreign(url: str, server: Server) -> bool:
    return not url.startswith((server.address, "data:", "blob:"))


def put(page: Any, place: str, file: Path) -> None:
    """Upload a picture to a field."""
    page.locator(f"{place} input[type=file]").set_input_files(str(file))
    page.locator(f"{place} img").wait_for()


def choose(page: Any, place: str, *words: str) -> None:
    """Write words into a field of chips."""
    field = page.locator(f"{place} input")
    for word in words:
        field.fill(word)
        field.press("Enter")
    field.press("Escape")


def numbers(words: str) -> list[int]:
    return [int(word) for word in words.replace(",", "").replace(":", "").split() if word.isdecimal()]


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def said(page: Any, words: str) -> None:
    page.get_by_text(words).first.wait_for()


def legend(page: Any) -> set[str]:
    """The names in the legend of the result."""
    page.locator("#result img").first.wait_for()
    return {text.strip() for text in page.locator("#result .legend-item").all_inner_texts()}


def shoot(page: Any, name: str) -> None:
    """Keep a picture of the window in the folder that DEMO_SCREENSHOTS names, if it is set."""
    if folder := os.environ.get("DEMO_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(1000)  # pictures fade in
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=False)


def expected(scene: Scene, names: list[str], caption: str | None = None, method: Method | None = None) -> Any:
    """What the segmentor itself finds in a scene."""
    segmentor = TrainingFreeSegmentor(FeatureExtractor.from_pretrained("embedded"), method=method)
    return segmentor(scene.image, names, caption=caption)


def found(result: Any) -> set[str]:
    """The names of the classes that occur."""
    return {result.classes[i] for i in result.labels.unique().tolist()}
