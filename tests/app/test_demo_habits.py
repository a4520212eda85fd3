"""What visitors do beside the straight way: they look and leave, type and forget Enter, change their mind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from diffusion_features.embedded import Scene
from tests.app.browsing import choose, expected, found, legend, numbers, put, said, tab

pytestmark = pytest.mark.slow  # it needs a browser


@contextmanager
def asked(page: Any) -> Iterator[list[str]]:
    """The requests to the queue of the page meanwhile, and for a second after."""
    sent: list[str] = []

    def note(request: Any) -> None:
        if "/queue/join" in request.url:
            sent.append(request.post_data)

    page.on("request", note)
    yield sent
    page.wait_for_timeout(1000)
    page.remove_listener("request", note)


def segmented(page: Any, file: Path, names: list[str]) -> None:
    put(page, "#picture", file)
    choose(page, "#classes", *names)
    page.locator("#run").click()
    said(page, "It read:")
    page.locator("#result .legend-item").first.wait_for()


def cleared(page: Any) -> None:
    """Take the picture away."""
    button = page.locator("#picture").get_by_role("button", name="Clear")
    button.or_(page.locator("#picture").get_by_role("button", name="Remove Image")).first.click()


def has_legend(page: Any, names: set[str]) -> None:
    """Wait for it."""
    page.wait_for_function(
        """names => {
          const shown = [...document.querySelectorAll('#result .legend-item')].map(one => one.innerText.trim());
          return shown.length === names.length && names.every(one => shown.includes(one));
        }""",
        arg=sorted(names),
    )


def test_a_word_that_is_typed_counts_at_once(page: Any, file: Path, scene: Scene) -> None:
    names = [*scene.classes]
    segmented(page, file, names[:2])
    choose(page, "#classes", names[2])
    has_legend(page, found(expected(scene, names[:3])))
    page.locator("#classes input").press("Backspace")
    has_legend(page, found(expected(scene, names[:2])))
    page.locator("#classes").get_by_role("button", name="Remove").first.click()
    page.locator("#classes").get_by_role("button", name="Remove").first.click()
    said(page, "Choose a picture")
    assert page.locator("#result .legend-item").count() == 0


def test_a_press_counts_though_the_last_word_was_not_entered(page: Any, file: Path, scene: Scene) -> None:
    put(page, "#picture", file)
    choose(page, "#classes", "sky", "sand", "car", "cat")
    page.locator("#classes input").fill("boat")
    page.wait_for_timeout(300)
    page.locator("#run").hover()
    page.mouse.down()
    page.wait_for_timeout(150)
    page.mouse.up()
    said(page, "sky, sand, car, cat, boat")


def test_a_press_that_ends_elsewhere_does_not_count(page: Any, file: Path) -> None:
    put(page, "#picture", file)
    choose(page, "#classes", "sky", "sand")
    page.wait_for_timeout(1000)
    with asked(page) as sent:
        page.locator("#run").hover()
        page.mouse.down()
        page.mouse.move(5, 5, steps=3)
        page.mouse.up()
    assert sent == []
    page.locator("#run").click()
    said(page, "It read:")


def test_a_run_ends_with_its_picture(page: Any, scene: Scene, tmp_path: Path) -> None:
    big = tmp_path / "big.png"
    scene.image.resize((1024, 1024)).save(big)
    segmented(page, big, [*scene.classes])
    page.get_by_label("Caption").first.fill("a picture that goes")
    page.locator("#run").click()
    cleared(page)
    page.wait_for_timeout(4000)
    assert page.locator("#result img").count() == 0
    said(page, "Choose a picture")


def test_looking_at_a_setting_asks_nothing(page: Any, file: Path, scene: Scene) -> None:
    segmented(page, file, [*scene.classes])
    page.get_by_role("button", name="Advanced").click()
    page.locator("#edges").wait_for()
    page.wait_for_timeout(1000)
    with asked(page) as sent:
        page.locator("#timestep input, #timestep textarea").first.focus()
        for _ in range(12):
            page.keyboard.press("Tab")
        page.locator("#edges input").click()
        page.locator("#title").click()
    assert len(sent) <= 1, "Gradio lets go of a slider when its number is left, and of nothing else"


def test_a_slider_counts_by_keyboard(page: Any, file: Path, scene: Scene) -> None:
    segmented(page, file, [*scene.classes])
    tab(page, "Files")
    link = page.locator("#files a[download='overlay.png']").first
    old = link.evaluate("link => link.href")
    page.locator("#opacity input[type=range]").focus()
    page.keyboard.press("Home")
    page.wait_for_function("old => document.querySelector(\"#files a[download='overlay.png']\")?.href !== old", arg=old)


def test_looking_at_a_preset_keeps_what_is_chosen(page: Any, file: Path) -> None:
    tab(page, "Look inside")
    choose(page, "#activations", "mid-vit-out", "up-level1-repeat1-vit-out")
    page.locator("#preset input").click()
    page.locator("#title").click()
    page.wait_for_timeout(1000)
    for id in ("mid-vit-out", "up-level1-repeat1-vit-out"):
        assert page.locator("#activations").get_by_text(id, exact=True).count() == 1


def test_a_preset_is_chosen_by_keyboard(page: Any) -> None:
    tab(page, "Look inside")
    page.locator("#preset input").focus()
    page.wait_for_timeout(1500)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.locator("#activations .token").first.wait_for()


def test_what_was_found_goes_with_its_picture(page: Any, file: Path, scene: Scene, tmp_path: Path) -> None:
    segmented(page, file, [*scene.classes])
    other = tmp_path / "other.png"
    scene.image.rotate(180).save(other)
    cleared(page)
    said(page, "Choose a picture")
    assert page.locator("#result img").count() == 0
    for one in (file, other):  # the same again counts as another
        put(page, "#picture", one)
        with page.expect_response(lambda answer: "/queue/join" in answer.url):
            choose(page, "#classes", "boat" if one == file else "tree")
        page.wait_for_timeout(2000)
        assert page.locator("#result img").count() == 0, "nobody asked about this picture"
        cleared(page)
    put(page, "#picture", other)
    page.locator("#run").click()
    said(page, "It read:")


def test_cancel_leaves_what_there_was(page: Any, scene: Scene, tmp_path: Path) -> None:
    big = tmp_path / "big.png"
    scene.image.resize((1024, 1024)).save(big)
    names = [*scene.classes]
    segmented(page, big, names)
    before, cancelled = legend(page), 0
    for number, pause in enumerate((50, 150, 250, 300, 350)):
        page.get_by_label("Caption").first.fill(f"a picture of {number} things")
        page.locator("#run").click()
        page.wait_for_timeout(pause)
        page.locator("#cancel-run").click()
        page.wait_for_timeout(1500)
        assert page.get_by_text("Error", exact=True).locator("visible=true").count() == 0, pause
        if page.get_by_text(f"picture of {number} things, sky").count() == 0:  # it was not done before
            cancelled += 1
            assert legend(page) == before, pause
        before = legend(page)
    assert cancelled


def test_points_are_told_in_pixels_of_the_picture_as_it_was_sent(page: Any, scene: Scene, tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    scene.image.resize((2048, 1024)).save(wide)
    tab(page, "Look inside")
    put(page, "#looked", wide)
    tab(page, "Similarity of a point")
    put(page, "#second", wide)
    page.get_by_role("spinbutton", name="Column").fill("1500")
    page.get_by_role("spinbutton", name="Row").fill("900")
    page.locator("#find").click()
    page.locator("#matched").get_by_text("is most like column").wait_for()
    place = numbers(page.locator("#matched").inner_text())
    assert place[:2] == [1500, 900] and abs(place[2] - 1500) <= 16 and abs(place[3] - 900) <= 16
