"""Where the page is served for the tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Server:
    """address: of the page. folder: where it keeps its files. tiny: name of its second model."""

    address: str
    folder: Path
    tiny: str
