"""What strangers send is checked before it is used, and said in sentences that name no path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_features import ImageError
from segmentors.demo import uploads
from segmentors.demo.files import Files
from segmentors.demo.pictures import masks
from segmentors.demo.segmenting import Answer
from segmentors.demo.settings import PUBLIC, Limits, Settings
from tests.app.hostile import BROKEN, WHOLE, encoded, png_header

LIMITS = Limits()


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "upload.png"
    file.write_bytes(BROKEN[name])
    with pytest.raises(ImageError) as caught:
        uploads.picture({"path": str(file)}, tmp_path, LIMITS)
    assert str(tmp_path) not in str(caught.value) and str(caught.value).startswith("The picture")


def test_a_bomb_is_never_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "upload.png"
    file.write_bytes(png_header(8000, 7000))
    monkeypatch.setattr(uploads, "decode_image", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match="8000x7000 pixels; at most 50 million"):
        uploads.picture({"path": str(file)}, tmp_path, LIMITS)


def test_missing_and_large_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="Choose a picture"):
        uploads.picture(None, tmp_path, LIMITS)
    (tmp_path / "large.png").write_bytes(WHOLE + bytes(2**20))
    with pytest.raises(ImageError, match="larger than 1 MB"):
        uploads.picture({"path": str(tmp_path / "large.png")}, tmp_path, Limits(upload_bytes=2**20))


@pytest.mark.parametrize(
    "path", ["gone.png", "../outside.png", "/etc/passwd", "link.png", "", ".", "\0", "x" * 9999, 3, None]
)
def test_only_what_was_uploaded_is_read(path: object, tmp_path: Path) -> None:
    folder = tmp_path / "uploads"
    folder.mkdir()
    (tmp_path / "outside.png").write_bytes(WHOLE)
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    given = {"path": str(folder / path) if isinstance(path, str) else path}
    for one in (given, str(folder), [3]):
        with pytest.raises(ImageError, match="not on the server, or no longer"):
            uploads.picture(one, folder, LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_pictures_are_read_and_reduced(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "upload"
    file.write_bytes(encoded(Image.new("RGB", (300, 150), (200, 30, 30)), kind))
    small = uploads.picture({"path": str(file)}, tmp_path, Limits(side=100))
    assert small.mode == "RGB" and small.size == (100, 50)
    assert (
        uploads.picture({"path": str(file)}, tmp_path, LIMITS).size
        == (300, 150)
        == uploads.full_size({"path": str(file)}, tmp_path, LIMITS)
    )
    assert np.allclose(small.getpixel((50, 25)), (200, 30, 30), atol=4)


def test_rotated_photographs_stand_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "upload.jpg"
    file.write_bytes(encoded(Image.new("RGB", (60, 20)), "JPEG", exif=exif))
    assert (
        uploads.picture({"path": str(file)}, tmp_path, LIMITS).size
        == (20, 60)
        == uploads.full_size({"path": str(file)}, tmp_path, LIMITS)
    )


@pytest.mark.parametrize(
    ("classes", "background", "message"),
    [
        ([], [], "at least one class"),
        ([" "], [], "at least one class"),
        (None, ["sky"], "at least one class"),
        ("cat", [], "lists of words"),
        (["cat", 3], [], "lists of words"),
        ({"cat": 1}, [], "lists of words"),
        (["cat"], [["sky"]], "lists of words"),
        ([f"c{i}" for i in range(20)], [f"b{i}" for i in range(20)], "40 names are too many: at most 32"),
        (["x" * 61], [], "at most 60 characters, not 61"),
    ],
)
def test_bad_names(classes: object, background: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uploads.names(classes, background, LIMITS)


def test_good_names_and_texts() -> None:
    assert uploads.names(["  red   cat ", ""], ["sky"], LIMITS) == (["red cat"], ["sky"])
    assert uploads.text(None, "caption", LIMITS) == "" and uploads.text(" a\n b ", "caption", LIMITS) == "a b"
    with pytest.raises(ValueError, match="caption has 601 characters; at most 600"):
        uploads.text("x" * 601, "caption", LIMITS)
    with pytest.raises(ValueError, match="prompt is a text"):
        uploads.text(["x"], "prompt", LIMITS)


@pytest.mark.parametrize("given", [-1, 10, 2.5, float("nan"), float("inf"), "3", None, True, [1]])
def test_numbers(given: object) -> None:
    with pytest.raises(ValueError, match="seed is a whole number from 0 to 9"):
        uploads.whole(given, "seed", 0, 9)
    assert uploads.whole(9.0, "seed", 0, 9) == 9


@pytest.mark.parametrize(
    ("given", "number"), [(None, None), ("", None), ("  ", None), ("7", 7), (" 7.0 ", 7), (0, 0), ("0", 0)]
)
def test_a_field_that_may_be_empty(given: object, number: int | None) -> None:
    assert uploads.whole_or_none(given, "timestep", 0, 9) == number


@pytest.mark.parametrize("given", ["seven", "7.5", "10", "-1", "nan", "inf", "1e400", "7 8", True, [7]])
def test_a_field_that_may_be_empty_takes_nothing_else(given: object) -> None:
    with pytest.raises(ValueError, match="timestep is a whole number from 0 to 9"):
        uploads.whole_or_none(given, "timestep", 0, 9)


def test_public_pages_have_tighter_limits() -> None:
    assert Settings(public=True).allowed == PUBLIC and Settings().allowed == LIMITS
    assert PUBLIC.pixels < LIMITS.pixels and PUBLIC.side < LIMITS.side and PUBLIC.classes < LIMITS.classes
    assert Settings(public=True, limits=LIMITS).allowed == LIMITS


def test_files_to_download_stay_within_their_budget(tmp_path: Path) -> None:
    labels = torch.zeros(16, 16, dtype=torch.int64)
    scores = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0))
    found = Answer(labels, labels, scores, ("cat", "dog"), ("cat, dog",), {}, {}, False)
    picture, colours = Image.new("RGB", (16, 16)), [(255, 0, 0), (0, 255, 0)]
    one = sum(Path(file).stat().st_size for file in Files(tmp_path / "one", 2**30).results(picture, found, colours))
    write = Files(tmp_path / "many", 3 * one)
    for _ in range(8):
        files = write.results(picture, found, colours)
        there = [path for path in (tmp_path / "many").rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in there) <= 3 * one and {*map(Path, files)} <= {*there}
    assert np.array_equal(np.load(files[2]), scores.numpy()) and Image.open(files[0]).mode == "P"


def test_files_that_were_removed_otherwise_are_forgotten(tmp_path: Path) -> None:
    """What age has removed does not count, so the budget is for what is there."""
    picture = Image.new("RGB", (16, 16))
    files = Files(tmp_path, 0)
    assert Path(files.picture(picture)).exists(), "the newest stays, whatever the budget"
    size = Path(files.picture(picture)).stat().st_size
    files = Files(tmp_path / "new", 2 * size)
    first = Path(files.picture(picture))
    first.unlink()
    second, third = (Path(files.picture(picture)) for _ in range(2))
    assert second.exists() and third.exists()
    fourth = Path(files.picture(picture))
    assert not second.exists() and third.exists() and fourth.exists()


def test_masks_show_their_class_alone() -> None:
    labels = torch.tensor([[0, 2], [2, 0]])
    colours = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    found = masks(labels, ["sky", "cat", "dog"], colours, 0.4)
    assert [name for _, name in found] == ["sky", "dog"]
    for (mask, _), i in zip(found, (0, 2), strict=True):
        shown = np.array(mask.convert("RGBA"))
        there = (labels == i).numpy()
        assert (shown[there] == [*colours[i], 102]).all() and (shown[~there][:, 3] == 0).all()
