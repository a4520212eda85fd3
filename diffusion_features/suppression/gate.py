"""GATE: which techniques suppress content shift here, by numbers (arXiv 2410.06719, where the choice is by eye).

Two tests of each technique, against the model alone, with the same noise:

- Img2Img: the image is repainted from high noise. A technique suppresses the shift if the result is closer to the
  image than without it.
- the Laplacian score: a feature's edges are compared with those of the same feature at t = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..extractor import FeatureExtractor
from ..images import Picture, as_tensor
from ..noising import check_t
from ..plain import finite
from .applying import loaded
from .once import remembering
from .repaint import repaint
from .sharing import variants
from .sheet import Tile, sheet
from .spec import Spec, as_techniques

BASE = "none"
ANCHOR = 800
"""A timestep with strong content shift."""
LEVEL = 0.975
"""Confidence of the interval of a gain. Two of them decide, so that both hold 0 of a technique that does nothing in at
least 1 - 2 (1 - 0.975) = 95% of cases (Bonferroni)."""
FEWEST = 3
"""Units, images or the seeds of one, that an interval takes. Two differ by a single number, which is no spread."""
RULE = (
    "gain: what a technique adds to the structural similarity of the repainted image with the image, and to the "
    "Laplacian score, over the model alone with the same noise. Each of the two has an interval of "
    f"{LEVEL:.1%} (Student's t) over images, or over seeds if there is one image, and then says something about this "
    "image alone. use: at least one interval lies above 0, and none below. harmful: at least one lies below 0. too few "
    f"to tell: fewer than {FEWEST} images, or seeds of the one image; undefined gains do not count. no effect: "
    "otherwise; none was found, but a small one may be there. A technique that does nothing is called use or harmful "
    "in about 5% of cases at most."
)
Verdict = Literal["use", "no effect", "too few to tell", "harmful"]


# ---- the Laplacian score --------------------------------------------------------------------------------------------


def laplacian(feature: Tensor) -> Tensor:
    """Length over channels of a feature's Laplacian at each cell, (B, h, w).

    The stencil of four neighbours, ``f(i+1,j) + f(i-1,j) + f(i,j+1) + f(i,j-1) - 4 f(i,j)``; beyond the border the
    nearest cell goes on.

    Args:
        feature: (B, C, h, w).
    """
    padded = F.pad(feature.float(), (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] + padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] + padded[:, :, :-2, 1:-1]
    return (across + down - 4 * feature.float()).norm(dim=1)


def laplacian_score(feature: Tensor, reference: Tensor, anchor: Tensor) -> Tensor:
    """How far a feature is from content shift: 1 is none, 0 is as much as the anchor, below 0 more.

    ``score = (d(anchor) - d(feature)) / d(anchor)``, ``d(f) = Σ_ij | ‖Lap(reference)_ij‖₂ - ‖Lap(f)_ij‖₂ |``
    (arXiv 2410.06719, quantitative metric).

    Args:
        feature: (B, C, h, w).
        reference: the same feature at t = 0.
        anchor: the same feature with strong content shift, as at a high t.

    Returns:
        (B,); undefined (NaN) where the anchor has no shift.

    Raises:
        ValueError: the three differ in shape, or have no cells.
    """
    if not feature.shape == reference.shape == anchor.shape or feature.ndim != 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in (feature, reference, anchor))
        raise ValueError(f"feature, reference and anchor must have the same shape (B, C, h, w), not {shapes}")
    wanted = laplacian(reference)
    shift, most = ((wanted - laplacian(x)).abs().sum(dim=(1, 2)) for x in (feature, anchor))
    return torch.where(most > 0, (most - shift) / most, math.nan)


# ---- one image ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What one technique did to one image with one seed.

    Attributes:
        rmse: root mean square difference of the repainted image and the image, of pixels from 0 to 1.
        ssim: their structural similarity, at most 1.
        feature_distance: of the two, by the denoiser's features f at t = 0: the mean over activations and cells of
            ``½ ‖f/‖f‖ - f'/‖f'‖‖²``, which is 1 - cosine. This is half of LPIPS (arXiv 1801.03924, eq. 1) with this
            denoiser in place of an image classifier, unit weights, and the mean over layers; from 0 to 2.
        laplacian: Laplacian score of each activation; NaN where it is undefined.
        repainted: the repainted image, (3, H, W) in [-1, 1].
    """

    technique: str
    image: int
    seed: int
    rmse: float
    ssim: float
    feature_distance: float
    laplacian: dict[str, float]
    repainted: Tensor = field(repr=False, compare=False)

    @property
    def score(self) -> float:
        """Mean of the Laplacian scores over activations that have one; NaN if none has.

        Those of a single cell have no edges, and so no score: the deepest ones of small images.
        """
        defined = [score for score in self.laplacian.values() if not math.isnan(score)]
        return float(np.mean(defined)) if defined else math.nan


