"""Starting and ending the page."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from .housekeeping import housekeeping
from .models import Models
from .settings import Settings


@contextmanager
def running(settings: Settings) -> Iterator[str]:
    """The page, served in the background until the block ends; its address. All its files are gone afterwards.

    >>> with running(Settings()) as address:
    ...     gradio_client.Client(address)

    Raises:
        OSError: the port is taken.
        ValueError: the models are not named once each.
    """
    models = Models(settings.models)
    before = os.environ.get("GRADIO_TEMP_DIR")
    with (
        tempfile.TemporaryDirectory(prefix="diffusion-features-", dir=before) as folder,
        _threads(1, "models") as thread,
        _threads(4, "others") as others,
    ):
        os.environ["GRADIO_TEMP_DIR"] = folder  # components read it when they are made
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        try:
            from starlette.middleware import Middleware

            from .guard import Guard
            from .page import page
            from .style import CSS, HEAD, theme

            limits = settings.allowed
            blocks = page(settings, models, Path(folder), thread, others)
            guard = Middleware(Guard, body=limits.body, upload=limits.upload_bytes)
            _, address, _ = blocks.launch(
                prevent_thread_lock=True, quiet=True, share=False, show_error=False, ssr_mode=False, pwa=False,
                mcp_server=False, run_history=False, enable_monitoring=False, footer_links=["api", "settings"],
                server_name="0.0.0.0" if settings.public else "127.0.0.1", server_port=settings.port,
                max_file_size=limits.upload_bytes, app_kwargs={"middleware": [guard]}, theme=theme(), css=CSS,
                head=HEAD,
            )  # fmt: skip
            thread.submit(models, models.names[0])
            try:
                with housekeeping(Path(folder), settings.kept):
                    yield address
            finally:
                blocks.close(verbose=False)
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


@contextmanager
def _threads(count: int, name: str) -> Iterator[Executor]:
    """Threads until the block ends; what has not begun by then is left."""
    threads = ThreadPoolExecutor(count, name)
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


def serve(settings: Settings) -> None:
    """Serve the page until Ctrl-C, and say where it is. Raises as ``running``."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # hosts end a page so: its files must go then too
    with running(settings) as address:
        print(f"The page is at {address} (Ctrl-C ends it).", flush=True)
        with suppress(KeyboardInterrupt):  # the ordinary end, no failure
            threading.Event().wait()
