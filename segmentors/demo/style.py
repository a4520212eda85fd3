"""How the page looks."""

from __future__ import annotations

import gradio as gr

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
"""Fonts that the visitor has: the page loads none from elsewhere."""

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.7rem; letter-spacing: -0.02em; margin: 0.3rem 0 0.2rem; }
#title p { color: var(--body-text-color-subdued); margin: 0; max-width: 62em; }
.said { min-height: 1.6em; color: var(--body-text-color-subdued); }
.hint p { color: var(--body-text-color-subdued); font-size: 0.9rem; }
.table-wrap { overflow-x: auto; max-width: calc(100vw - 5rem); }
.sharp img { image-rendering: pixelated; }
@media (max-width: 640px) {
  .gradio-container { padding: 0.5rem !important; }
  #title h1 { font-size: 1.3rem; }
}
"""


def theme() -> gr.themes.Base:
    return gr.themes.Soft(
        primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", radius_size="lg", font=FONT, font_mono=MONO
    )
