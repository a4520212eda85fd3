"""Files that should not be uploaded."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and is cut short in its pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = struct.pack(">I", 8) + b"IDAT" + bytes(8)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


WHOLE = encoded(Image.new("RGB", (30, 20), "red"), "PNG")

BROKEN = {
    "empty": b"",
    "text": b"no picture at all",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
    "postscript": encoded(Image.new("RGB", (8, 8)), "EPS"),
    "targa": encoded(Image.new("RGB", (8, 8)), "TGA"),
    "bomb": png_header(30000, 30000),
    "far beyond": png_header(2**31 - 1, 2**31 - 1),
    "long": encoded(Image.new("RGB", (600, 2)), "PNG"),
    "cut short": WHOLE[: len(WHOLE) // 2 + 12],
    "header alone": png_header(10, 10),
    "damaged": WHOLE[:40] + bytes(len(WHOLE) - 60) + WHOLE[-20:],
}
