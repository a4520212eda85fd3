"""Image files of every kind against pixels known beforehand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_features.images import (
    ImageError,
    as_tensor,
    decode_image,
    find_images,
    fit_size,
    image_keys,
    image_size,
    read_image,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """Top left, top right, bottom left, bottom right."""
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(place) for place in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


def four_colours(width: int = 12, height: int = 8) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = RED
    pixels[: height // 2, width // 2 :] = GREEN
    pixels[height // 2 :, : width // 2] = BLUE
    pixels[height // 2 :, width // 2 :] = WHITE
    return Image.fromarray(pixels)


def assert_reads_as(path: Path, expected: np.ndarray, tolerance: int = 0) -> None:
    image = read_image(path)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - expected.astype(int)).max() <= tolerance


# The inverse of what each EXIF orientation asks a viewer to do, as numpy operations written from the EXIF table:
# "row 0 is at the visual ..., column 0 is at the visual ...".
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = np.asarray(four_colours(48, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo{suffix}"
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    options = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}.get(suffix, {})
    stored.save(path, exif=exif, **options)
    assert_reads_as(path, upright, tolerance=6 if suffix == ".jpg" else 0)
    if suffix != ".tif" or orientation < 5:
        assert image_size(path.read_bytes(), path) == upright.shape[:2]


def test_alpha_lies_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[..., 3] = [[0, 51, 255]] * 2
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = np.array([[WHITE, (244, 204, 204), (200, 0, 0)]] * 2)
    assert_reads_as(tmp_path / "a.png", expected, tolerance=1)


def test_grey_with_alpha(tmp_path: Path) -> None:
    Image.merge("LA", [Image.new("L", (2, 2), 100), Image.new("L", (2, 2), 51)]).save(tmp_path / "la.png")
    assert_reads_as(tmp_path / "la.png", np.full((2, 2, 3), 224), tolerance=1)


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=0)
    image.save(tmp_path / "clear.gif", transparency=0)
    assert_reads_as(tmp_path / "plain.png", np.array([[RED, BLUE]]))
    assert_reads_as(tmp_path / "clear.png", np.array([[WHITE, BLUE]]))
    assert_reads_as(tmp_path / "clear.gif", np.array([[WHITE, BLUE]]))


def test_rgb_and_grey_with_a_transparent_colour(tmp_path: Path) -> None:
    Image.fromarray(np.array([[RED, BLUE]], np.uint8)).save(tmp_path / "rgb.png", transparency=RED)
    Image.fromarray(np.array([[7, 9]], np.uint8)).save(tmp_path / "grey.png", transparency=7)
    assert_reads_as(tmp_path / "rgb.png", np.array([[WHITE, BLUE]]))
    assert_reads_as(tmp_path / "grey.png", np.array([[WHITE, (9, 9, 9)]]))


def test_grey_and_one_bit(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    assert_reads_as(tmp_path / "grey.png", np.repeat(ramp[..., None], 3, 2))
    Image.fromarray(ramp > 100).save(tmp_path / "bits.png")
    assert_reads_as(tmp_path / "bits.png", np.repeat((ramp > 100)[..., None] * 255, 3, 2))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bit_gradient(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / f"deep{suffix}")
    expected = np.rint(ramp / 257.0).astype(np.uint8)
    assert_reads_as(tmp_path / f"deep{suffix}", np.repeat(expected[..., None], 3, 2))


def test_dark_sixteen_bit_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / "dark.png")
    assert_reads_as(tmp_path / "dark.png", np.full((4, 4, 3), 1))


def test_sixteen_bit_file_turned_by_exif(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 6).astype(np.uint16).reshape(2, 3)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(ramp).save(tmp_path / "deep.png", exif=exif)
    assert_reads_as(tmp_path / "deep.png", np.repeat(np.rint(ramp[::-1, ::-1] / 257)[..., None], 3, 2))


def test_float_image(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "float.tif")
    assert_reads_as(tmp_path / "float.tif", np.array([[(0, 0, 0), (128, 128, 128), WHITE]]))


def test_deep_numbers_without_an_agreed_white_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(ImageError, match=r"wide\.tif .*0 to 65535.*70000"):
        read_image(tmp_path / "wide.tif")


def test_cmyk_jpeg(tmp_path: Path) -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    cmyk.save(tmp_path / "print.jpg", quality=100)
    assert_reads_as(tmp_path / "print.jpg", np.full((16, 16, 3), RED), tolerance=4)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(tmp_path / f"film{suffix}", save_all=True, append_images=frames[1:], **options)
    assert_reads_as(tmp_path / f"film{suffix}", np.full((8, 8, 3), RED))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".gif", ".tif", ".bmp"])
def test_files_cut_at_any_place_are_errors_with_their_path(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    whole = tmp_path / f"whole{suffix}"
    Image.fromarray(noise).save(whole)
    data = whole.read_bytes()
    for length in (0, 1, 5, 20, 60, len(data) // 3, len(data) // 2, int(len(data) * 0.9)):
        with pytest.raises(ImageError, match=r"cut\.") as caught:
            decode_image(data[:length], f"cut{suffix}")
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_flipped_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for suffix in (".png", ".jpg", ".gif", ".tif"):
        path = tmp_path / f"a{suffix}"
        four_colours(32, 32).save(path)
        data = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(60):
            broken = data.copy()
            broken[rng.integers(0, len(data), 6)] = rng.integers(0, 256, 6)
            try:
                assert decode_image(broken.tobytes(), "broken").mode == "RGB"
            except ImageError as error:
                assert "broken" in str(error)


def test_what_is_no_image(tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("dear diary")
    with pytest.raises(ImageError, match=r"notes\.png is not an image"):
        read_image(text)
    with pytest.raises(ImageError, match=r"none\.png cannot be read: no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="is a directory"):
        read_image(tmp_path)
    heic = tmp_path / "phone.heic"
    heic.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64)
    with pytest.raises(ImageError, match=r"phone\.heic is a HEIC image.*JPEG or PNG"):
        read_image(heic)


def test_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (4000, 3000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000_000)
    with pytest.raises(ImageError, match=r"bomb\.png claims more than 10 million pixels"):
        read_image(tmp_path / "bomb.png")


def test_fit_size() -> None:
    assert fit_size(64, 64, 8) == (64, 64)
    assert fit_size(67, 69, 8) == (64, 72)
    assert fit_size(68, 60, 8) == (72, 64)
    assert fit_size(1, 3, 64) == (64, 64)


def test_as_tensor_of_pixels() -> None:
    image = four_colours(16, 8)
    batch = as_tensor([image, np.asarray(image)], multiple=8)
    assert batch.dtype == torch.float32 and batch.shape == (2, 3, 8, 16)
    assert torch.equal(batch[0], batch[1])
    assert batch[0, :, 0, 0].tolist() == [1, -1, -1] and batch[0, :, -1, -1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F", "RGBa"])
def test_as_tensor_takes_every_mode(mode: str) -> None:
    assert as_tensor(Image.new(mode, (8, 8))).shape == (1, 3, 8, 8)


def test_as_tensor_resizes_with_antialiasing() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    from_pil = as_tensor(Image.fromarray(stripes), size=16)
    from_tensor = as_tensor(as_tensor(stripes), size=(16, 16))
    for batch in (from_pil, from_tensor):
        assert batch.shape == (1, 3, 16, 16)
        assert batch[..., 2:-2].abs().max() < 0.1  # one-pixel stripes average to grey; without, they stay -1 or 1


def test_as_tensor_size_is_height_then_width(tmp_path: Path) -> None:
    four_colours(40, 30).save(tmp_path / "a.png")
    assert as_tensor(tmp_path / "a.png", size=(24, 16), multiple=8).shape == (1, 3, 24, 16)
    assert as_tensor([tmp_path / "a.png", str(tmp_path / "a.png")], size=24).shape == (2, 3, 24, 24)


def test_as_tensor_of_tensors() -> None:
    legal = torch.rand(2, 3, 8, 8)  # [0, 1] lies inside [-1, 1]
    assert torch.equal(as_tensor(legal), legal)
    assert as_tensor(legal[0]).shape == (1, 3, 8, 8) and as_tensor([legal[0], legal[1]]).shape == (2, 3, 8, 8)
    assert as_tensor(legal.half()).dtype == torch.float32
    assert as_tensor(torch.full((3, 8, 8), 1.0005)).max() == 1


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.rand(1, 3, 8, 8) * 255, "255"),
        (torch.rand(1, 3, 8, 8) * 4 - 2, r"\[-1, 1\].*normalised"),
        (torch.full((3, 8, 8), float("nan")), "not finite"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "127.5"),
        (torch.zeros(8, 8, 3), r"\(B, 3, H, W\)"),
        (torch.zeros(1, 4, 8, 8), r"\(B, 3, H, W\)"),
        (np.zeros((8, 8, 3), np.float32), "uint8"),
        (np.zeros((3, 8, 8), np.uint8), "uint8"),
        ([], "no images"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 16))], r"8x8, 16x8.*size="),
    ],
)
def test_as_tensor_refuses(images: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        as_tensor(images)  # type: ignore[arg-type]


def test_as_tensor_names_the_nearest_size() -> None:
    with pytest.raises(ValueError, match=r"30x45 .*multiples of 8.*32x48"):
        as_tensor(Image.new("RGB", (45, 30)), multiple=8)
    with pytest.raises(ValueError, match=r"size is 100x100.*104x104"):
        as_tensor(Image.new("RGB", (64, 64)), size=100, multiple=8)
    for size in (0, (8,), (8, 8, 8), (-8, 8), "big"):
        with pytest.raises(ValueError, match="size must be"):
            as_tensor(Image.new("RGB", (64, 64)), size=size)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not int"):
        as_tensor([3])  # type: ignore[list-item]


def test_find_images(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "sub/c.webp", ".hidden.png", ".cache/d.png", "notes.txt", "odd.dat"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    names = [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path])]
    assert names == ["a.png", "b.JPG", "sub/c.webp"]
    assert find_images([tmp_path / "odd.dat"]) == [tmp_path / "odd.dat"]
    assert len(find_images([tmp_path, tmp_path / "a.png", tmp_path / "sub"])) == 3
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*missing"):
        find_images([tmp_path / "missing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images found in .*empty"):
        find_images([tmp_path / "empty"])


def test_keys_of_two_folders_do_not_collide(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "cat.png").touch()
    keys = image_keys([tmp_path / "one", tmp_path / "two"])
    first, second = keys
    assert first == "cat.png" and second.startswith("cat~") and second.endswith(".png")
    assert image_keys([str(tmp_path / "one")]) == {"cat.png": tmp_path / "one" / "cat.png"}
