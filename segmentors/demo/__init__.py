"""The demo: a page in the browser to segment pictures with words and to look inside the model that does it.

>>> serve(Settings(models=("embedded",)))

Only ``tabs``, ``page``, ``boundary``, ``style`` and ``serving`` know Gradio; the rest is what they show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .serving import running, serve
    from .settings import Limits, Settings

__all__ = ["Limits", "Settings", "running", "serve"]


def __getattr__(name: str) -> Any:
    """Import on first use: torch, diffusers and Gradio take seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import serving, settings

    return getattr(settings if name in ("Limits", "Settings") else serving, name)
