"""``python -m segmentors.mmseg.measure_cache CONFIG CHECKPOINT``: what compressed features cost a trained head.

Prints a table: of each way to keep features, the bytes of an image, how far the features are off, and the mIoU of the
head on the config's test images.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from . import launching
from .compression import DTYPES, Compression


class Loss(NamedTuple):
    """bytes: of an image. error: ‖kept - exact‖ / ‖exact‖ over all features and images. miou: in 0 to 1."""

    bytes: float
    error: float
    miou: float


def measure(config: Config, ways: list[Compression]) -> dict[Compression, Loss]:
    """Score a config's test images with features kept in each of several ways; the first must lose nothing.

    Raises:
        ValueError: the config has no single ``DiffusionBackbone``.
    """
    if config.model.backbone.type != "DiffusionBackbone":
        raise ValueError(f"a cache belongs to a DiffusionBackbone; the config has a {config.model.backbone.type}")
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        exact = Path(scratch) / "0"
        for number, way in enumerate(ways):
            folder = Path(scratch) / str(number)
            config.model.backbone.cache = dict(folder=str(folder), dtype=way.dtype, components=way.components)
            miou = float(launching.begin(config).test()["mIoU"]) / 100
            files = sorted(folder.rglob("*.safetensors"))
            size = sum(file.stat().st_size for file in files) / len(files)
            found[way] = Loss(size, _error(exact, folder, ways[0], way), miou)
    return found


def _error(exact: Path, kept: Path, lossless: Compression, way: Compression) -> float:
    """Both folders have the same images under the same names."""
    names = {file.name: file for file in kept.rglob("*.safetensors")}
    off = whole = 0.0
    for file in exact.rglob("*.safetensors"):
        truth, other = lossless.unpack(load_file(file)), way.unpack(load_file(names[file.name]))
        off += sum(float((other[id] - truth[id]).double().square().sum()) for id in truth)
        whole += sum(float(truth[id].double().square().sum()) for id in truth)
    return (off / whole) ** 0.5


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    launching.check_checkpoint(args.checkpoint)
    config = launching.read_config(args)
    config.load_from = str(args.checkpoint)
    config.log_level = "WARNING"
    ways = [Compression(), *(way for way in args.ways if way != Compression())]
    table = Table("kept as", "KiB an image", "error", "mIoU", "mIoU lost")
    found = measure(config, ways)
    exact = found[Compression()].miou
    for way, loss in found.items():
        table.add_row(
            str(way), f"{loss.bytes / 1024:.0f}", f"{loss.error:.2%}", f"{loss.miou:.4f}", f"{exact - loss.miou:+.4f}"
        )
    Console().print(table)
    launching.finish()


def _way(text: str) -> Compression:
    """``int8``, or ``int8:32`` for 32 components."""
    dtype, _, components = text.partition(":")
    try:
        return Compression(dtype, int(components) if components else None)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; write a dtype, or a dtype:components such as int8:32") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m segmentors.mmseg.measure_cache", description=__doc__)
    launching.add_arguments(parser)
    parser.add_argument("checkpoint", type=Path, help="what training saved")
    parser.add_argument(
        "--ways", nargs="+", type=_way, default=[Compression(d) for d in DTYPES] + [Compression("float16", 32)],
        metavar="DTYPE[:COMPONENTS]", help="float32, float16 or int8; int8:32 keeps 32 components of each feature",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    main()
