"""Pictures in, tensors out: reading image files as a person sees them, and bringing them to a size a model takes."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

Picture: TypeAlias = "Image.Image | np.ndarray | torch.Tensor | str | PathLike[str]"

SUFFIXES = frozenset({
    ".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo",
    ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
})  # fmt: skip
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
WHITE = (255, 255, 255, 255)
SIXTEEN_BIT = 65535
ROUNDING = 1e-3  # values a resize or a half-precision cast may leave outside [-1, 1]


class ImageError(ValueError):
    """A file that cannot be read as an image; the message is one sentence with its path."""


def read_image(path: str | PathLike[str]) -> Image.Image:
    """The picture in a file as a viewer shows it: RGB, 8 bits, upright.

    The EXIF rotation is applied, transparency is laid on white, grey, palette, CMYK and 16-bit files are converted, and
    of an animation the first frame is taken. Colour profiles are not applied.

    Raises:
        ImageError: the file is missing, is no image, is damaged, is HEIC, or is too large to be honest.
    """
    return decode_image(read_bytes(path), path)


def decode_image(data: bytes, name: str | PathLike[str]) -> Image.Image:
    """As ``read_image``, of a file's bytes; ``name`` is used in error messages only."""
    with _opened(data, name) as image:
        try:
            return to_rgb(ImageOps.exif_transpose(image))
        except ImageError as error:
            raise ImageError(f"{fspath(name)} cannot be read: {error}") from error
        except Image.DecompressionBombError as error:
            raise _too_large(name) from error
        except MemoryError:
            raise
        except Exception as error:  # on damaged data the decoders raise nearly anything: SyntaxError, struct.error...
            raise ImageError(f"{fspath(name)} is damaged or cut short ({_sentence(error)}).") from error


