"""GATE's report as one page of HTML that needs nothing beside it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image
from torch import Tensor

from .gate import BASE, LEVEL, RULE, Gain, Row, Spread, Trial, as_picture, distances, shown

WIDTH = 256
"""Pixels of a picture at most: a page may have hundreds."""
GAINS = {"ssim": "SSIM", "laplacian": "Laplacian score", "rmse": "RMSE", "feature_distance": "feature distance"}
DISTANCES = {
    "ssim": "SSIM (1 is the image itself)",
    "rmse": "RMSE of pixels from 0 to 1",
    "feature_distance": "feature distance",
    "score": "Laplacian score (1 is no shift)",
}
MEANING = (
    "SSIM, RMSE and feature distance compare the repainted image with the image; feature distance is the LPIPS formula "
    "with the denoiser's own features at t = 0 and unit weights. denoise has no part in repainting, all of which is "
    "denoising. The Laplacian score compares features at t with those at t = 0."
)
STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #16181d; --faint: #555b66; --line: #c9ced6;
        --use: #0b6b46; --harmful: #a3201d; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14161a; --ink: #eceef2; --faint: #a8afbb; --line: #3c424d; --use: #5fd3a0; --harmful: #ff9a92; }
}
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto;
       max-width: 75rem; padding: 0 1rem; }
p { max-width: 45rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); padding: .3rem 0; }
th, td { text-align: left; padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td small { color: var(--faint); display: block; white-space: nowrap; }
svg { display: block; }
.use { color: var(--use); font-weight: 600; }
.harmful { color: var(--harmful); font-weight: 600; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; width: min(12rem, calc(50% - .5rem)); }
figure img { width: 100%; height: auto; }
figcaption { overflow-wrap: anywhere; }
figcaption small { color: var(--faint); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(
    found: Sequence[Trial],
    rows: Sequence[Row],
    images: Sequence[Tensor],
    names: Sequence[str],
    settings: Mapping[str, Any],
) -> str:
    """The ranked table, the distances behind it, the pictures of the Img2Img test, and the settings.

    Args:
        found: trials; of each image, the first seed is shown.
        rows: of ``ranked``.
        images: (3, H, W) in [-1, 1], in the order of ``Trial.image``.
        names: of the images.
        settings: name → value, as they are printed.

    Returns:
        A document without links to anything: pictures are in it as PNG.
    """
    seeds = len({x.seed for x in found})
    counted = f"{len(images)} image{'s'[: len(images) != 1]}, {seeds} seed{'s'[: seeds != 1]} each"
    parts = [
        f"<h1>Content shift: which techniques hold features at their image</h1>\n<p>Measured on {counted}.</p>",
        "<h2>Recommendation</h2>", _gains(rows), f"<p>{escape(RULE)}</p>",
        "<h2>Distances</h2>", _distances(found), f"<p>{escape(MEANING)}</p>",
        "<h2>Repainted from high noise</h2>",
        *(_pictures(found, index, image, names[index]) for index, image in enumerate(images)),
        "<h2>Settings</h2>", _settings(settings),
    ]  # fmt: skip
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Content shift: GATE</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML; the first of each row is its heading. What is too wide scrolls, with the keyboard too."""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = [f'<tr><th scope="row">{first}</th>{"".join(f"<td>{c}</td>" for c in rest)}</tr>' for first, *rest in rows]
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{names}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _gains(rows: Sequence[Row]) -> str:
    reach = {what: max(_reach(getattr(row, what)) for row in rows) for what in GAINS}
    cells = [
        [escape(row.technique), f'<span class="{row.verdict.replace(" ", "-")}">{row.verdict}</span>']
        + [_gain(getattr(row, what), reach[what]) for what in GAINS]
        for row in rows
    ]
    head = ["technique", "recommendation", *(f"{name} gain" for name in GAINS.values())]
    caption = f"Gains over the model alone, with {LEVEL:.1%} intervals; more is better in every column"
    return _table(caption, head, cells)


def _reach(gain: Gain) -> float:
    return max((abs(x) for x in (gain.mean, gain.low, gain.high) if x is not None and math.isfinite(x)), default=0.0)


def _gain(gain: Gain, reach: float) -> str:
    """The mean, its interval in words, and both as a small picture from -reach to +reach."""
    if math.isnan(gain.mean):
        return str(gain)
    if gain.low is None or gain.high is None:
        return f"{gain}<small>no interval</small>"

    def x(value: float) -> float:
        return round(60 + 55 * value / (reach or 1), 1)

    drawing = (
        '<svg width="120" height="10" viewBox="0 0 120 10" aria-hidden="true">'
        '<path d="M60 0V10" stroke="var(--line)"/>'
        f'<path d="M{x(gain.low)} 5H{x(gain.high)}" stroke="currentColor" stroke-width="2"/>'
        f'<circle cx="{x(gain.mean)}" cy="5" r="3" fill="currentColor"/></svg>'
    )
    return f"{gain.mean:+.4f}<small>{gain.low:+.4f} to {gain.high:+.4f}</small>{drawing}"


def _distances(found: Sequence[Trial]) -> str:
    def cell(value: Spread) -> str:
        return shown(value.mean, 4) + ("" if value.deviation is None else f" ± {value.deviation:.4f}")

    cells = [
        ["the model alone" if name == BASE else escape(name), *(cell(measured[what]) for what in DISTANCES)]
        for name, measured in distances(found).items()
    ]
    return _table("Means, and spread over the seeds of an image", ["technique", *DISTANCES.values()], cells)


def _pictures(found: Sequence[Trial], index: int, image: Tensor, name: str) -> str:
    mine = [x for x in found if x.image == index]
    figures = [_figure(image, f"{name}, as it is", "the image", "")]
    for x in (x for x in mine if x.seed == mine[0].seed):
        title = "the model alone" if x.technique == BASE else x.technique
        figures.append(_figure(x.repainted, f"{name}, repainted by {title}", title, f"SSIM {x.ssim:.3f}"))
    return f'<h3>{escape(name)}</h3>\n<div class="row">\n' + "\n".join(figures) + "\n</div>"


def _figure(image: Tensor, alt: str, title: str, line: str) -> str:
    picture = as_picture(image)
    picture.thumbnail((WIDTH, WIDTH * 4), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" width="{picture.width}" height="{picture.height}" '
        f'alt="{escape(alt)}"><figcaption>{escape(title)}<br><small>{escape(line)}</small></figcaption></figure>'
    )


def _settings(settings: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        if value is None or value == "":
            return "not given"
        return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(shown(v))}</dd>" for k, v in settings.items()) + "</dl>"
