"""Starting the page: from the command line, and as a hosted space does."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest

from diffusion_features.cli import main
from segmentors.demo import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that the page would be served with."""
    import segmentors.demo

    found: list[Settings] = []
    monkeypatch.setattr(segmentors.demo, "serve", found.append, raising=False)
    return found


def test_options_become_settings(served: list[Settings]) -> None:
    assert main(["app"]) == 0
    assert main(["app", "--model", "embedded", "--model", "a/b", "--public", "--port", "7999"]) == 0
    assert served == [Settings(), Settings(models=("embedded", "a/b"), public=True, port=7999)]


@pytest.mark.parametrize(("space", "public"), [(None, False), ("someone/demo", True)])
def test_app_py_is_public_on_a_space(
    served: list[Settings], space: str | None, public: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    if space:
        monkeypatch.setenv("SPACE_ID", space)
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", "a/b"])
    with pytest.raises(SystemExit) as ended:
        run_as_main(ROOT / "app.py")
    assert ended.value.code == 0
    (settings,) = served
    assert settings.public is public and settings.models == ("a/b",)


def run_as_main(file: Path) -> None:
    spec = importlib.util.spec_from_file_location("__main__", file)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def test_without_gradio_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    assert "pip install 'diffusion-features[app]'" in capsys.readouterr().err


def test_a_model_named_twice(capsys: pytest.CaptureFixture) -> None:
    assert main(["app", "--model", "embedded", "--model", "embedded"]) == 2
    assert "each by another name" in capsys.readouterr().err


def test_a_port_that_is_taken_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["app", "--port", str(taken.getsockname()[1])]) == 2
    assert "port" in capsys.readouterr().err.lower()
    assert not list(tmp_path.iterdir())
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)
