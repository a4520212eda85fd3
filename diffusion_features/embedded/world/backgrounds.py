"""The two backgrounds of a scene: their horizon, colours and textures."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from .classes import RGB
from .pen import lighter, mix

Random = np.random.Generator
#: What may lie above and below the horizon, and how often.
PAIRS: Final[tuple[tuple[str, str], ...]] = (
    ("sky", "grass"), ("sky", "sea"), ("sky", "sand"), ("sky", "snow"), ("sky", "road"), ("sea", "sand"),
    ("sea", "grass"), ("grass", "road"), ("snow", "road"), ("grass", "sand"), ("sand", "sea"), ("snow", "sea"),
)  # fmt: skip
#: Adjective, colour at the far end and colour at the near end of each look.
LOOKS: Final[dict[str, tuple[tuple[str, RGB, RGB], ...]]] = {
    "sky": (
        ("blue", (70, 140, 222), (186, 222, 246)),
        ("cloudy", (120, 160, 206), (214, 226, 236)),
        ("sunset", (116, 92, 168), (255, 186, 122)),
        ("night", (14, 20, 56), (58, 68, 126)),
    ),
    "grass": (("green", (150, 194, 98), (74, 142, 58)), ("dry", (206, 190, 112), (150, 138, 66))),
    "sea": (("blue", (96, 172, 206), (22, 86, 150)), ("calm", (128, 204, 204), (34, 132, 150))),
    "sand": (("yellow", (244, 222, 164), (222, 186, 118)),),
    "snow": (("white", (248, 251, 255), (206, 222, 242)),),
    "road": (("gray", (142, 142, 148), (84, 86, 96)),),
}


def horizon(rng: Random, upper: str, lower: str, width: int, height: int) -> NDArray[np.float32]:
    """Return the row of the horizon for every column: float32 [width], pixels from the top."""
    level = rng.uniform(0.36, 0.6) * height
    x = np.linspace(0, 1, width, dtype=np.float32)
    bend = 0.0 if upper == "sky" and lower in ("sea", "road") else rng.uniform(0.01, 0.07) * height
    wave = np.sin(2 * np.pi * (x * rng.uniform(0.4, 1.4) + rng.random()))
    wave = wave + 0.4 * np.sin(2 * np.pi * (x * rng.uniform(1.5, 3.0) + rng.random()))
    return np.asarray(level + bend * wave, dtype=np.float32)


def _gradient(top: RGB, bottom: RGB, width: int, height: int, rng: Random, rough: float) -> NDArray[np.float32]:
    """Return a vertical gradient with soft patches of brightness: float32 [3, height, width], 0..255."""
    t = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    rows = np.asarray(top, np.float32) * (1 - t) + np.asarray(bottom, np.float32) * t
    patches = Image.fromarray(rng.random((7, 7), dtype=np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(rows.T[:, :, None] * (1 + rough * (np.asarray(patches) - 0.5)), np.float32)


def _clouds(image: Image.Image, rng: Random, count: int, colour: RGB) -> None:
    """Paint ``count`` soft clouds on ``image`` in place."""
    width, height = image.size
    mask = Image.new("L", (width // 2, height // 2), 0)
    draw = ImageDraw.Draw(mask)
    for _ in range(count):
        x, y, r = rng.random() * width / 2, rng.uniform(0.05, 0.75) * height / 2, rng.uniform(0.03, 0.06) * width / 2
        for dx, dy, k in ((-1.9, 0.3, 0.8), (-0.9, -0.2, 1.1), (0.3, -0.5, 1.35), (1.3, 0.0, 1.0), (2.1, 0.35, 0.7)):
            draw.ellipse((x + (dx - k) * r, y + (dy - k * 0.8) * r, x + (dx + k) * r, y + (dy + k * 0.7) * r), fill=215)
    mask = mask.filter(ImageFilter.BoxBlur(max(1.0, width * 0.006))).resize((width, height))
    image.paste(colour, (0, 0), mask)


def _disc(image: Image.Image, x: float, y: float, r: float, colour: RGB, glow: int) -> None:
    """Paint a sun or a moon with a halo on ``image`` in place."""
    span = int(4 * r) + 1
    axis = np.linspace(-1, 1, 2 * span, dtype=np.float32)
    far = np.hypot(axis[:, None], axis[None, :])
    halo = np.clip(1 - far, 0, 1) ** 2 * glow
    alpha = Image.fromarray(np.where(far * span < r, 255, halo).astype(np.uint8))
    image.paste(colour, (int(x) - span, int(y) - span), alpha)


def _sky(image: Image.Image, rng: Random, look: str) -> None:
    width, height = image.size
    x, y, r = rng.uniform(0.1, 0.9) * width, rng.uniform(0.15, 0.5) * height, rng.uniform(0.04, 0.07) * width
    draw = ImageDraw.Draw(image)
    if look == "night":
        for u, v in rng.random((40, 2)).tolist():
            dot = width / 300 * (1 + u)
            draw.ellipse((u * width, v * height, u * width + dot, v * height + dot), fill=(250, 248, 220))
        _disc(image, x, y, r, (248, 240, 208), 70)
    elif look == "sunset":
        _disc(image, x, height * 0.8, r * 1.3, (255, 232, 170), 150)
        _clouds(image, rng, 2, (255, 206, 176))
    elif look == "cloudy":
        _clouds(image, rng, 6, (250, 251, 253))
    else:
        if rng.random() < 0.6:
            _disc(image, x, y, r, (255, 240, 160), 130)
        _clouds(image, rng, int(rng.integers(0, 3)), (252, 253, 255))


def _strokes(image: Image.Image, rng: Random, count: int, colours: tuple[RGB, ...], dx: float, dy: float) -> None:
    """Paint short strokes of size (dx, dy), a fraction of the width, that grow towards the bottom."""
    width, height = image.size
    draw = ImageDraw.Draw(image)
    for i, (u, v, w) in enumerate(rng.random((count, 3)).tolist()):
        near = 0.35 + 0.65 * v
        x, y, sway = u * width, v * height, (w - 0.5) * 0.012 * width
        end = (x + dx * width * near + sway, y + dy * width * near)
        draw.line((x, y, *end), fill=colours[i % len(colours)], width=max(1, round(width / 170 * near)))


def _lanes(image: Image.Image, rng: Random) -> None:
    """Paint pale verges and a dashed middle line that narrow towards the horizon."""
    width, height = image.size
    draw = ImageDraw.Draw(image)
    far = rng.uniform(0.3, 0.7) * width
    near = rng.uniform(0.25, 0.75) * width
    for side in (-1, 1):
        x0, x1 = far + side * 0.2 * width, near + side * 0.75 * width
        draw.polygon(
            (x0, 0, x0 + side * 0.01 * width, 0, x1 + side * 0.05 * width, height, x1, height), fill=(206, 204, 196)
        )
    for k in range(5):
        a, b = (k / 5) ** 1.6, ((k + 0.55) / 5) ** 1.6
        xa, xb, wa, wb = far + (near - far) * a, far + (near - far) * b, (3 + 14 * a) / 512, (3 + 14 * b) / 512
        draw.polygon((xa - wa * width, a * height, xa + wa * width, a * height,
                      xb + wb * width, b * height, xb - wb * width, b * height), fill=(238, 226, 170))  # fmt: skip


def paint(name: str, look: str, rng: Random, width: int, height: int) -> Image.Image:
    """Return background ``name`` in one of its ``LOOKS`` filling width x height pixels."""
    far, near = next((a, b) for word, a, b in LOOKS[name] if word == look)
    # Smooth colour and grain are made at half the size: they are downsampled again, and it is four times as fast.
    half = ((width + 1) // 2, (height + 1) // 2)
    field = _gradient(far, near, *half, rng, 0.05 if name == "sky" else 0.2)
    if name in ("sand", "road", "snow"):
        field += rng.standard_normal((half[1], half[0]), dtype=np.float32) * (5 if name == "snow" else 9)
    channels = [Image.fromarray(plane) for plane in np.clip(field, 0, 255).astype(np.uint8)]
    image = Image.merge("RGB", channels).resize((width, height), Image.Resampling.BILINEAR)
    if name == "sky":
        _sky(image, rng, look)
    elif name == "grass":
        _strokes(image, rng, 110, (lighter(near, 0.22), mix(near, (20, 60, 20), 0.35)), 0.0, -0.035)
    elif name == "sea":
        _strokes(image, rng, 46, (lighter(far, 0.5), lighter(near, 0.25), mix(near, (0, 30, 70), 0.3)), 0.07, 0.0)
    elif name == "sand":
        _strokes(image, rng, 36, ((206, 170, 104), (250, 234, 190)), 0.045, 0.004)
    elif name == "snow":
        _strokes(image, rng, 30, ((255, 255, 255), (190, 208, 234)), 0.05, 0.004)
    else:
        _lanes(image, rng)
    return image
