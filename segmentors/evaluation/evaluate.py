"""A segmentor on a data set, under a protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from torch import Tensor

from segmentors.training_free import Segmentation, TrainingFreeSegmentor
from segmentors.training_free.background import check_background

from .labelled import Dataset, Sample
from .metrics import count, scores
from .protocols import THRESHOLDS, Protocol, protocol_named


def evaluate(
    segmentor: TrainingFreeSegmentor,
    dataset: Dataset,
    protocol: str = "full-vocabulary",
    *,
    limit: int | None = None,
    background: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Any]:
    """Segment the first images of a data set, one by one, and compare with the truth.

    Args:
        protocol: see ``PROTOCOLS``.
        limit: how many images at most.
        background: words that the prompt names as background, where the data set has such a class.
        seed: of the noise, the same for each image.
        progress: called with how many images are done, and how many there are.

    Returns:
        What ``scores`` gives, ``per_class`` (name → IoU, ``None`` where it is undefined), and everything the figures
        depend on: ``protocol`` and what it means, ``dataset``, ``split``, ``images``, ``threshold``, ``model``, ``t``,
        ``method``, and whether images were ``captioned``. Under a protocol that sweeps the threshold also ``swept``:
        threshold → mean IoU.

    Raises:
        ValueError: there is no such protocol, no image, background words for a data set without a background, a
            background with neither words nor a threshold under a protocol that does not sweep it, or a threshold to
            sweep behind a CRF, which would have to know it.
    """
    rules = protocol_named(protocol)
    total = dataset.length if limit is None else min(limit, dataset.length)
    if total < 1:
        raise ValueError(f"there are {total} images to evaluate on")
    if background and not dataset.has_background:
        raise ValueError(f"{dataset.name} has no background class, so background words have no meaning there")
    judge = _Judge(segmentor, dataset, rules, background, seed)
    began = time.perf_counter()
    found = []
    for done, sample in enumerate(dataset.samples(total), start=1):
        found.append(judge.counts(sample))
        progress(done, total)
    counts = torch.stack(found, dim=1)
    each = [scores(one, absent_is_zero=rules.as_released) for one in counts]
    best = max(range(len(each)), key=lambda i: each[i]["miou"])
    figures = each[best]
    values = figures.pop("iou")
    result = {
        **figures,
        "per_class": {n: None if v != v else v for n, v in zip(judge.classes, values, strict=True)},
        "images": total, "dataset": dataset.name, "split": dataset.split, "protocol": protocol, "about": rules.about,
        "threshold": judge.thresholds[best] if judge.classes[0] == "background" else None,
        "background": list(background), "model": segmentor.fx.model_id, "revision": segmentor.fx.revision,
        "t": segmentor.preset.t, "method": asdict(segmentor.method),
        "captioned": segmentor.captioner is not None, "seed": seed,
        "seconds_per_image": (time.perf_counter() - began) / total,
    }  # fmt: skip
    if len(each) > 1:
        result["swept"] = {t: one["miou"] for t, one in zip(judge.thresholds, each, strict=True)}
    return result


class _Judge:
    """What is the same for all images of an evaluation."""

    def __init__(
        self, segmentor: TrainingFreeSegmentor, dataset: Dataset, rules: Protocol, background: Sequence[str], seed: int
    ) -> None:
        self.dataset, self.rules, self.seed = dataset, rules, seed
        self.void = rules.as_released and dataset.ignore is not None
        added = self.void and not dataset.has_background
        self.classes = (("background",) if added else ()) + dataset.classes
        self.added = int(added)
        self.background = list(background) if self.classes[0] == "background" else None
        sweep = rules.swept and self.background is not None
        self.thresholds: Sequence[float] = THRESHOLDS if sweep else (segmentor.method.threshold,)
        if sweep and segmentor.method.edges == "crf":
            raise ValueError("this protocol sweeps the threshold of the background, which a CRF must know beforehand")
        # a threshold that is swept is added afterwards
        method = replace(segmentor.method, background="exact") if sweep else segmentor.method
        self.sweep = sweep
        if self.background is not None:
            check_background(self.classes[1:], self.background, method.background, method.threshold)
        self.segmentor = TrainingFreeSegmentor(segmentor.fx, segmentor.preset, method, segmentor.captioner)

    def counts(self, sample: Sample) -> Tensor:
        """(thresholds, 5, classes) of one image."""
        truth = self._truth(sample.truth)
        ignore = None if self.void else self.dataset.ignore
        return torch.stack([count(one, truth, len(self.classes), ignore) for one in self._predicted(sample, truth)])

    def _truth(self, truth: Tensor) -> Tensor:
        if not self.void:
            return truth
        return (truth + self.added).masked_fill(truth == cast(int, self.dataset.ignore), 0)

    def _predicted(self, sample: Sample, truth: Tensor) -> list[Tensor]:
        """Labels (H, W), of each threshold."""
        first = int(self.background is not None)
        numbers = [*range(first, len(self.classes))]
        if self.rules.own_classes:
            there = set(truth.unique().tolist())
            numbers = [number for number in numbers if number in there]
        if not numbers:  # nothing to look for
            return [torch.zeros_like(truth)] * len(self.thresholds)
        names = [self.classes[number] for number in numbers]
        found = self.segmentor(sample.image, names, self.background, seed=self.seed)
        assert isinstance(found, Segmentation)
        table = torch.tensor([0] * first + numbers)
        return [table[labels.cpu()] for labels in self._labels(found)]

    def _labels(self, found: Segmentation) -> list[Tensor]:
        if not self.sweep:
            return [found.labels]
        behind, classes = found.scores[:1], found.scores[1:]
        return [torch.cat([(behind + t).clamp(0, 1), classes]).argmax(0) for t in self.thresholds]