def image_size(data: bytes, name: str | PathLike[str]) -> tuple[int, int]:
    """Height and width in pixels of an image file's bytes, as it stands upright, without decoding its pixels.

    Raises:
        ImageError: it is no image.
    """
    with _opened(data, name) as image:
        width, height = image.size
        try:
            on_its_side = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        except Exception as error:  # see decode_image
            raise ImageError(f"{fspath(name)} has damaged EXIF data ({_sentence(error)}).") from error
    return (width, height) if on_its_side else (height, width)


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as 8-bit RGB, transparency laid on white.

    Raises:
        ImageError: its numbers have no agreed white: 32-bit integers above 65535, or floats outside [0, 1].
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits. PIL's own conversion clips at 255, which turns nearly every such picture white."""
    values = np.asarray(image, dtype=np.float64)
    white = 1.0 if image.mode == "F" else float(SIXTEEN_BIT)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > white:
        raise ImageError(
            f"a grey image of mode {image.mode} must have values from 0 to {white:g}, "
            f"but these go from {values.min():g} to {values.max():g}."
        )
    grey = np.rint(values * (255.0 / white)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def read_bytes(path: str | PathLike[str]) -> bytes:
    """A file's bytes.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{fspath(path)} cannot be read: {(error.strerror or str(error)).lower()}.") from error


def _opened(data: bytes, name: str | PathLike[str]) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS:
            what = "is a HEIC image, which is not supported: save it as JPEG or PNG"
            raise ImageError(f"{fspath(name)} {what}.") from error
        what = "is empty" if not data else "is not an image, or is damaged at its beginning"
        raise ImageError(f"{fspath(name)} {what}.") from error
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except MemoryError:
        raise
    except Exception as error:  # see decode_image
        raise ImageError(f"{fspath(name)} is damaged ({_sentence(error)}).") from error


def _too_large(name: str | PathLike[str]) -> ImageError:
    limit = 2 * cast(int, Image.MAX_IMAGE_PIXELS) // 10**6
    return ImageError(f"{fspath(name)} claims more than {limit} million pixels and is refused as a decompression bomb.")


def _sentence(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__


def fit_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """The nearest height and width in pixels that are multiples of ``multiple``, at least one each; halves go up."""

    def nearest(side: int) -> int:
        return max(1, math.floor(side / multiple + 0.5)) * multiple

    return nearest(height), nearest(width)


def as_tensor(
    images: Picture | Sequence[Picture], size: int | Sequence[int] | None = None, multiple: int = 1
) -> torch.Tensor:
    """Images as the batch a diffusion model's encoder takes.

    Args:
        images: one image or a list of them, each a PIL image of any mode, a path, a uint8 array (H, W), (H, W, 3) or
            (H, W, 4), or a float tensor (3, H, W) in [-1, 1]; or a float tensor (B, 3, H, W) in [-1, 1]. A PIL image
            is taken as its pixels lie: only a path has its EXIF rotation applied.
        size: ``(height, width)`` in pixels, or one int for a square, to resize to (aspect is not kept); ``None`` keeps
            the images as they are.
        multiple: both sides must be multiples of this many pixels.

    Returns:
        float32 (B, 3, H, W) in [-1, 1]; on the device of the tensors given, else on the CPU.

    Raises:
        ImageError: a path cannot be read.
        ValueError: the images differ in size, their sides are no multiples of ``multiple`` (the nearest size that is
            gets named), or a tensor has another shape or range.
        TypeError: something that is no image.
    """
    wanted = check_size(size, multiple) if size is not None else None
    if isinstance(images, torch.Tensor) and images.ndim == 4:
        batch = _from_tensor(images, wanted)
    else:
        single = isinstance(images, (Image.Image, np.ndarray, torch.Tensor, str, PathLike))
        batch = _stacked([_one(image, wanted) for image in (cast("list[Picture]", [images] if single else images))])
    height, width = batch.shape[-2:]
    if height % multiple or width % multiple:
        fit = fit_size(height, width, multiple)
        raise ValueError(f"{_misfit('the image', height, width, multiple)}: pass size={fit}")
    return batch


def check_size(size: int | Sequence[int], multiple: int) -> tuple[int, int]:
    """``size`` (one side of a square, or height and width, in pixels) as height and width.

    Raises:
        ValueError: it is no size, or a side is no multiple of ``multiple``; the message names the nearest size that is.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or any(not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError(f"size must be one positive whole number or (height, width), not {size!r}")
    height, width = sides
    if height % multiple or width % multiple:
        raise ValueError(_misfit("size", height, width, multiple))
    return height, width


def _misfit(what: str, height: int, width: int, multiple: int) -> str:
    fit = fit_size(height, width, multiple)
    return (
        f"{what} is {height}x{width} (height x width), but both sides must be multiples of {multiple}; "
        f"the nearest such size is {fit[0]}x{fit[1]}"
    )


def _one(image: Picture, size: tuple[int, int] | None) -> torch.Tensor:
    """One image as float32 (3, H, W) in [-1, 1]."""
    if isinstance(image, torch.Tensor):
        return _from_tensor(image[None] if image.ndim == 3 else image, size)[0]
    if isinstance(image, (str, PathLike)):
        image = read_image(image)
    elif isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise ValueError(
                f"an array must be uint8 of shape (H, W), (H, W, 3) or (H, W, 4), "
                f"not {image.dtype} of shape {image.shape}"
            )
        image = Image.fromarray(image)
    elif not isinstance(image, Image.Image):
        raise TypeError(f"an image must be a PIL image, a path, an array or a tensor, not {type(image).__name__}")
    image = to_rgb(image)
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _from_tensor(images: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    """A float tensor (B, 3, H, W), checked, resized and clamped to [-1, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"an image tensor must have shape (B, 3, H, W) or (3, H, W), not {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(
            f"an image tensor must be a float in [-1, 1], not {images.dtype}; for 8-bit pixels pass x / 127.5 - 1"
        )
    images = images.float()
    low, high = (value.item() for value in images.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("the image tensor has values that are not finite")
    if low < -1 - ROUNDING or high > 1 + ROUNDING:
        eight_bit = low >= 0 and high <= 255
        hint = "8-bit pixels in [0, 255] become that by x / 127.5 - 1" if eight_bit else "was it normalised otherwise?"
        raise ValueError(f"an image tensor must be in [-1, 1], but its values go from {low:g} to {high:g}; {hint}")
    if size is not None and tuple(images.shape[-2:]) != size:
        images = torch.nn.functional.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
    return images.clamp(-1, 1)


def _stacked(images: list[torch.Tensor]) -> torch.Tensor:
    if not images:
        raise ValueError("there are no images")
    sizes = sorted({tuple(image.shape[-2:]) for image in images})
    if len(sizes) > 1:
        shown = ", ".join(f"{height}x{width}" for height, width in sizes[:6]) + (", ..." if len(sizes) > 6 else "")
        raise ValueError(f"the images of one call differ in size ({shown}): pass size=(height, width) to resize them")
    return torch.stack(images)


def find_images(paths: Iterable[str | PathLike[str]]) -> list[Path]:
    """Image files named by files and folders; each once, folders recursively and sorted, hidden files left out.

    A file that is named itself is taken whatever its suffix; in folders only known image suffixes are.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: no image is found.
    """
    return list(image_keys(paths).values())


def image_keys(paths: Iterable[str | PathLike[str]]) -> dict[str, Path]:
    """As ``find_images``, by a name for each: its path inside the folder given, with ``/``; or its file name.

    Where two inputs have a file of the same name, the later one gets the beginning of its path's digest as well.
    """
    keys: dict[str, Path] = {}
    seen: set[Path] = set()
    inputs = [Path(path) for path in paths]
    for given in inputs:
        for path in _files(given):
            if (resolved := path.resolve()) in seen:
                continue
            seen.add(resolved)
            key = path.relative_to(given).as_posix() if path != given else path.name
            keys[key if key not in keys else _distinct(key, resolved)] = path
    if not keys:
        raise ValueError(f"no images found in {', '.join(map(str, inputs))}")
    return keys


def _files(given: Path) -> list[Path]:
    if given.is_file():
        return [given]
    if not given.is_dir():
        raise FileNotFoundError(f"there is no file or folder {given}")
    return sorted(
        path
        for path in given.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(given).parts)
    )


def _distinct(key: str, resolved: Path) -> str:
    path = Path(key)
    digest = hashlib.sha256(resolved.as_posix().encode()).hexdigest()[:8]
    return path.with_name(f"{path.stem}~{digest}{path.suffix}").as_posix()