def check_anchor(t: int, anchor_t: int) -> None:
    """Refuse an anchor that has no more content shift than the features.

    The shift grows with the timestep, from none at 0, where the reference of the Laplacian score is; its anchor is a
    feature with strong shift (arXiv 2410.06719), and at 0 the score is a division by 0.

    Raises:
        ValueError: ``anchor_t`` is not above ``t``.
    """
    if anchor_t <= t:
        raise ValueError(
            f"anchor_t (--anchor-t) must be above t (--t), but is {anchor_t} where t is {t}: the anchor is a feature "
            "with stronger content shift, which grows with the timestep"
        )


def trials(
    fx: FeatureExtractor,
    image: Picture,
    techniques: Mapping[str, Spec | Sequence[Spec]],
    prompt: str = "",
    *,
    t: int = 50,
    anchor_t: int = ANCHOR,
    strength: float = 0.8,
    steps: int = 20,
    guidance: float = 1.0,
    seeds: Sequence[int] = (0, 1, 2, 3),
    size: int | tuple[int, int] | None = None,
    index: int = 0,
) -> list[Trial]:
    """Both tests of each set of techniques, and of none (``BASE``), on one image.

    Args:
        techniques: name → what to suppress content shift with.
        t: where features are taken.
        anchor_t: where the anchor of the Laplacian score is, a timestep with strong content shift, above ``t``.
        strength, steps, guidance: of ``repaint``.
        seeds: of the noise; the same for every technique.
        index: recorded as the number of the image.

    Raises:
        ValueError: ``t`` or ``anchor_t`` is no timestep of the model, or the anchor is not above; a technique is called
            ``BASE``; activations that are no spatial features; see also ``repaint``.
    """
    for timestep in (t, anchor_t):
        check_t(timestep, fx.pipe.scheduler)
    check_anchor(t, anchor_t)
    if BASE in techniques:
        raise ValueError(f"{BASE!r} is what the model alone is called; give the technique another name")
    if other := [a.id for a in fx.activations if a.kind != "spatial"]:
        raise ValueError(f"GATE compares spatial features; {other[0]} is none: choose other activations")
    named = {BASE: (), **techniques}
    pixels = as_tensor(image, size=size, multiple=fx.multiple)
    found = []
    every = [one for suppress in named.values() for one in as_techniques(suppress)]
    with remembering(), loaded(fx, every):
        for seed in seeds:
            features = variants(fx, pixels, named, prompt, t=t, seed=seed)
            reference = fx(pixels, prompt, t=0, seed=seed)
            anchor = fx(pixels, prompt, t=anchor_t, seed=seed)
            for name, suppress in named.items():
                painted = repaint(
                    fx, pixels, prompt, suppress=suppress, strength=strength, steps=steps, guidance=guidance, seed=seed
                )
                again = fx(painted, prompt, t=0, seed=seed)
                scores = {
                    id: float(laplacian_score(features[name][id], reference[id], anchor[id])) for id in features[name]
                }
                found.append(
                    Trial(
                        name, index, seed, *closeness(painted[0].cpu(), pixels[0].cpu()), _distance(again, reference),
                        scores, painted[0].cpu(),
                    )
                )  # fmt: skip
    return found


