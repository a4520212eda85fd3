"""Pictures and texts from strangers: everything is checked before it is used."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from diffusion_features.images import ImageError, decode_image, image_size

from .settings import Limits

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""No format whose decoder starts another program, as PostScript does."""
NAME = "The picture"
GONE = "The picture is not on the server, or no longer: choose it again."


def picture(given: object, folder: Path, limits: Limits) -> Image.Image:
    """An uploaded picture, upright, RGB, its longer side at most ``limits.side`` pixels.

    Args:
        given: what the browser says about the file: a mapping with its ``path`` on the server.
        folder: where uploads are; a path that leads elsewhere is refused.

    Raises:
        ImageError: there is none, or it is refused; the message is a sentence without any path.
    """
    data = _read(given, folder, limits)
    _check_header(data, limits)
    image = decode_image(data, NAME)
    image.thumbnail((limits.side, limits.side), Image.Resampling.LANCZOS)
    return image


def full_size(given: object, folder: Path, limits: Limits) -> tuple[int, int]:
    """Width and height of an uploaded picture before it was reduced, as ``picture`` reads it."""
    height, width = image_size(_read(given, folder, limits), NAME)
    return width, height


def _read(given: object, folder: Path, limits: Limits) -> bytes:
    if not given:
        raise ImageError("Choose a picture first.")
    name = given.get("path") if isinstance(given, dict) else None
    try:
        path = Path(name if isinstance(name, str) else "").resolve()
        if not path.is_relative_to(folder.resolve()):
            raise ImageError(GONE)
        too_big = path.stat().st_size > limits.upload_bytes
        data = b"" if too_big else path.read_bytes()
    except ImageError:
        raise
    except (OSError, ValueError):  # ValueError: what is no path, such as one with a zero byte
        raise ImageError(GONE) from None
    if too_big:
        raise ImageError(f"The picture's file is larger than {limits.upload_bytes // 2**20} MB.")
    return data


def _check_header(data: bytes, limits: Limits) -> None:
    """Refuse by what the file declares, before its pixels are decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            width, height = opened.size
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise ImageError(
            f"{NAME} is no image of a kind that can be read here, or is too large: send {_listed(FORMATS)}."
        ) from None
    except Exception:  # on damaged data the decoders raise nearly anything
        raise ImageError(f"{NAME} is damaged at its beginning.") from None
    if width * height > limits.pixels:
        raise ImageError(f"{NAME} has {width}x{height} pixels; at most {limits.pixels // 10**6} million are read.")
    if max(width, height) > limits.ratio * min(width, height):
        raise ImageError(f"{NAME} is {width}x{height}: one side may be at most {limits.ratio:g} times the other.")


def names(classes: object, background: object, limits: Limits) -> tuple[list[str], list[str]]:
    """Class names and background words as lists of texts without surplus spaces.

    Raises:
        ValueError: they are no lists of texts, there are too many, or one is too long.
    """
    found = []
    for given in (classes, background):
        words = [] if given is None else given
        if not isinstance(words, Sequence) or isinstance(words, str) or not all(isinstance(w, str) for w in words):
            raise ValueError("Classes and background are lists of words.")
        found.append([" ".join(word.split()) for word in words if word.strip()])
    every = [word for words in found for word in words]
    if not found[0]:
        raise ValueError("Name at least one class: write a word and press Enter.")
    if len(every) > limits.classes:
        raise ValueError(f"{len(every)} names are too many: at most {limits.classes} classes and background words.")
    if long := [word for word in every if len(word) > limits.name]:
        raise ValueError(f"A name has at most {limits.name} characters, not {len(long[0])}.")
    return found[0], found[1]


def text(given: object, what: str, limits: Limits) -> str:
    """A prompt or caption on one line.

    Raises:
        ValueError: it is no text, or too long.
    """
    if given is not None and not isinstance(given, str):
        raise ValueError(f"The {what} is a text.")
    line = " ".join((given or "").split())
    if len(line) > limits.text:
        raise ValueError(f"The {what} has {len(line)} characters; at most {limits.text} are read.")
    return line


def whole(given: object, what: str, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``.

    Raises:
        ValueError: it is none.
    """
    number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not number or given != given or not low <= given <= high or given != int(given):  # type: ignore[operator,call-overload]
        raise ValueError(f"The {what} is a whole number from {low} to {high}.")
    return int(given)  # type: ignore[call-overload]


def whole_or_none(given: object, what: str, low: int, high: int) -> int | None:
    """A whole number from ``low`` to ``high``, as one or as text; ``None`` for nothing.

    Raises:
        ValueError: it is something else.
    """
    if given is None or (isinstance(given, str) and not given.strip()):
        return None
    if isinstance(given, str):
        try:
            given = float(given)
        except ValueError:
            given = math.nan
    return whole(given, what, low, high)


def share(given: object, what: str) -> float:
    """A number from 0 to 1.

    Raises:
        ValueError: it is none.
    """
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given <= 1:
        raise ValueError(f"The {what} is a number from 0 to 1.")
    return float(given)


def one_of(given: object, what: str, allowed: Sequence[str]) -> str:
    """One of some words.

    Raises:
        ValueError: it is none of them.
    """
    if given not in allowed:
        raise ValueError(f"The {what} is {_listed(allowed)}.")
    return str(given)


def listed(given: object, what: str) -> list[str]:
    """A list of texts.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise ValueError(f"The {what} are a list of texts.")
    return given


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def quoted(given: str) -> str:
    """A visitor's words for Markdown, where as code they are neither tags nor links."""
    return f"`{given.replace('`', chr(39))}`"
