"""``list``: it says of every family what a loaded model says, and reads no weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from diffusion_features import FeatureExtractor
from diffusion_features.cli import main
from diffusion_features.embedded import MODELS
from tests.hub import Hub
from tests.tiny import save_sd15
from tests.tiny_dits import PIPELINES, build
from tests.tiny_families import save_if, save_playground_v2, save_sd21, save_sdxl

FAMILIES = {"sd15": save_sd15, "sd21": save_sd21, "sdxl": save_sdxl, "playground-v2": save_playground_v2, "if": save_if}


def save(name: str, folder: Path) -> None:
    FAMILIES[name](folder) if name in FAMILIES else build(name).save_pretrained(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd15(tmp_path_factory.mktemp("sd15"))


def test_list(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--model", str(model), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    fx = FeatureExtractor.from_pretrained(str(model), activations=["*", "*-map"])
    assert [row["id"] for row in rows] == [a.id for a in fx.available]
    for row in rows:
        info = fx.feature_info[row["id"]]
        assert (row["kind"], row["channels"], row["stride"]) == (info.kind, info.channels, info.stride)
    assert main(["list", "--model", str(model), "mid-vit-*-map", "unet-*"]) == 0
    shown = capsys.readouterr().out
    assert "unet-after-conv-in" in shown and "mid-vit-block0-cross-map" in shown and "down" not in shown
    assert "16 x H/8 x W/8" in shown
    assert main(["list", "--model", str(model), "mid-vat-*"]) == 2
    assert "mid-vit" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*FAMILIES, *PIPELINES])
def test_list_tells_from_the_configuration_what_a_model_has(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(name, tmp_path)
    fx = FeatureExtractor.from_pretrained(tmp_path, "*", device="cpu")
    expected = [{"id": a.id, **asdict(fx.info(a))} for a in fx.available]
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    shutil.rmtree(tmp_path / "tokenizer")
    capsys.readouterr()
    assert main(["list", "--model", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected


@pytest.mark.parametrize("name", MODELS)
def test_list_of_what_ships(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    fx = FeatureExtractor.from_pretrained(name, device="cpu")
    assert main(["list", "--model", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"id": a.id, **asdict(fx.info(a))} for a in fx.available]


def test_list_downloads_configurations_alone(tmp_path: Path) -> None:
    hub = Hub()
    try:
        save("flux_dev", tmp_path / "repo")
        repo = hub.add("someone/flux", tmp_path / "repo")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name}
        mine = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-m", "diffusion_features", "list", "--model", repo, "vit-block0-out"]

        def run(*options: str, **more: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([*command, *options], capture_output=True, text=True, env=kept | mine | more)

        shown = run()
        assert shown.returncode == 0 and "1 of the 44 activations of someone/flux" in shown.stdout, shown.stderr
        assert hub.downloaded(repo) == {"model_index.json", "transformer/config.json", "vae/config.json"}
        assert run(HF_HUB_OFFLINE="1").stdout == shown.stdout
        wrong = run("--revision", "nope")
        assert wrong.returncode == 2 and "has no revision 'nope'" in wrong.stderr
    finally:
        hub.close()


def test_list_of_what_is_not_whole(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "vae" / "config.json").unlink()
    for arguments, words in (
        (["--model", str(tmp_path / "model")], f"{tmp_path / 'model' / 'vae'} has no config.json"),
        (["--model", str(tmp_path)], "model_index.json"),
        (["--model", str(model), "--revision", "main"], "revisions exist only on a hub"),
    ):
        assert main(["list", *arguments]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1


def test_list_into_a_closed_pipe(model: Path) -> None:
    command = f"{sys.executable} -m diffusion_features list --model {model} | head -n 1"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert ended.stdout.startswith("id ") and not ended.stderr
