"""What the page offers, and how much it accepts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How much a visitor may send.

    Attributes:
        upload_bytes: of a picture's file.
        pixels: of a picture, as its file declares them, before anything is decoded.
        side: pictures are reduced to this many pixels on their longer side.
        ratio: of the longer side to the shorter one.
        classes: classes and words of the background together.
        name: characters of a class name.
        text: characters of a prompt or caption.
        activations: looked at together.
        body: bytes of a request that is no upload.
    """

    upload_bytes: int = 20 * 2**20
    pixels: int = 50_000_000
    side: int = 1024
    ratio: float = 5.0
    classes: int = 32
    name: int = 60
    text: int = 600
    activations: int = 12
    body: int = 64 * 2**10


PUBLIC = Limits(upload_bytes=8 * 2**20, pixels=16_000_000, side=512, classes=16, activations=6)
"""For a page that strangers reach."""


@dataclass(frozen=True)
class Settings:
    """How the page is served.

    Attributes:
        models: what visitors may choose from, and nothing else: ``"embedded"``, hub ids, folders. The first is loaded
            at the start, the others when they are first chosen.
        public: listen on all interfaces, with the tighter limits of ``PUBLIC``.
        port: ``None`` takes the first free one from 7860 on.
        kept: seconds after which uploads and results are removed from the disk.
        disk_bytes: what files made for download may take together; the oldest go first.
        waiting: requests that may wait in the queue; more are refused.
        limits: by default those of ``Limits``, or ``PUBLIC``.
    """

    models: tuple[str, ...] = ("embedded",)
    public: bool = False
    port: int | None = None
    kept: int = 900
    disk_bytes: int = 2**30
    waiting: int = 64
    limits: Limits | None = None

    @property
    def allowed(self) -> Limits:
        """The limits that hold."""
        return self.limits or (PUBLIC if self.public else Limits())
