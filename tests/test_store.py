"""The store: what is written is read, what is half-written does not count, and other settings are refused."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion_features.store import Store, StoreError, is_store

SETTINGS = {"model": "tiny", "t": [50], "activations": {"mid-res-out": {"channels": 4}, "unet-out": {"channels": 2}}}


def features(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "unet-out": torch.randn(2, 4, 4, generator=generator),
        "mid-res-out": torch.randn(4, 2, 2, generator=generator).bfloat16(),
        "a-map": torch.rand(2, 4, 5, generator=generator).half(),
    }


def assert_same(read: dict[str, torch.Tensor], written: dict[str, torch.Tensor]) -> None:
    assert list(read) == list(written)
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_round_trip_keeps_dtypes_order_and_folders(tmp_path: Path) -> None:
    with Store.create(tmp_path / "out", SETTINGS) as store:
        store.write("more/dog.png", features(1), {"sha256": "b"})
        store.write("cat.jpg", features(0), {"sha256": "a", "prompt": "a cat"})
        store.write("cat.png", features(2), {"sha256": "c"})
    store = Store.open(tmp_path / "out")
    assert list(store) == ["cat.jpg", "cat.png", "more/dog.png"] and len(store) == 3 and "cat.jpg" in store
    assert_same(store.read("cat.jpg"), features(0))
    assert_same(store.read("more/dog.png"), features(1))
    assert list(store.read("cat.png", ids=["mid-res-out"])) == ["mid-res-out"]
    assert store.record("cat.jpg")["prompt"] == "a cat" and store.settings == SETTINGS
    assert set(load_file(tmp_path / "out" / "more" / "dog.png.safetensors")) == set(features())


def test_views_and_shared_tensors_are_stored(tmp_path: Path) -> None:
    batch = torch.randn(2, 6, 4, 4)
    store = Store.create(tmp_path, SETTINGS)
    store.write("a.png", {"x": batch[1], "y": batch[1], "z": batch[1].transpose(1, 2)}, {})
    assert_same(store.read("a.png"), {"x": batch[1], "y": batch[1], "z": batch[1].transpose(1, 2)})


def test_manifest_says_how_it_was_made(tmp_path: Path) -> None:
    with Store.create(tmp_path, SETTINGS) as store:
        store.write("cat.jpg", features(), {"sha256": "a", "source": "photos/cat.jpg"})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["settings"] == SETTINGS
    assert manifest["versions"][0]["torch"] == metadata.version("torch")
    assert manifest["images"]["cat.jpg"]["file"] == "cat.jpg.safetensors"
    assert manifest["images"]["cat.jpg"]["source"] == "photos/cat.jpg"


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    with Store.create(tmp_path, SETTINGS) as store:
        store.write("a.png", features(), {})
    (tmp_path / "other").touch()
    expected = stat.S_IMODE((tmp_path / "other").stat().st_mode)
    for name in ("manifest.json", "a.png.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == expected


def test_has_asks_for_the_same_source(tmp_path: Path) -> None:
    store = Store.create(tmp_path, SETTINGS)
    store.write("a.png", features(), {"sha256": "one", "prompt": ""})
    assert store.has("a.png") and store.has("a.png", sha256="one", prompt="")
    assert not store.has("a.png", sha256="two") and not store.has("a.png", unheard="x") and not store.has("b.png")


def test_files_cut_short_or_of_others_do_not_count(tmp_path: Path) -> None:
    store = Store.create(tmp_path, SETTINGS)
    for name in ("a.png", "b.png", "c.png"):
        store.write(name, features(), {})
    whole = (tmp_path / "a.png.safetensors").read_bytes()
    (tmp_path / "a.png.safetensors").write_bytes(whole[:-1])
    (tmp_path / "b.png.safetensors").write_bytes(b"")
    (tmp_path / "renamed.png.safetensors").write_bytes(whole)
    (tmp_path / ".c.png.safetensors.77.part").write_bytes(whole)
    assert list(Store.open(tmp_path)) == ["c.png"]
    assert list(Store.create(tmp_path, SETTINGS)) == ["c.png"]
    assert not list(tmp_path.rglob("*.part"))


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    with Store.create(tmp_path, SETTINGS) as store:
        store.write("a.png", features(), {})
    other = {**SETTINGS, "t": [100], "seed": 3, "activations": {"mid-res-out": {"channels": 4}}}
    with pytest.raises(StoreError) as caught:
        Store.create(tmp_path, other)
    message = str(caught.value)
    assert "t: [50] there, [100] asked for" in message and "seed: none there, 3 asked for" in message
    assert "only there unet-out" in message and "--overwrite" in message and "model" not in message
    assert list(Store.open(tmp_path)) == ["a.png"]


def test_overwrite_replaces_the_store_and_nothing_else(tmp_path: Path) -> None:
    with Store.create(tmp_path, SETTINGS) as store:
        store.write("a.png", features(), {})
        store.write("b.png", features(), {})
    (tmp_path / "mine.safetensors").write_bytes(b"not yours")
    store = Store.create(tmp_path, {**SETTINGS, "t": [100]}, overwrite=True)
    assert len(store) == 0 and not store.has("a.png")
    store.write("a.png", features(1), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.png.safetensors", "manifest.json", "mine.safetensors",
    ]  # fmt: skip
    assert list(store) == list(Store.open(tmp_path)) == ["a.png"] and Store.open(tmp_path).settings["t"] == [100]
    assert_same(Store.open(tmp_path).read("a.png"), features(1))
    with Store.create(tmp_path, store.settings, overwrite=True) as same:
        assert len(same) == 0
        same.write("c.png", features(2), {})
    assert list(Store.open(tmp_path)) == ["c.png"]


@pytest.mark.parametrize("settings", [SETTINGS, {**SETTINGS, "t": [100]}])
def test_what_is_overwritten_stays_until_something_new_is_there(tmp_path: Path, settings: dict[str, object]) -> None:
    with Store.create(tmp_path, SETTINGS) as store:
        store.write("a.png", features(), {})
    before = (tmp_path / "manifest.json").read_bytes()
    with Store.create(tmp_path, settings, overwrite=True):
        pass
    with pytest.raises(RuntimeError), Store.create(tmp_path, settings, overwrite=True) as store:
        raise RuntimeError
    with pytest.raises(OSError, match="long"), Store.create(tmp_path, settings, overwrite=True) as store:
        store.write("n" * 250, features(1), {})
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert_same(Store.open(tmp_path).read("a.png"), features())


def test_a_store_without_features_is_of_no_settings(tmp_path: Path) -> None:
    with Store.create(tmp_path, SETTINGS):
        pass
    with Store.create(tmp_path, {**SETTINGS, "t": [100]}) as store:
        store.write("a.png", features(), {})
    assert Store.open(tmp_path).settings["t"] == [100] and list(Store.open(tmp_path)) == ["a.png"]


def test_other_weights_are_refused_in_words(tmp_path: Path) -> None:
    with Store.create(tmp_path, {**SETTINGS, "weights": "one"}) as store:
        store.write("a.png", features(), {})
    with pytest.raises(StoreError, match="weights: those of the model are not those that the features were made with"):
        Store.create(tmp_path, {**SETTINGS, "weights": "two"})
    assert list(Store.create(tmp_path, {**SETTINGS, "weights": "one"})) == ["a.png"]


def test_killed_while_overwriting_nothing_old_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.create(tmp_path, SETTINGS) as store:
        store.write("a.png", features(), {})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def killed(path: Path, missing_ok: bool = False) -> None:
            if path.name == "a.png.safetensors":
                raise KeyboardInterrupt

        patch.setattr(Path, "unlink", killed)
        Store.create(tmp_path, {**SETTINGS, "t": [100]}, overwrite=True).write("b.png", features(), {})
    assert (tmp_path / "a.png.safetensors").exists()
    assert list(Store.open(tmp_path)) == list(Store.create(tmp_path, {**SETTINGS, "t": [100]})) == ["b.png"]


def test_names_up_to_what_the_file_system_takes(tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX") - len(".safetensors")
    keys = ["n" * longest, "n" * (longest - 1), "more/" + "é" * (longest // 2)]
    with Store.create(tmp_path, SETTINGS) as store:
        for seed, key in enumerate(keys):
            store.write(key, features(seed), {})
        with pytest.raises(OSError) as caught:
            store.write("n" * (longest + 1), features(), {})
    assert caught.value.errno == errno.ENAMETOOLONG
    store = Store.open(tmp_path)
    assert set(store) == set(keys) and not list(tmp_path.rglob("*.part"))
    for seed, key in enumerate(keys):
        assert_same(store.read(key), features(seed))


def test_partial_files_of_long_names_are_cleaned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(tmp_path, SETTINGS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # as if killed: nothing is tidied

        def killed(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("diffusion_features.store._publish", killed)
        patch.setattr("diffusion_features.store.shutil.rmtree", killed)
        store.write("n" * 240, features(), {})
    assert len(list(tmp_path.glob(".*.part"))) == 1
    Store.create(tmp_path, SETTINGS)
    assert not list(tmp_path.glob(".*.part"))


def test_a_stranger_s_manifest_is_left_alone(tmp_path: Path) -> None:
    for text in ("{}", "[]", "not json", '{"format": "diffusion-features store 99"}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(StoreError, match="not the manifest of a feature store"):
            Store.create(tmp_path, SETTINGS, overwrite=True)
        assert (tmp_path / "manifest.json").read_text() == text


def test_errors_are_plain(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no feature store"):
        Store.open(tmp_path)
    assert not is_store(tmp_path)
    store = Store.create(tmp_path, SETTINGS)
    assert is_store(tmp_path)
    for key in ("../a.png", "/a.png", "", "a/../../b", "a//b"):
        with pytest.raises(ValueError, match="inside the store"):
            store.write(key, features(), {})
    with pytest.raises(KeyError, match=r"no features of a\.png"):
        store.read("a.png")
    store.write("a.png", features(), {})
    with pytest.raises(KeyError, match="no activation nope"):
        store.read("a.png", ids=["nope"])
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        Store.create(tmp_path / "file", SETTINGS)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(tmp_path, SETTINGS)
    store.write("a.png", features(0), {})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", full)
        store.write("a.png", features(1), {})
    assert_same(Store.open(tmp_path).read("a.png"), features(0))
    assert not list(tmp_path.rglob("*.part"))


def test_interrupted_right_after_a_file_got_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def named_and_interrupted(partial: Path, path: Path) -> None:
        partial.replace(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Store.create(tmp_path, SETTINGS) as store, monkeypatch.context() as patch:
        patch.setattr("diffusion_features.store._publish", named_and_interrupted)
        store.write("a.png", features(), {"sha256": "a"})
    assert [*json.loads((tmp_path / "manifest.json").read_text())["images"]] == [*Store.open(tmp_path)] == ["a.png"]


def test_killed_at_random_moments_only_whole_files_count(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys, torch
        from diffusion_features.store import Store
        store = Store.create(sys.argv[1], {"t": 1})
        print("ready", flush=True)
        for i in range(10**6):
            store.write(f"{i % 7}.png", {"x": torch.full((300_000,), float(i))}, {"i": i})
        """
    )
    for delay in (0.02, 0.11, 0.23):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        store = Store.open(tmp_path)
        assert len(list(tmp_path.glob("[0-9]*.safetensors"))) == len(store)
        for key in store:
            assert (store.read(key)["x"] == store.record(key)["i"]).all()
    assert len(Store.open(tmp_path)) > 0
