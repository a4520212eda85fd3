"""The page in a real browser. Screenshots go to the folder that DEMO_SCREENSHOTS names, if it is set."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_features import FeatureExtractor
from diffusion_features.embedded import Scene, render
from segmentors import TrainingFreeSegmentor
from tests.app.serving import Server

sync_api = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright: pip install playwright")

pytestmark = pytest.mark.slow  # minutes, and it needs a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE = 120_000
"""Milliseconds a step may take on a busy machine."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"there is no browser: none of {', '.join(BROWSERS)} is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """A fresh visit; at its end nothing has gone wrong in the browser, and nothing came from elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 960}, accept_downloads=True)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if foreign(request.url, server) else None)
    page.goto(server.address)
    page.locator("#run").wait_for()
    yield page
    assert wrong == []
    context.close()


def foreign(url: str, server: Server) -> bool:
    return not url.startswith((server.address, "data:", "blob:"))


@pytest.fixture(scope="module")
def scene() -> Scene:
    return render(20_000_014, 128)


@pytest.fixture(scope="module")
def file(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("uploads") / "scene.png"
    scene.image.save(file)
    return file


def shoot(page: Any, name: str) -> None:
    if folder := os.environ.get("DEMO_SCREENSHOTS"):
        page.wait_for_timeout(1000)  # pictures fade in
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=False)


def choose(page: Any, place: str, *words: str) -> None:
    """Write words into a field of chips."""
    field = page.locator(f"{place} input")
    for word in words:
        field.fill(word)
        field.press("Enter")
    field.press("Escape")


def legend(page: Any) -> set[str]:
    return {text.strip() for text in page.locator("#result .legend-item").all_inner_texts()}


def said(page: Any, words: str) -> None:
    page.get_by_text(words).first.wait_for()


def test_a_visitor_segments_a_picture(page: Any, file: Path, scene: Scene, tmp_path: Path) -> None:
    names = [*scene.classes]
    page.locator("#picture input[type=file]").set_input_files(str(file))
    page.locator("#picture img").wait_for()
    choose(page, "#classes", *names)
    caption = ", ".join(names)
    page.get_by_label("Caption").first.fill(caption)
    page.locator("#run").click()
    said(page, "by a run of the model")
    page.locator("#result img").first.wait_for()
    expected: Any = segmented(scene, names, caption)
    assert legend(page) == {expected.classes[i] for i in expected.labels.unique().tolist()}
    page.evaluate("scrollTo(0, 0)")
    shoot(page, "app_segment")

    page.locator("#classes").get_by_role("button", name="Remove").first.click()  # the caption still names it: no run
    said(page, "from what the model gave before")
    fewer: Any = segmented(scene, names[1:], caption)
    assert legend(page) == {fewer.classes[i] for i in fewer.labels.unique().tolist()}

    page.get_by_role("tab", name="Files").click()
    with page.expect_download() as download:
        page.locator("#files a[download='labels.png']").first.click()
    download.value.save_as(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as labels:
        assert labels.mode == "P" and np.array_equal(np.array(labels), fewer.labels.numpy())
    page.get_by_role("tab", name="Scores").click()
    page.locator("#scores img").first.wait_for()
    assert page.locator("#scores .caption-label, #scores figcaption").count() >= len(names) - 1


def segmented(scene: Scene, names: list[str], caption: str) -> Any:
    segmentor = TrainingFreeSegmentor(FeatureExtractor.from_pretrained("embedded"))
    return segmentor(scene.image, names, caption=caption)


def test_a_mistake_is_told_in_a_sentence(page: Any) -> None:
    page.locator("#run").click()
    said(page, "Choose a picture first.")
    page.locator("#run").click()
    assert "Traceback" not in page.content()


def test_a_scene_and_its_overlap(page: Any) -> None:
    page.get_by_role("tab", name="Scenes").click()
    page.locator("#draw").click()
    said(page, "Mean IoU")
    page.locator("#overlap").get_by_text("IoU").first.wait_for()
    shoot(page, "app_scenes")


def test_a_visitor_looks_inside(page: Any, file: Path) -> None:
    page.get_by_role("tab", name="Look inside").click()
    page.locator("#looked input[type=file]").set_input_files(str(file))
    page.locator("#looked img").wait_for()
    page.locator("#components").click()
    page.locator("#features img").nth(3).wait_for()
    shoot(page, "app_look")
    page.get_by_role("tab", name="Similarity of a point").click()
    page.locator("#second input[type=file]").set_input_files(str(file))
    page.locator("#second img").wait_for()
    shown = page.locator("#looked img")
    shown.scroll_into_view_if_needed()
    box = shown.bounding_box()  # a small picture stands in the middle of it, not enlarged
    shown.click(position={"x": box["width"] / 2 - 64 + 32, "y": box["height"] / 2 - 64 + 96})
    said(page, "is most like column")
    words = page.locator("#matched").inner_text().replace(",", "").replace(":", "").split()
    numbers = [int(word) for word in words if word.isdecimal()]
    assert numbers[:2] == numbers[2:4], "the same picture: a point is found where it is"
    assert abs(numbers[0] - 32) <= 2 and abs(numbers[1] - 96) <= 2
    page.get_by_role("tab", name="Attention of a word").click()
    page.locator("#word input, #word textarea").first.fill("sand")
    page.locator("#attention").click()
    said(page, "It read:")


def test_cancel_leaves_a_page_that_works(page: Any, file: Path) -> None:
    page.locator("#picture input[type=file]").set_input_files(str(file))
    page.locator("#picture img").wait_for()
    choose(page, "#classes", *(f"thing {number}" for number in range(12)))
    page.locator("#run").click()
    page.get_by_role("button", name="Cancel").click()
    done = page.get_by_text("by a run of the model").or_(page.get_by_text("from what the model gave before"))
    for _ in range(20):  # a press is ignored until the cancelled run has ended
        page.locator("#run").click()
        try:
            done.first.wait_for(timeout=6000)
            return
        except sync_api.TimeoutError:
            continue
    pytest.fail("after Cancel, the page segments no more")


def test_on_a_phone_nothing_sticks_out(page: Any, file: Path) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator("#picture input[type=file]").set_input_files(str(file))
    page.locator("#picture img").wait_for()
    for tab in ("Segment", "Scenes", "Look inside"):
        page.get_by_role("tab", name=tab).first.click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
    page.get_by_role("tab", name="Segment").first.click()
    shoot(page, "app_phone")
    width = page.locator("#run").bounding_box()["width"]
    assert 150 < width <= 390


def test_what_is_pressed_and_filled_has_a_name(page: Any) -> None:
    """For screen readers: every visible button and field says what it is."""
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, select')]
          .filter(e => e.offsetParent !== null && e.type !== 'file')
          .filter(e => !(e.innerText?.trim() || e.getAttribute('aria-label') || e.title || e.labels?.length
                         || e.getAttribute('aria-labelledby') || e.placeholder || e.querySelector('[alt]')))
          .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
