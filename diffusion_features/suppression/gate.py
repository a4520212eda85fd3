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
from .applying import loaded
from .once import remembering
from .repaint import repaint
from .sharing import variants
from .sheet import Tile, sheet
from .spec import Spec, as_techniques

BASE = "none"
RULE = (
    "gain: what a technique adds to the structural similarity of the repainted image with the image, and to the "
    "Laplacian score, over the model alone with the same noise. use: the 95% interval of at least one gain lies above "
    "0, and of none below. harmful: that of at least one gain lies below 0. no effect: otherwise. The intervals are "
    "over images, or over seeds if there is one image, and then say something about this image alone."
)
Verdict = Literal["use", "no effect", "harmful"]


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
        laplacian: Laplacian score of each activation.
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
        """Mean of the Laplacian scores over activations."""
        return float(np.mean(list(self.laplacian.values())))


def trials(
    fx: FeatureExtractor,
    image: Picture,
    techniques: Mapping[str, Spec | Sequence[Spec]],
    prompt: str = "",
    *,
    t: int = 50,
    anchor_t: int = 800,
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
        anchor_t: where the anchor of the Laplacian score is, a timestep with strong content shift.
        strength, steps, guidance: of ``repaint``.
        seeds: of the noise; the same for every technique.
        index: recorded as the number of the image.

    Raises:
        ValueError: a technique is called ``BASE``; activations that are no spatial features; see also ``repaint``.
    """
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
    """What a technique adds over the model alone: mean, and 95% interval; none of a single unit."""

    mean: float
    low: float | None
    high: float | None

    @property
    def sign(self) -> int:
        """1 or -1 if the interval lies on one side of 0, else 0."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


@dataclass(frozen=True)
class Row:
    """One technique over all images: its gains (all are better when higher), and the recommendation from ``RULE``."""

    technique: str
    ssim: Gain
    laplacian: Gain
    rmse: Gain
    feature_distance: Gain
    verdict: Verdict


def ranked(found: Sequence[Trial], draws: int = 2000) -> list[Row]:
    """The techniques over all trials, the best first: by recommendation, then by the gain in structural similarity.

    Args:
        found: trials of several images, each with ``BASE`` among them and the same seeds.
        draws: resamplings of the bootstrap, which is seeded.
    """
    names = list(dict.fromkeys(trial.technique for trial in found if trial.technique != BASE))
    rows = [_row(name, found, draws) for name in names]
    order: dict[Verdict, int] = {"use": 0, "no effect": 1, "harmful": 2}
    return sorted(rows, key=lambda row: (order[row.verdict], -row.ssim.mean))


def _row(name: str, found: Sequence[Trial], draws: int) -> Row:
    def gain(value: Callable[[Trial], float]) -> Gain:
        base = {(x.image, x.seed): value(x) for x in found if x.technique == BASE}
        gains = {(x.image, x.seed): value(x) - base[x.image, x.seed] for x in found if x.technique == name}
        return bootstrap(gains, draws)

    ssim, laplacian = gain(lambda x: x.ssim), gain(lambda x: x.score)
    signs = {ssim.sign, laplacian.sign}
    verdict: Verdict = "harmful" if -1 in signs else "use" if 1 in signs else "no effect"
    return Row(name, ssim, laplacian, gain(lambda x: -x.rmse), gain(lambda x: -x.feature_distance), verdict)


def bootstrap(gains: Mapping[tuple[int, int], float], draws: int = 2000) -> Gain:
    """Mean of gains and its 95% percentile interval under resampling of the images, or of the seeds of a single one.

    Args:
        gains: (image, seed) → gain; the seeds of an image are averaged first, because they are not independent of it.
    """
    images = sorted({image for image, _ in gains})
    if len(images) > 1:
        units = [float(np.mean([gain for (i, _), gain in gains.items() if i == image])) for image in images]
    else:
        units = list(gains.values())
    mean = float(np.mean(units))
    if len(units) < 2:
        return Gain(mean, None, None)
    from scipy import stats  # type: ignore[import-untyped]  # slow to import

    low, high = stats.bootstrap((units,), np.mean, n_resamples=draws, method="percentile", rng=0).confidence_interval
    return Gain(mean, float(low), float(high))


@dataclass(frozen=True)
class Spread:
    """Mean over images and seeds, and standard deviation over the seeds of an image; none of a single seed."""

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
    images = [[getattr(x, what) for x in found if x.image == image] for image in dict.fromkeys(x.image for x in found)]
    mean = float(np.mean([np.mean(one) for one in images]))
    if min(map(len, images)) < 2:
        return Spread(mean, None)
    return Spread(mean, float(np.sqrt(np.mean([np.var(one, ddof=1) for one in images]))))


def as_json(found: Sequence[Trial], rows: Sequence[Row], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the pictures: the settings, the rule, the table, and each trial."""
    plain = [{k: v for k, v in vars(x).items() if k != "repainted"} | {"laplacian_mean": x.score} for x in found]
    return {
        "settings": dict(settings), "rule": RULE, "techniques": [asdict(row) for row in rows],
        "distances": {name: {k: asdict(v) for k, v in one.items()} for name, one in distances(found).items()},
        "trials": plain,
    }  # fmt: skip


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
                rows[-1].append(Tile(as_picture(x.repainted), title, f"SSIM {x.ssim:.3f}, Laplacian {x.score:.3f}"))
    return sheet(rows, width)


def as_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] as it is seen."""
    return Image.fromarray(((image.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy())
