"""The commands, run on a tiny pipeline folder as a user would run them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusion_features import FeatureExtractor, embedded
from diffusion_features.cli import main
from diffusion_features.cli.extract import _digest
from diffusion_features.cli.options import size
from diffusion_features.store import Store
from tests.tiny import save_sd15
from tests.tiny_dits import build

IDS = ["mid-vit-out", "up-level2-repeat1-vit-block0-cross-q", "mid-vit-block0-cross-k"]
CHOICE = [argument for id in IDS for argument in ("--activations", id)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd15(tmp_path_factory.mktemp("sd15"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    make_photo(folder / "cat.jpg", 64, 64, 0)
    make_photo(folder / "cat.png", 64, 64, 1)
    make_photo(folder / "more" / "dog.png", 64, 96, 2)
    return folder


def make_photo(path: Path, height: int, width: int, seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> digest of every file, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def extract(model: Path, *arguments: object) -> int:
    return main(["extract", "--model", str(model), *CHOICE, *map(str, arguments)])


def test_extract_writes_what_the_extractor_gives(model: Path, photos: Path, tmp_path: Path) -> None:
    assert extract(model, photos, "-o", tmp_path / "out", "--prompt", "a cat", "--t", 100, "--seed", 3) == 0
    store = Store.open(tmp_path / "out")
    assert list(store) == ["cat.jpg", "cat.png", "more/dog.png"]
    fx = FeatureExtractor.from_pretrained(str(model), activations=IDS)
    for key in store:
        direct = fx(Image.open(photos / key), prompt="a cat", t=100, seed=3)
        read = store.read(key)
        assert list(read) == list(direct)
        for id, tensor in read.items():
            assert torch.equal(tensor, direct[id][0])
    record = store.record("more/dog.png")
    assert record["original_size"] == record["size"] == [64, 96] and record["prompt"] == "a cat"
    assert record["sha256"] == hashlib.sha256((photos / "more/dog.png").read_bytes()).hexdigest()
    assert record["source"] == str(photos / "more" / "dog.png")


def test_manifest_names_everything(model: Path, photos: Path, tmp_path: Path) -> None:
    assert extract(model, photos, "-o", tmp_path / "out", "--t", 1, "--t", 200, "--size", "64x32") == 0
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert settings["model"] == str(model) and settings["revision"] is None and settings["prompt"] == ""
    assert settings["t"] == [1, 200] and settings["seed"] == 0 and settings["size"] == [64, 32]
    assert settings["dtype"] == "float32"
    assert settings["activations"]["mid-vit-out"] == {"channels": 32, "stride": 64, "kind": "spatial"}
    assert Store.open(tmp_path / "out").read("cat.jpg")["mid-vit-out"].shape == (2, 32, 1, 1)


def test_batches_of_equal_size_and_half_precision(model: Path, photos: Path, tmp_path: Path) -> None:
    for count in (1, 3):
        out = tmp_path / str(count)
        assert extract(model, photos, "-o", out, "--batch-size", count, "--dtype", "bfloat16") == 0
    one, three = Store.open(tmp_path / "1"), Store.open(tmp_path / "3")
    assert list(one) == list(three) and one.settings == three.settings
    for key in one:
        for id, tensor in one.read(key).items():
            assert tensor.dtype == torch.bfloat16
            assert torch.allclose(tensor.float(), three.read(key)[id].float(), atol=0.1)


def test_sizes_are_fitted_and_said_once(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(3):
        make_photo(tmp_path / "photos" / f"{index}.png", 61, 70 + index, index)
    assert extract(model, tmp_path / "photos", "-o", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert said.count("multiples of 8") == 1 and "61x70 to 64x72" in said
    record = Store.open(tmp_path / "out").record("2.png")
    assert record["original_size"] == [61, 72] and record["size"] == [64, 72]


def test_prompt_files(model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = {"cat.jpg": "a cat", "cat.png": "the cat", "more/dog.png": "a dog"}
    files = {
        "object.json": json.dumps(prompts),
        "list.json": json.dumps([*prompts.values()]),
        "lines.txt": "\n".join(prompts.values()) + "\n",
    }
    found = []
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert extract(model, photos, "-o", tmp_path / name[:4], "--prompt-file", tmp_path / name) == 0
        store = Store.open(tmp_path / name[:4])
        assert {key: store.record(key)["prompt"] for key in store} == prompts and store.settings["prompt"] is None
        found.append(contents(tmp_path / name[:4]))
    assert found[0] == found[1] == found[2]
    (tmp_path / "lines.txt").write_text("\n".join(["a cat", "a new one", "a dog"]))
    capsys.readouterr()
    assert extract(model, photos, "-o", tmp_path / "line", "--prompt-file", tmp_path / "lines.txt") == 0
    assert "1 written" in capsys.readouterr().err
    for text, words in (
        ("one\ntwo", "2 prompts, but there are 3"),
        ('{"cat.jpg": "x"}', "no prompt for cat.png and 1"),
    ):
        file = tmp_path / ("bad.json" if text.startswith("{") else "bad.txt")
        file.write_text(text)
        assert extract(model, photos, "-o", tmp_path / "bad", "--prompt-file", file) == 2
        assert words in capsys.readouterr().err


def test_lines_go_by_the_names_in_string_order(model: Path, photos: Path, tmp_path: Path) -> None:
    """Not by the order of the arguments, nor by that of paths, in which more/dog.png stands before more-cats.png."""
    make_photo(photos / "more-cats.png", 64, 64, 3)
    (tmp_path / "lines.txt").write_text("a cat\nthe cat\ncats\na dog\n")
    expected = {"cat.jpg": "a cat", "cat.png": "the cat", "more-cats.png": "cats", "more/dog.png": "a dog"}
    given = ["--prompt-file", tmp_path / "lines.txt"]
    assert extract(model, photos, "-o", tmp_path / "folder", *given) == 0
    store = Store.open(tmp_path / "folder")
    assert {key: store.record(key)["prompt"] for key in store} == expected
    (tmp_path / "lines.txt").write_text("a cat\nthe cat\n")
    two = [photos / "cat.png", photos / "cat.jpg"]
    assert extract(model, *two, "-o", tmp_path / "files", *given) == 0
    store = Store.open(tmp_path / "files")
    assert {key: store.record(key)["prompt"] for key in store} == {"cat.jpg": "a cat", "cat.png": "the cat"}

    shared = ["--model", str(model), "--activations", "mid-vit-block0-cross-map"]
    drawn = ["visualize", *map(str, two), "-o", str(tmp_path / "lines"), *shared, *map(str, given)]
    assert main(drawn) == 0
    assert main(["visualize", str(two[1]), "-o", str(tmp_path / "a cat.png"), *shared, "--prompt", "a cat"]) == 0
    assert (tmp_path / "lines" / "cat.jpg.png").read_bytes() == (tmp_path / "a cat.png").read_bytes()


def test_what_is_there_is_not_done_again(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert extract(model, photos, "-o", out) == 0
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    make_photo(photos / "cat.png", 64, 64, 9)
    make_photo(photos / "new.png", 64, 64, 10)
    capsys.readouterr()
    assert extract(model, photos, "-o", out) == 0
    assert "2 written" in capsys.readouterr().err
    renewed = {path.name for path in out.rglob("*.safetensors") if written.get(path) != path.stat().st_mtime_ns}
    assert renewed == {"cat.png.safetensors", "new.png.safetensors"}


def test_other_settings_are_refused_unless_told(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert extract(model, photos, "-o", out) == 0
    before = contents(out)
    assert extract(model, photos, "-o", out, "--t", 100, "--seed", 1) == 2
    said = capsys.readouterr().err
    assert "t: [50] there, [100] asked for; seed: 0 there, 1 asked for" in said and "--overwrite" in said
    assert contents(out) == before
    assert extract(model, photos / "cat.jpg", "-o", out, "--t", 100, "--seed", 1, "--overwrite") == 0
    assert list(Store.open(out)) == ["cat.jpg"] and Store.open(out).settings["t"] == [100]


@pytest.mark.parametrize("wrong", [["--t", "5000"], ["--t", "50", "--t", "1000"], ["--prompt-file", "{long}"]])
def test_a_wrong_setting_costs_no_features(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    model = tmp_path / "model"
    build("pixart_sigma").save_pretrained(model)  # reads 300 tokens of a prompt
    long = tmp_path / "long.json"
    long.write_text(json.dumps(["a cat", "a cat " * 200, "a dog"]))
    command = ["extract", str(photos), "--model", str(model), "--activations", "vit-block0-out", "-o"]
    given = [text.format(long=long) for text in wrong]
    assert main([*command, str(tmp_path / "new"), *given]) == 2
    assert not (tmp_path / "new").exists()
    assert main([*command, str(tmp_path / "kept")]) == 0
    before = contents(tmp_path / "kept")
    capsys.readouterr()
    assert main([*command, str(tmp_path / "kept"), "--overwrite", *given]) == 2
    assert contents(tmp_path / "kept") == before
    assert capsys.readouterr().err.count("\n") == 1


def test_overwriting_with_unreadable_images_keeps_what_is_there(model: Path, photos: Path, tmp_path: Path) -> None:
    assert extract(model, photos, "-o", tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    (tmp_path / "broken.png").write_text("not a picture")
    assert extract(model, tmp_path / "broken.png", "-o", tmp_path / "out", "--t", 100, "--overwrite") == 1
    assert contents(tmp_path / "out") == before


def test_a_folder_without_features_takes_other_settings(model: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("not a picture")
    assert extract(model, tmp_path / "broken.png", "-o", tmp_path / "out", "--t", 5) == 1
    assert extract(model, photos, "-o", tmp_path / "out") == 0
    assert len(Store.open(tmp_path / "out")) == 3 and Store.open(tmp_path / "out").settings["t"] == [50]


def test_features_of_changed_weights_are_not_mixed(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model, mine)
    assert extract(mine, photos / "cat.jpg", "-o", out) == 0
    for name in ("README.md", "unet/config.json.orig", "unet/diffusion_pytorch_model.fp16.safetensors"):
        (mine / name).write_text("nothing that is loaded")
    assert extract(mine, photos, "-o", out) == 0
    before = contents(out)
    weights = mine / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"] += 1
    save_file(tensors, weights, {"format": "pt"})
    capsys.readouterr()
    assert extract(mine, photos, "-o", out) == 2
    said = capsys.readouterr().err
    assert "weights: those of the model are not those that the features were made with" in said
    assert contents(out) == before
    assert extract(mine, photos, "-o", out, "--overwrite") == 0 and len(Store.open(out)) == 3


@pytest.mark.parametrize("name", embedded.MODELS)
def test_the_weights_that_ship_are_noted(name: str, photos: Path, tmp_path: Path) -> None:
    ids = ["--activations", "mid-vit-out" if name == "embedded" else "vit-block0-out"]
    assert main(["extract", str(photos / "cat.jpg"), "-o", str(tmp_path), "--model", name, *ids]) == 0
    settings = Store.open(tmp_path).settings
    assert settings["model"] == name and settings["weights"] == _digest(embedded.path(name), None)


def test_the_digest_of_large_weights_sees_all_over_them(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    size = 3 * 2**27
    with file.open("wb") as sparse:
        sparse.truncate(size)
    found = {_digest(file, None)}
    for part in range(0, 64, 9):
        with file.open("r+b") as sparse:
            sparse.seek(part * size // 64)
            sparse.write(b"changed")
        found.add(_digest(file, None))
    assert len(found) == 9
    small = tmp_path / "small.safetensors"
    small.write_bytes(bytes(2**20) + b"a")
    before = _digest(small, None)
    small.write_bytes(bytes(2**20) + b"b")
    assert _digest(small, None) != before


def test_corrupt_images_are_reported_and_the_rest_is_written(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "broken.png").write_text("not a picture")
    whole = (photos / "cat.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    assert extract(model, photos, "-o", tmp_path / "out", "--batch-size", 2) == 1
    said = capsys.readouterr().err
    assert f"{photos / 'broken.png'} is not an image" in said and f"{photos / 'cut.jpg'} is damaged" in said
    assert "3 written" in said and "2 failed" in said
    assert list(Store.open(tmp_path / "out")) == ["cat.jpg", "cat.png", "more/dog.png"]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_name_that_is_too_long_stops_no_other_image(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], batch: int
) -> None:
    limit = os.pathconf(tmp_path, "PC_NAME_MAX")
    fits, too_long = "f" * (limit - len(".png.safetensors")) + ".png", "a" * (limit - len(".png")) + ".png"
    for name in (fits, too_long):
        make_photo(photos / name, 64, 64, 4)
    for written in ("4 written", "0 written"):
        assert extract(model, photos, "-o", tmp_path / "out", "--batch-size", batch) == 1
        said = capsys.readouterr().err
        assert f"{photos / too_long} has too long a name" in said and written in said and "1 failed" in said
        assert list(Store.open(tmp_path / "out")) == ["cat.jpg", "cat.png", fits, "more/dog.png"]
    assert not [*(tmp_path / "out").rglob("*.part")]


def test_two_folders_with_equal_names(model: Path, photos: Path, tmp_path: Path) -> None:
    make_photo(tmp_path / "others" / "cat.jpg", 64, 64, 5)
    assert extract(model, photos, tmp_path / "others", "-o", tmp_path / "out") == 0
    sources = {Store.open(tmp_path / "out").record(key)["source"] for key in Store.open(tmp_path / "out")}
    assert len(sources) == 4 and str(tmp_path / "others" / "cat.jpg") in sources


@pytest.mark.parametrize("batch", [1, 2])
def test_killed_and_started_again_gives_the_same_bytes(model: Path, tmp_path: Path, batch: int) -> None:
    photos, whole, killed = tmp_path / "photos", tmp_path / "whole", tmp_path / "killed"
    for index in range(8):
        make_photo(photos / f"{index}.png", 64, 64 + 8 * (index % 2), index)
    arguments = ["--t", "50", "--t", "400", "--batch-size", str(batch)]
    assert extract(model, photos, "-o", whole, *arguments) == 0

    command = [sys.executable, "-m", "diffusion_features", "extract", "--model", str(model), *CHOICE, str(photos)]
    process = subprocess.Popen([*command, "-o", str(killed), *arguments], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len([*killed.glob("*.safetensors")]) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = Store.open(killed)
    assert 3 <= len(done) < 8 and process.returncode == -signal.SIGKILL
    assert len(done) == len([*killed.glob("*.safetensors")])
    (killed / ".manifest.json.1.part").write_bytes(b"half a file")
    (killed / ".7.png.safetensors.1.part").mkdir()
    (killed / ".7.png.safetensors.1.part" / ".tmpAbCdEf").touch()  # what safetensors leaves of a file

    assert extract(model, photos, "-o", killed, *arguments) == 0
    assert contents(killed) == contents(whole)


def test_ctrl_c_keeps_what_is_written(model: Path, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    for index in range(60):
        make_photo(photos / f"{index}.png", 64, 64, index)
    command = [sys.executable, "-m", "diffusion_features", "extract", "--model", str(model), *CHOICE, str(photos)]
    process = subprocess.Popen(
        [*command, "-o", str(out)], stderr=subprocess.PIPE, text=True,
        # where the tests run in the background, a shell has had SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not [*out.glob("*.safetensors")]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert "interrupted" in said and "Traceback" not in said
    assert [*json.loads((out / "manifest.json").read_text())["images"]] == [*Store.open(out)]
    assert not [*out.rglob("*.part")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{photos}/nothing"], "no file or folder"),
        (["{photos}", "--model", "{photos}/none"], "no file or folder"),
        (["{photos}", "--model", "{photos}"], "model_index"),
        (["{photos}", "--size", "60"], "64x64"),
        (["{photos}", "--t", "1000"], "999"),
        (["{photos}", "--activations", "mid-vit-uot"], "mid-vit-out"),
        (["{photos}", "--device", "cuda:77"], "cuda:77"),
        (["{photos}", "--prompt-file", "{photos}/none.txt"], "none.txt"),
        (["{photos}", "-o", "{photos}/cat.jpg"], "not a folder"),
    ],
)
def test_mistakes_are_one_sentence(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    given = [argument.format(photos=photos) for argument in arguments]
    code = main(["extract", "-o", str(tmp_path / "out"), "--model", str(model), *given])
    said = capsys.readouterr().err
    assert code == 2 and words in said and said.startswith("diffusion-features: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["extract"],
        ["extract", "a.png"],
        ["extract", "a.png", "-o", "x", "--size", "big"],
        ["extract", "a.png", "-o", "x", "--batch-size", "0"],
        ["extract", "a.png", "-o", "x", "--seed", "18446744073709551616"],
        ["extract", "a.png", "-o", "x", "--seed", "one"],
        ["extract", "a.png", "-o", "x", "--prompt", "a", "--prompt-file", "b"],
        ["atlas"],
    ],
)
def test_usage_errors_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage:" in capsys.readouterr().err


def test_size_option() -> None:
    assert size("512") == (512, 512) and size("512x768") == (512, 768) and size("64X32") == (64, 32)


@pytest.mark.parametrize("command", [[], ["list"], ["extract"], ["visualize"]])
def test_help_has_examples_and_loads_no_torch(command: list[str]) -> None:
    program = (
        "import sys; from diffusion_features.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program, *command, "--help"], capture_output=True, text=True)
    assert ended.returncode == 0 and "examples:\n  diffusion-features" in ended.stdout and not ended.stderr


def test_visualize_one_image(model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "pictures" / "cat.png"
    maps = ["--activations", "mid-*-map"]
    assert main(["visualize", str(photos / "cat.jpg"), "-o", str(out), "--model", str(model), *CHOICE, *maps]) == 0
    sheet = Image.open(out)
    assert sheet.mode == "RGB" and min(sheet.size) > 256


def test_visualize_a_folder_with_a_corrupt_image(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "broken.png").write_text("not a picture")
    command = ["visualize", str(photos), "--model", str(model), *CHOICE, "--t", "50", "--t", "300", "-o"]
    assert main([*command, str(tmp_path / "pictures")]) == 1
    assert "broken.png" in capsys.readouterr().err
    drawn = sorted(path.relative_to(tmp_path / "pictures").as_posix() for path in tmp_path.rglob("pictures/**/*.png"))
    assert drawn == ["cat.jpg.png", "cat.png.png", "more/dog.png"]
    assert main([*command, str(tmp_path / "one.png")]) == 2
    assert "must be a folder" in capsys.readouterr().err


@pytest.mark.parametrize("times", [["--t", "50"], ["--t", "50", "--t", "300"]])
def test_visualize_a_store_draws_the_same(model: Path, photos: Path, tmp_path: Path, times: list[str]) -> None:
    assert extract(model, photos, "-o", tmp_path / "store", *times) == 0
    assert main(["visualize", str(tmp_path / "store"), "-o", str(tmp_path / "from_store")]) == 0
    direct = ["visualize", str(photos), "-o", str(tmp_path / "direct"), "--model", str(model), *CHOICE, *times]
    assert main(direct) == 0
    assert contents(tmp_path / "from_store") == contents(tmp_path / "direct")


def test_visualize_a_store_whose_sources_are_gone(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "store")
    assert extract(model, photos, "-o", store) == 0
    for path in photos.rglob("*.*g"):
        path.unlink()
    capsys.readouterr()
    assert main(["visualize", store, "-o", str(tmp_path / "out"), "--activations", "mid-vit-out"]) == 0
    assert capsys.readouterr().err.count("shows the features alone") == 1
    assert main(["visualize", store, "-o", str(tmp_path / "out"), "--t", "3"]) == 2
    assert "--t cannot apply" in capsys.readouterr().err
    assert main(["visualize", store, "-o", str(tmp_path / "out"), "--activations", "nope"]) == 2
    assert "'nope'" in capsys.readouterr().err


def test_runs_from_any_folder_as_a_module(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "diffusion_features", "--help"]
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == 0
