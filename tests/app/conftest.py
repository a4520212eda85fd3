"""The page, served once for all tests, with the embedded model and a tiny one of random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffusion_features.embedded import Scene, render
from tests.app.browsing import browsing, visit
from tests.app.serving import Server
from tests.tiny import save_sd15

pytest.importorskip("gradio", reason="the demo needs Gradio: pip install 'diffusion-features[app]'")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_sd15(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> Iterator[Server]:
    from segmentors.demo import Settings, running

    place = tmp_path_factory.mktemp("served")
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(place))
    with running(Settings(models=("embedded", tiny_model))) as address:
        (folder,) = place.iterdir()
        yield Server(address, folder, Path(tiny_model).name)
    assert not list(place.iterdir()), "the page left files behind"
    patch.undo()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    with visit(browser, server) as page:
        yield page


@pytest.fixture(scope="module")
def scene() -> Scene:
    return render(20_000_033, 128)


@pytest.fixture(scope="module")
def file(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("uploads") / "scene.png"
    scene.image.save(file)
    return file
