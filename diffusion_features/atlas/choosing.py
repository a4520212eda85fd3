"""From measured properties to a shortlist and a preset: what is dropped and why, and in which order the rest is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .measuring import Entry


@dataclass(frozen=True)
class Limits:
    """The largest noise and locality that an activation of the shortlist may have."""

    noise: float = 0.1
    locality: float = 0.5


@dataclass(frozen=True)
class Choice:
    """What came out.

    Attributes:
        dropped: id -> the property that it was dropped by, with its value and the limit, or the rule of its place or
            kind, or its rank where the shortlist was full.
        shortlist: id -> score, best first.
        preset: the best of each grid, coarse to fine: what to try first.
    """

    dropped: Mapping[str, str]
    shortlist: Mapping[str, float]
    preset: Sequence[str]


def choose(
    entries: Sequence[Entry],
    limits: Limits | None = None,
    by_name: Mapping[str, str] | None = None,
    most: int | None = None,
) -> Choice:
    """Drop what is noisy or local, and rank the rest without labels.

    Args:
        entries: what was measured.
        limits: of noise and locality.
        by_name: id -> reason, of what is dropped whatever was measured, such as ``place_filter(...)``.
        most: the length of the shortlist; of more that are left, those with the lowest score are dropped too.

    Raises:
        ValueError: nothing is left; the message says by how much the limits are too strict. Or ``most`` is below 1.
    """
    if most is not None and most < 1:
        raise ValueError(f"a shortlist has at least one activation, not {most}")
    limits = limits or Limits()
    dropped = {e.activation.id: reason for e in entries if (reason := _reason(e, limits, by_name or {})) is not None}
    kept = [e for e in entries if e.activation.id not in dropped]
    if not kept:
        least = min(e.properties.noise for e in entries), min(e.properties.locality for e in entries)
        raise ValueError(
            f"no activation is within the limits noise {limits.noise:g} and locality {limits.locality:g}; "
            f"the least noise is {least[0]:.3f}, the least locality {least[1]:.3f}"
        )
    ranked = _ranked({e.activation.id: score(e) for e in kept})
    shortlist = {id: ranked[id] for id in [*ranked][:most]}
    dropped |= {
        id: f"score: {place} of {len(ranked)}" for place, id in enumerate(ranked, start=1) if id not in shortlist
    }
    return Choice(dropped, shortlist, preset(kept, shortlist))


def score(entry: Entry) -> float:
    """A rank without labels: how fine the signal is, where it is clean, (1 - noise) · frequency / stride, in cycles an
    image pixel. Among activations that are not noisy, finer ones tell more things apart."""
    return (1 - entry.properties.noise) * entry.properties.frequency / entry.stride


def preset(entries: Sequence[Entry], scores: Mapping[str, float]) -> list[str]:
    """The best of each grid that ``scores`` (id -> any score, higher is better) knows, coarse to fine."""
    best: dict[int, str] = {}
    for entry in entries:
        id, stride = entry.activation.id, entry.stride
        if id in scores and (stride not in best or scores[id] > scores[best[stride]]):
            best[stride] = id
    return [best[stride] for stride in sorted(best, reverse=True)]


def granularity(entries: Sequence[Entry]) -> dict[str, int]:
    """Each activation's place in the order of frequency, coarse to fine from 1, among those of its own grid."""
    grids: dict[int, list[Entry]] = {}
    for entry in entries:
        grids.setdefault(entry.stride, []).append(entry)
    return {
        entry.activation.id: place
        for group in grids.values()
        for place, entry in enumerate(sorted(group, key=lambda e: e.properties.frequency), start=1)
    }


def _reason(entry: Entry, limits: Limits, by_name: Mapping[str, str]) -> str | None:
    found = entry.properties
    if entry.activation.id in by_name:
        return by_name[entry.activation.id]
    if found.noise > limits.noise:
        return f"noise: {found.noise:.3f} > {limits.noise:g}"
    if found.locality > limits.locality:
        return f"locality: {found.locality:.3f} > {limits.locality:g}"
    return None


def _ranked(scores: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(scores.items(), key=lambda item: -item[1]))
