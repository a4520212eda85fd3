"""The page in a real browser.

Screenshots go to the folder that DEMO_SCREENSHOTS names, if it is set; those of the documentation are made by

    DEMO_SCREENSHOTS=docs/images python -m pytest -m slow tests/app/test_demo_browser.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_features.activations import presets
from diffusion_features.embedded import Scene
from segmentors import Method
from tests.app.browsing import PATIENCE, choose, expected, found, legend, numbers, put, said, shoot, tab, visit
from tests.app.serving import Server

pytestmark = pytest.mark.slow  # minutes, and it needs a browser

TABS = ("Segment", "Scenes", "Look inside", "Content shift")
SCHEMES = ("light", "dark")
LABELS = "#files a[download='labels.png']"


def test_a_visitor_segments_a_picture(page: Any, file: Path, scene: Scene, tmp_path: Path) -> None:
    names = [*scene.classes]
    put(page, "#picture", file)
    choose(page, "#classes", *names)
    caption = f"a photo of {' and '.join(names)}"  # of no other test: the model has to run
    page.get_by_label("Caption").first.fill(caption)
    page.locator("#run").click()
    said(page, "by a run of the model")
    assert legend(page) == found(expected(scene, names, caption))
    page.evaluate("scrollTo(0, 0)")
    shoot(page, "app_segment")

    page.locator("#classes").get_by_role("button", name="Remove").first.click()  # the caption still names it: no run
    said(page, "from what the model gave before")
    fewer = expected(scene, names[1:], caption)
    assert legend(page) == found(fewer)

    tab(page, "Files")
    link = page.locator(LABELS).first
    assert np.array_equal(downloaded(page, link, tmp_path), fewer.labels.numpy())
    old = link.evaluate("link => link.href")
    page.get_by_role("button", name="Advanced").click()
    page.locator("#edges input").click()
    page.get_by_role("option", name="pamr", exact=True).click()
    page.wait_for_function("([place, old]) => document.querySelector(place)?.href !== old", arg=[LABELS, old])
    finer = expected(scene, names[1:], caption, Method(edges="pamr"))
    assert not fewer.labels.equal(finer.labels)
    assert np.array_equal(downloaded(page, link, tmp_path), finer.labels.numpy())
    tab(page, "Scores")
    page.locator("#scores img").first.wait_for()
    assert page.locator("#scores .caption-label, #scores figcaption").count() >= len(names) - 1


def downloaded(page: Any, link: Any, folder: Path) -> np.ndarray:
    """The labels behind a link."""
    with page.expect_download() as download:
        link.click()
    download.value.save_as(folder / "labels.png")
    with Image.open(folder / "labels.png") as labels:
        assert labels.mode == "P"
        return np.array(labels)


def test_a_mistake_is_told_in_a_sentence(page: Any) -> None:
    page.locator("#run").click()
    said(page, "Choose a picture first.")
    page.locator("#run").click()
    assert "Traceback" not in page.content()


def test_a_scene_and_its_overlap(page: Any) -> None:
    tab(page, "Scenes")
    page.locator("#draw").click()
    said(page, "Mean IoU")
    page.locator("#overlap").get_by_text("IoU").first.wait_for()
    shoot(page, "app_scenes")


def test_a_visitor_looks_inside(page: Any, file: Path) -> None:
    tab(page, "Look inside")
    put(page, "#looked", file)
    page.locator("#components").click()
    page.locator("#features img").nth(3).wait_for()
    shoot(page, "app_look")
    choose_preset(page)
    choose_part(page)
    tab(page, "Similarity of a point")
    put(page, "#second", file)
    hovered(page)
    shown = page.locator("#looked img")
    shown.scroll_into_view_if_needed()
    box = shown.bounding_box()  # a small picture stands in the middle of it, not enlarged
    shown.click(position={"x": box["width"] / 2 - 64 + 32, "y": box["height"] / 2 - 64 + 96})
    page.locator("#matched").get_by_text("is most like column").wait_for()
    place = numbers(page.locator("#matched").inner_text())
    assert place[:2] == place[2:4], "the same picture: a point is found where it is"
    assert abs(place[0] - 32) <= 2 and abs(place[1] - 96) <= 2
    tab(page, "Attention of a word")
    page.locator("#word input, #word textarea").first.fill("sand")
    page.locator("#attention").click()
    said(page, "It read:")


def choose_preset(page: Any) -> None:
    """A preset fills in its activations, to which more can be added."""
    page.locator("#preset input").click()
    page.get_by_role("option", name="legacy", exact=True).click()
    for id in presets("sd15")["legacy"]:
        page.locator("#activations").get_by_text(id, exact=True).wait_for()


def choose_part(page: Any) -> None:
    """One activation, found by its part of the model and then by a part of its name."""
    page.locator("#place input").click()
    page.get_by_role("option", name="up-level1-repeat1", exact=True).click()
    field = page.locator("#activations input")
    field.click()
    page.get_by_role("option", name="up-level1-repeat1-res-out", exact=True).wait_for()
    assert page.get_by_role("option", name="mid-vit-out").count() == 0
    field.fill("res-out")
    page.get_by_role("option", name="up-level1-repeat1-res-out", exact=True).click()
    field.press("Escape")
    page.locator("#components").click()
    page.locator("#features").get_by_text("up-level1-repeat1-res-out").first.wait_for()


def hovered(page: Any) -> None:
    """Similarities follow the pointer and the arrow keys; in the same picture a place is found where it is."""
    page.locator("#prepare").click()
    said(page, "most like column")
    canvas, words = page.locator("#hover canvas").first, page.locator("#hover output")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    canvas.hover(position={"x": box["width"] * 0.3, "y": box["height"] * 0.7})
    before = numbers(words.inner_text())
    assert abs(before[0] - 0.3 * 128) <= 8 and abs(before[1] - 0.7 * 128) <= 8 and before[:2] == before[2:4]
    canvas.focus()
    page.keyboard.press("ArrowLeft")
    after = numbers(words.inner_text())
    assert after[0] < before[0] and after[1] == before[1]
    shoot(page, "app_hover")


def test_content_shift_is_tested(page: Any, file: Path) -> None:
    tab(page, "Content shift")
    put(page, "#tested", file)
    page.get_by_label("Draws of noise").fill("3")
    page.locator("#gate").click()
    step = page.locator(".progress-level-inner").get_by_text("Finer prompt").first  # the steps have names
    step.wait_for(timeout=5 * PATIENCE)
    page.locator("#repainted img").nth(4).wait_for(timeout=5 * PATIENCE)  # dozens of runs of the model
    said(page, "guidance and denoise · SSIM")
    gains = page.locator("#gains")
    # Gradio measures its columns with a hidden copy of the table.
    gains.get_by_text("guidance and denoise").locator("visible=true").first.wait_for()
    words = gains.inner_text()
    assert sum(words.count(verdict) for verdict in ("use", "no effect", "harmful")) >= 3, words
    page.evaluate("scrollTo(0, 0)")
    shoot(page, "app_shift")


def test_one_press_after_cancel_runs_again(page: Any, file: Path) -> None:
    tab(page, "Content shift")
    put(page, "#tested", file)
    page.get_by_label("Draws of noise").fill("8")
    page.locator("#gate").click()
    step = page.locator(".progress-level-inner").first
    step.wait_for()
    page.locator("#cancel-gate").click()
    step.wait_for(state="hidden")
    assert page.locator("#repainted img").count() == 0, "it ran to its end"
    page.locator("#gate").click()
    step.wait_for()
    page.locator("#cancel-gate").click()
    step.wait_for(state="hidden")
    tab(page, "Scenes")
    page.locator("#draw").click()
    said(page, "Mean IoU")


def test_on_a_phone_a_picture_is_segmented_and_nothing_sticks_out(
    browser: Any, server: Server, file: Path, scene: Scene
) -> None:
    with visit(browser, server, viewport={"width": 390, "height": 844}, has_touch=True) as page:
        put(page, "#picture", file)
        shoot(page, "app_phone")
        width = page.locator("#run").bounding_box()["width"]
        assert 150 < width <= 390
        choose(page, "#classes", *scene.classes)
        page.locator("#run").click()
        assert legend(page) == found(expected(scene, [*scene.classes]))
        shown = page.locator("#result img").first
        page.wait_for_timeout(1000)  # it scrolls there by itself
        place = shown.bounding_box()
        assert 0 <= place["y"] < 844 and place["x"] >= 0 and place["x"] + place["width"] <= 390
        shoot(page, "app_phone_result")
        for name in TABS:
            open_on_a_phone(page, name)
            page.wait_for_timeout(300)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name


def open_on_a_phone(page: Any, name: str) -> None:
    """Tabs that have no room stand in a menu."""
    shown = page.get_by_role("tab", name=name, exact=True)
    if shown.is_visible():
        shown.click()
    else:
        page.locator(".overflow-menu > button").first.click()
        page.locator(".overflow-dropdown button", has_text=name).first.click()


UNREADABLE = """() => {
  const sheet = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    sheet.clearRect(0, 0, 1, 1);
    sheet.fillStyle = colour;
    sheet.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = sheet.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.unshift(rgba(getComputedStyle(e).backgroundColor));
    return layers.reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const light = colour => {
    const [r, g, b] = colour.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const words = e => e.matches('input:not([type=checkbox]):not([type=range]), textarea') ? e.value
    : [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.textContent.trim()).join(' ').trim();
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    if (!/[\\p{L}\\p{N}]/u.test(words(e)) || e.closest(':disabled, svg, style, script')) continue;
    if (!e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    const ground = behind(e);
    const [high, low] = [light(over(rgba(getComputedStyle(e).color), ground)), light(ground)].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(1)}: ${words(e).slice(0, 60)}`);
  }
  return found;
}"""
"""Texts whose contrast is below 4.5 to 1, as WCAG 2.2 reckons it (1.4.3)."""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_text_can_be_read(browser: Any, server: Server, file: Path, scene: Scene, scheme: str) -> None:
    with visit(browser, server, color_scheme=scheme) as page:
        assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
        put(page, "#picture", file)
        choose(page, "#classes", *scene.classes)
        page.locator("#run").click()
        legend(page)
        unreadable = {}
        for name in TABS:
            tab(page, name)
            page.wait_for_timeout(600)  # colours fade
            unreadable[name] = page.evaluate(UNREADABLE)
            if (scheme, name) == ("dark", "Segment"):
                shoot(page, "app_dark")
        assert not any(unreadable.values()), unreadable


def test_the_keyboard_is_enough(page: Any) -> None:
    """Tab goes from the first tab of the page to every field below it, and Enter opens another tab."""
    page.get_by_role("tab", name="Segment", exact=True).focus()
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                """() => {
                  const e = document.activeElement;
                  const name = e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.innerText;
                  return name.split('\\n')[0].trim();
                }"""
            )
        )
    assert reached >= {"Upload file", "Classes", "Background", "Caption", "Advanced", "Cancel", "Segment"}, reached
    page.get_by_role("tab", name="Content shift", exact=True).focus()
    page.keyboard.press("Enter")
    page.locator("#gate").wait_for()


def test_what_is_pressed_and_filled_has_a_name(page: Any) -> None:
    """For screen readers: every visible button and field says what it is."""
    for name in TABS:
        tab(page, name)
        page.wait_for_timeout(300)
        assert nameless(page) == [], name


def nameless(page: Any) -> list[str]:
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, select')]
          .filter(e => e.offsetParent !== null && e.type !== 'file')
          .filter(e => !(e.innerText?.trim() || e.getAttribute('aria-label') || e.title || e.labels?.length
                         || e.getAttribute('aria-labelledby') || e.placeholder || e.querySelector('[alt]')))
          .map(e => e.outerHTML.slice(0, 200))"""
    )
    return found
