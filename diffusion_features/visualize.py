"""Pictures of features: principal components as colours, and sheets that show many activations beside their image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

PAPER, INK, FAINT, EMPTY = "#ffffff", "#16181d", "#6b7280", (128, 128, 128)
COLD, WARM, HOT = "#10002b", "#d1495b", "#fff7c2"
MARGIN, GAP, TITLE, LINE = 24, 16, 15, 13
SHRUNK = 10  # the smallest title before it is cut
KEYS_SHOWN = 16
FLAT = 1e-6  # a component below this share of the first one's spread is rounding, not a feature


def pca_image(feature: torch.Tensor) -> Image.Image:
    """A feature's first three principal components over its cells, as red, green and blue.

    Each component is stretched from its 1st to its 99th percentile. Its sign is such that the channel it weighs most
    counts positively, so the same feature always gives the same picture. A component that does not vary is mid-grey.

    Args:
        feature: (C, h, w) of any float dtype.

    Returns:
        RGB of w x h pixels, one a cell.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    if feature.ndim != 3 or 0 in feature.shape:
        raise ValueError(f"a feature to show must have shape (C, h, w), not {tuple(feature.shape)}")
    channels, height, width = feature.shape
    cells = feature.detach().cpu().double().reshape(channels, height * width).T
    if not torch.isfinite(cells).all():
        raise ValueError("a feature to show has values that are not finite")
    colours = _stretched(_components(cells - cells.mean(0)))
    pixels = (colours.reshape(height, width, 3) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def _components(cells: torch.Tensor) -> torch.Tensor:
    """Scores (cells, 3) of centred rows (cells, C) on their first three components; zero where there is none."""
    scores = torch.zeros(len(cells), 3, dtype=cells.dtype)
    with torch.random.fork_rng(devices=[]):  # the low-rank method draws numbers: always the same, none of the caller's
        torch.manual_seed(0)
        _, spread, axes = torch.pca_lowrank(cells, q=min(8, *cells.shape), center=False, niter=4)
    for index in range(min(3, len(spread))):
        if spread[index] > FLAT * spread[0]:
            axis = axes[:, index]
            scores[:, index] = cells @ (axis * torch.sign(axis[axis.abs().argmax()]))
    return scores


def _stretched(values: torch.Tensor) -> torch.Tensor:
    """Columns stretched to [0, 1] between their 1st and 99th percentile; 0.5 where a column does not vary."""
    low, high = values.quantile(0.01, dim=0), values.quantile(0.99, dim=0)
    lowest, highest = values.amin(0), values.amax(0)
    narrow = high <= low  # a single outlying cell: the percentiles miss it
    low, high = torch.where(narrow, lowest, low), torch.where(narrow, highest, high)
    span = high - low
    return torch.where(span > 0, (values - low) / span.clamp_min(torch.finfo(values.dtype).tiny), 0.5).clamp(0, 1)


def map_image(attention: torch.Tensor, aspect: float, text: bool) -> Image.Image:
    """An attention map, averaged over its heads, as a small picture.

    Args:
        attention: (heads, queries, keys), probabilities; the image tokens row by row.
        aspect: width / height of the image, from which the grid of its tokens follows.
        text: whether the keys are text tokens; otherwise they are image tokens.

    Returns:
        For text keys, one tile a key for the first 16 keys, bright where the image attends to it most (each key is
        stretched by itself). For image keys, the principal components of the rows: cells of one colour attend alike.
    """
    rows = attention.detach().cpu().float().mean(0)
    height, width = _grid(len(rows), aspect)
    if not text:
        return pca_image(rows.T.reshape(-1, height, width))
    tiles = _stretched(rows[:, :KEYS_SHOWN].double()).T.reshape(-1, height, width)
    columns = math.ceil(math.sqrt(len(tiles)))
    sheet = Image.new("RGB", (columns * (width + 1) - 1, math.ceil(len(tiles) / columns) * (height + 1) - 1), PAPER)
    for index, tile in enumerate(tiles):
        grey = Image.fromarray((tile * 255).round().to(torch.uint8).numpy())
        place = (index % columns * (width + 1), index // columns * (height + 1))
        sheet.paste(ImageOps.colorize(grey, black=COLD, mid=WARM, white=HOT), place)
    return sheet


def _grid(tokens: int, aspect: float) -> tuple[int, int]:
    """Height and width whose product is ``tokens`` and whose aspect is nearest to the image's."""
    heights = [side for side in range(1, tokens + 1) if tokens % side == 0]
    height = min(heights, key=lambda side: abs(math.log(tokens / side**2 / aspect)))
    return height, tokens // height


@dataclass(frozen=True)
class _Tile:
    picture: Image.Image
    title: str
    line: str


def contact_sheet(
    image: Image.Image | None, features: Mapping[str, torch.Tensor], tile: int = 256, columns: int | None = None
) -> Image.Image:
    """An image and a picture of each of its features, titled, on one sheet.

    Args:
        image: as the model saw it; ``None`` if there is none any more.
        features: title (its first word an activation id) -> (C, h, w) shown by ``pca_image``, or (heads, queries, keys)
            for an id ending in ``map``, shown by ``map_image``; each may have a batch axis of 1 in front. Text-side
            features (tokens, C) have no place in the image and are left out.
        tile: height of each picture on the sheet, in pixels; features are enlarged to it without smoothing, and have
            the image's aspect.
        columns: pictures in a row; ``None`` chooses a sheet somewhat wider than high.

    Returns:
        The sheet, RGB.

    Raises:
        ValueError: no feature has a picture, or one has another shape or values that are not finite.
    """
    aspect = image.width / image.height if image is not None else _aspect(features)
    tiles = [made for title, value in features.items() if (made := _tile_of(title, value, aspect)) is not None]
    if not tiles:
        raise ValueError("none of the features has a picture: they are all text-side")
    if image is not None:
        tiles.insert(0, _Tile(image.convert("RGB"), "image", f"{image.height}x{image.width}"))
    return _laid_out(tiles, (max(1, round(tile * aspect)), tile), columns or _columns(len(tiles), aspect))


def _aspect(features: Mapping[str, torch.Tensor]) -> float:
    """Width / height of the first spatial feature."""
    grids = (value.shape[-2:] for title, value in features.items() if not is_map(title) and _picturable(value))
    height, width = next(grids, (1, 1))
    return width / height


def _tile_of(title: str, value: torch.Tensor, aspect: float) -> _Tile | None:
    if value.ndim == 4 and value.shape[0] == 1:
        value = value[0]
    if is_map(title) and value.ndim == 3:
        return _map_tile(title, value, aspect)
    if not _picturable(value):
        return None
    if value.ndim != 3:
        raise ValueError(f"{title} has shape {tuple(value.shape)}: give the features of one image at one t")
    channels, height, width = value.shape
    return _Tile(pca_image(value), title, f"{channels}@{height}x{width}")


def _picturable(value: torch.Tensor) -> bool:
    """Whether it is not text-side: (tokens, C), or (1, tokens, C), as no spatial feature has a single channel."""
    return value.ndim > 3 or (value.ndim == 3 and value.shape[0] > 1)


def _map_tile(title: str, value: torch.Tensor, aspect: float) -> _Tile:
    heads, queries, keys = value.shape
    line = f"{heads} head{'s' * (heads > 1)}, {queries} to {keys}"
    name = title.split()[0]
    if name.endswith("self-map"):
        return _Tile(map_image(value, aspect, text=False), title, line)
    if name.endswith("text-map"):  # from text to image: here the queries are the words
        value = value.transpose(1, 2)
    line += f", tokens 1-{min(value.shape[2], KEYS_SHOWN)}"
    return _Tile(map_image(value, aspect, text=True), title, line)


def is_map(title: str) -> bool:
    """Whether a title's activation id names an attention map."""
    return title.split()[0].endswith("map")


def _columns(count: int, aspect: float) -> int:
    return min(count, max(2, round(math.sqrt(count * 1.4 / aspect))))


def _laid_out(tiles: list[_Tile], picture: tuple[int, int], columns: int) -> Image.Image:
    width, height = picture
    head = TITLE + LINE + 14
    rows = math.ceil(len(tiles) / columns)
    size = (
        2 * MARGIN + columns * width + (columns - 1) * GAP,
        2 * MARGIN + rows * (head + height) + (rows - 1) * GAP,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, tile in enumerate(tiles):
        left, top = MARGIN + index % columns * (width + GAP), MARGIN + index // columns * (head + height + GAP)
        text, font = _fitted(tile.title, width)
        draw.text((left, top + TITLE), text, fill=INK, font=font, anchor="ls")
        draw.text((left, top + TITLE + LINE + 4), tile.line, fill=FAINT, font=ImageFont.load_default(LINE), anchor="ls")
        sheet.paste(_enlarged(tile.picture, picture), (left, top + head))
    return sheet


def _enlarged(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    smaller = picture.height > size[1]  # mostly a photograph; cells are kept as squares
    return picture.resize(size, Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST)


def _fitted(text: str, width: int) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """The text and the largest font, from ``TITLE`` to ``SHRUNK``, in which it fits; else it is cut at its end."""
    for size in range(TITLE, SHRUNK - 1, -1):
        font = ImageFont.load_default(size)
        if font.getlength(text) <= width:
            return text, font
    while len(text) > 1 and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "...", font
