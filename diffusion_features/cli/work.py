"""Images on their way through a command: what is to be done, in which batches, and how the user hears of it."""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffusion_features.images import ImageError, fit_size, image_size, read_bytes, read_image


@dataclass(frozen=True)
class Item:
    """One image to work on.

    Attributes:
        key: its name among the images.
        path: its file.
        prompt: its text.
        sha256: hexadecimal digest of the file's bytes.
        original: height and width of the picture in the file.
        size: height and width to work at.
    """

    key: str
    path: Path
    prompt: str
    sha256: str
    original: tuple[int, int]
    size: tuple[int, int]

    def read(self) -> Image.Image:
        """The picture at ``size``.

        Raises:
            ImageError: it cannot be read.
        """
        image = read_image(self.path)
        height, width = self.size
        return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


@dataclass
class Report:
    """A progress bar and messages on stderr, as a context manager, and how many images failed."""

    total: int
    failed: int = 0
    _said: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self._task = self._progress.add_task("images", total=self.total)

    def __enter__(self) -> Report:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def done(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)

    def failure(self, error: ImageError) -> None:
        """Say why there is nothing of an image, and count it as done and failed."""
        self.failed += 1
        self.say(str(error))
        self.done()

    def once(self, topic: str, message: str) -> None:
        """Say something the first time its topic comes up."""
        if topic not in self._said:
            self._said.add(topic)
            self.say(message)

    def say(self, message: str) -> None:
        """Print a line on stderr, above the bar."""
        self._progress.console.print(message, markup=False, highlight=False, soft_wrap=True)


def readable(keys: Mapping[str, Path], report: Report) -> Iterator[tuple[str, Image.Image]]:
    """Key and picture of each image that can be read, at its own size; of the others the report says why not."""
    for key, path in keys.items():
        try:
            image = read_image(path)
        except ImageError as error:
            report.failure(error)
        else:
            yield key, image


def items(
    keys: dict[str, Path], prompts: dict[str, str], size: tuple[int, int] | None, multiple: int, report: Report
) -> Iterator[Item]:
    """The images that look readable, one by one; others are reported.

    Args:
        size: height and width to work at; ``None`` takes each image's own, made to fit ``multiple``.
    """
    for key, path in keys.items():
        try:
            data = read_bytes(path)
            original = image_size(data, path)
        except ImageError as error:
            report.failure(error)
            continue
        fit = size or fit_size(*original, multiple)
        if size is None and fit != original:
            report.once(
                "fit",
                f"Image sides must be multiples of {multiple} pixels: {key} is resized from {_shown(original)} to "
                f"{_shown(fit)}, and others likewise to the nearest size that fits.",
            )
        yield Item(key, path, prompts[key], hashlib.sha256(data).hexdigest(), original, fit)


def batches(stream: Iterable[Item], count: int) -> Iterator[list[Item]]:
    """Items in batches of up to ``count`` of one size, in the order the batches get full."""
    waiting: dict[tuple[int, int], list[Item]] = defaultdict(list)
    for item in stream:
        waiting[item.size].append(item)
        if len(waiting[item.size]) == count:
            yield waiting.pop(item.size)
    yield from waiting.values()


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