def closeness(painted: Tensor, image: Tensor) -> tuple[float, float]:
    """Root mean square difference, of pixels from 0 to 1, and structural similarity of two images (3, H, W)."""
    from skimage.metrics import structural_similarity  # slow to import

    rmse = float(((painted - image) / 2).square().mean().sqrt())
    window = min(7, *(side - 1 + side % 2 for side in image.shape[1:]))
    similarity = structural_similarity(painted.numpy(), image.numpy(), channel_axis=0, data_range=2.0, win_size=window)
    return rmse, float(similarity)


def _distance(features: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    return float(np.mean([1 - F.cosine_similarity(features[id], reference[id]).mean().item() for id in reference]))


# ---- a set of images ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gain:
    """What a technique adds over the model alone.

    Attributes:
        mean: over units, images or the seeds of one; NaN where it is undefined for all of them.
        low, high: its 97.5% interval (``LEVEL``); none of fewer than three units (``FEWEST``).
    """

    mean: float
    low: float | None
    high: float | None

    @property
    def sign(self) -> int:
        """1 or -1 if the interval lies on one side of 0, else 0."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)

    def __str__(self) -> str:
        """The mean and, if there is one, its interval: ``+0.0010 (+0.0004 to +0.0017)``."""
        if math.isnan(self.mean):
            return "undefined"
        return f"{self.mean:+.4f}" + ("" if self.low is None else f" ({self.low:+.4f} to {self.high:+.4f})")


@dataclass(frozen=True)
class Row:
    """One technique over all images: its gains (all are better when higher), and the recommendation from ``RULE``."""

    technique: str
    ssim: Gain
    laplacian: Gain
    rmse: Gain
    feature_distance: Gain
    verdict: Verdict


def ranked(found: Sequence[Trial]) -> list[Row]:
    """The techniques over all trials, the best first: by recommendation, then by the gain in structural similarity.

    Args:
        found: trials of several images, each with ``BASE`` among them and the same seeds.
    """
    names = list(dict.fromkeys(trial.technique for trial in found if trial.technique != BASE))
    order: dict[Verdict, int] = {"use": 0, "no effect": 1, "too few to tell": 2, "harmful": 3}
    return sorted((_row(name, found) for name in names), key=lambda row: (order[row.verdict], -row.ssim.mean))


def _row(name: str, found: Sequence[Trial]) -> Row:
    def gain(value: Callable[[Trial], float]) -> Gain:
        base = {(x.image, x.seed): value(x) for x in found if x.technique == BASE}
        gains = {(x.image, x.seed): value(x) - base[x.image, x.seed] for x in found if x.technique == name}
        return interval(gains)

    ssim, laplacian = gain(lambda x: x.ssim), gain(lambda x: x.score)
    return Row(
        name, ssim, laplacian, gain(lambda x: -x.rmse), gain(lambda x: -x.feature_distance), _verdict(ssim, laplacian)
    )


def _verdict(*gains: Gain) -> Verdict:
    """What ``RULE`` says."""
    defined = [gain for gain in gains if not math.isnan(gain.mean)]
    signs = {gain.sign for gain in defined}
    if -1 in signs:
        return "harmful"
    if not defined or any(gain.low is None for gain in defined):
        return "too few to tell"
    return "use" if 1 in signs else "no effect"


def interval(gains: Mapping[tuple[int, int], float]) -> Gain:
    """Mean of gains, and its interval by Student's t over images, or over the seeds of a single one.

    It holds the true mean with probability ``LEVEL`` where the units are normal, however few there are. (Percentiles of
    a bootstrap do not: of four units their 95% interval misses it in every fifth case.)

    Args:
        gains: (image, seed) → gain; the seeds of an image are averaged first, because they are not independent of it.
            Units without a finite gain are left out.
    """
    images = sorted({image for image, _ in gains})
    if len(images) > 1:
        every = [float(np.mean([gain for (i, _), gain in gains.items() if i == image])) for image in images]
    else:
        every = list(gains.values())
    units = [unit for unit in every if math.isfinite(unit)]
    mean, count = (float(np.mean(units)) if units else math.nan), len(units)
    if count < FEWEST:
        return Gain(mean, None, None)
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # slow to import

    # mean ± t s / √n, with s² = Σ(x - mean)² / (n - 1) and t the quantile (1 + LEVEL) / 2 of n - 1 degrees of freedom
    reach = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * float(np.std(units, ddof=1)) / math.sqrt(count)
    return Gain(mean, mean - reach, mean + reach)


@dataclass(frozen=True)
class Spread:
    """Mean over images and seeds, and standard deviation over the seeds of an image; none of a single seed.

    Of a measure that is undefined for some of them, over the others.
    """

    mean: float
    deviation: float | None


def distances(found: Sequence[Trial]) -> dict[str, dict[str, Spread]]:
    """How far each technique, ``BASE`` among them, is from the images: technique → measure of ``Trial`` → spread.

    Of several images, the deviation is the root mean square of theirs.
    """
    measures = ("ssim", "rmse", "feature_distance", "score")
    return {
        name: {what: _spread([x for x in found if x.technique == name], what) for what in measures}
        for name in dict.fromkeys(x.technique for x in found)
    }


def _spread(found: Sequence[Trial], what: str) -> Spread:
    values = {image: [getattr(x, what) for x in found if x.image == image] for image in {x.image for x in found}}
    images = [one for every in values.values() if (one := [value for value in every if math.isfinite(value)])]
    mean = float(np.mean([np.mean(one) for one in images])) if images else math.nan
    if not images or min(map(len, images)) < 2:
        return Spread(mean, None)
    return Spread(mean, float(np.sqrt(np.mean([np.var(one, ddof=1) for one in images]))))


def as_json(found: Sequence[Trial], rows: Sequence[Row], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the pictures: the settings, the rule, the table, and each trial.

    What is undefined (NaN) or infinite is ``None``, because JSON has no such numbers.
    """
    plain = [{k: v for k, v in vars(x).items() if k != "repainted"} | {"laplacian_mean": x.score} for x in found]
    whole = {
        "settings": dict(settings), "rule": RULE, "techniques": [asdict(row) for row in rows],
        "distances": {name: {k: asdict(v) for k, v in one.items()} for name, one in distances(found).items()},
        "trials": plain,
    }  # fmt: skip
    return dict(finite(whole))


def picture(found: Sequence[Trial], images: Sequence[Tensor], names: Sequence[str], width: int = 192) -> Image.Image:
    """The Img2Img test as one picture: a row an image, of the image, what is made of it alone, and by each technique.

    Args:
        found: trials; the first seed of each image is drawn.
        images: (3, H, W) in [-1, 1], in the order of ``Trial.image``.
        names: what the rows are called.
        width: of each picture in pixels.
    """
    seeds = {x.image: x.seed for x in reversed(found)}
    rows = []
    for index, image in enumerate(images):
        rows.append([Tile(as_picture(image), names[index], "the image")])
        for x in found:
            if (x.image, x.seed) == (index, seeds[index]):
                title = "repainted by the model alone" if x.technique == BASE else x.technique
                rows[-1].append(Tile(as_picture(x.repainted), title, f"SSIM {x.ssim:.3f}, Laplacian {shown(x.score)}"))
    return sheet(rows, width)


def shown(number: float, places: int = 3) -> str:
    """A number as text; "undefined" for NaN."""
    return "undefined" if math.isnan(number) else f"{number:.{places}f}"


def as_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] as it is seen."""
    return Image.fromarray(((image.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy())
