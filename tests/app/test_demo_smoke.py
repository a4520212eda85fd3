"""The page in a real browser, in short: it opens, segments a picture, and nothing goes wrong."""

from __future__ import annotations

from pathlib import Path

from diffusion_features.embedded import render
from tests.app.browsing import browsing, choose, expected, found, legend, put, shoot, visit
from tests.app.serving import Server


def test_a_visitor_segments_a_scene(server: Server, tmp_path: Path) -> None:
    scene = render(20_000_033, 128)
    scene.image.save(tmp_path / "scene.png")
    with browsing() as browser, visit(browser, server) as page:
        put(page, "#picture", tmp_path / "scene.png")
        choose(page, "#classes", *scene.classes)
        page.locator("#run").click()
        assert legend(page) == found(expected(scene, [*scene.classes]))
        shoot(page, "app_smoke")
