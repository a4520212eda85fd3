"""How the page looks."""

from __future__ import annotations

import gradio as gr

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
"""Fonts that the visitor has: the page loads none from elsewhere."""

CSS = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.7rem; letter-spacing: -0.02em; margin: 0.3rem 0 0.2rem; }
#title p { color: var(--body-text-color-subdued); margin: 0; max-width: 62em; }
.said { min-height: 1.6em; color: var(--body-text-color-subdued); }
.hint p { color: var(--body-text-color-subdued); font-size: 0.9rem; }
.table-wrap { overflow-x: auto; max-width: calc(100vw - 5rem); }
.gradio-container .grid-wrap { max-height: none !important; overflow: visible !important; }
.gradio-container .icon-button-wrapper:not(:has(*)) { display: none; }
#drawn button, #drawn .image-frame { width: 100%; }
.enlarged img { object-fit: contain !important; }
.gradio-container .thumbnail-lg .caption-label { white-space: normal; max-width: 95%;
  padding: 1px 6px; font-size: 0.72rem; }
.sharp img, .labels .mask { image-rendering: pixelated; }
.gradio-container button[role="tab"][aria-selected="true"] { color: var(--primary-700); }
.dark .gradio-container button[role="tab"][aria-selected="true"], .gradio-container.dark
  button[role="tab"][aria-selected="true"] { color: var(--primary-300); }
.labels .legend { background: var(--neutral-50); border-radius: 8px; }
.labels .legend-item { color: var(--neutral-950); background-image: linear-gradient(#ffffff59, #ffffff59); }
#hover .pair { display: flex; flex-wrap: wrap; gap: 1rem; }
#hover canvas { flex: 1 1 220px; min-width: 0; max-width: 512px; height: auto; border-radius: 8px; cursor: crosshair; }
#hover output { display: block; min-height: 1.6em; }
@media (max-width: 640px) {
  .gradio-container { padding: 0.5rem !important; }
  #title h1 { font-size: 1.3rem; }
}
"""

HEAD = """
<script>
// A press that leaves a field can move what is below it, when the last word becomes a chip: the button keeps the press,
// unless it ends where the button was not.
let pressed;
document.addEventListener("pointerdown", (event) => {
  const button = event.target.closest?.("button.primary");
  pressed = button && { button, box: button.getBoundingClientRect() };
  button?.setPointerCapture(event.pointerId);
}, true);
document.addEventListener("pointerup", ({ clientX: x, clientY: y }) => {
  if (pressed) {
    const { left, right, top, bottom } = pressed.box;
    pressed.undone = x < left || x > right || y < top || y > bottom;
  }
}, true);
document.addEventListener("click", (event) => {
  if (pressed?.undone && pressed.button.contains(event.target)) event.stopImmediatePropagation();
  pressed = undefined;
}, true);
// A slider that is moved by keys is let go of when the key is.
const KEYS = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End", "PageUp", "PageDown"];
document.addEventListener("keyup", (event) => {
  if (event.target.matches?.("input[type=range]") && KEYS.includes(event.key)) {
    event.target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
  }
});
</script>
"""


def theme() -> gr.themes.Base:
    """Soft, with every text dark or light enough on what is behind it to be read (WCAG 2.2, 1.4.3: 4.5 to 1)."""
    soft = gr.themes.Soft(
        primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", radius_size="lg", font=FONT, font_mono=MONO
    )
    return soft.set(
        background_fill_primary="*neutral_50",  # as in Soft; a second ``set`` would make it white
        checkbox_border_color="*neutral_500",
        checkbox_border_color_dark="*neutral_400",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*primary_700",
        block_title_text_color="*primary_700",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
    )
