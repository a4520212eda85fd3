"""The vocabulary: what can be captured in a denoiser, and how a user says what to capture.

Ids follow the grammar of "Not All Diffusion Model Activations Have Been Evaluated as Discriminative Features"
(arXiv 2410.03558): ``<stage>[-level<L>][-repeat<R>]-<module>...``, all indices 0-based in forward order.
No hook is set here and no tensor is touched.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias

import torch
import yaml
from torch import Tensor

ANY = "any-transformer"
"""The file of presets for every transformer."""
DEPTH = re.compile(r"vit-block@(0?\.\d+)-(.+)")
Kind: TypeAlias = Literal["spatial", "text", "map", "module"]
Tap: TypeAlias = Literal["input", "output", "attention", "composed"]
Spec: TypeAlias = "str | os.PathLike[str] | Activation | Mapping[str, bool] | Sequence[str | Activation]"


@dataclass(frozen=True)
class Activation:
    """One tensor inside a denoiser.

    Attributes:
        id: its name in the papers' grammar, such as ``up-level1-repeat1-vit-block0-cross-q``.
        kind: decides the captured shape. ``spatial``: (B, channels, h, w). ``text``: (B, tokens, channels).
            ``map``: (B, heads, queries, keys), softmax probabilities. ``module``: as a module returns it, of a denoiser
            that has no family.
        module: dotted path of the hooked module inside the denoiser.
        tap: which of its tensors: its first ``input``, its ``output``, or the probabilities of its ``attention``; or
            ``composed``, of none: see ``COMPOSED``.
        channels: channels of a spatial or text activation; number of query heads of a map.
        stride: side of one feature cell in denoiser cells (latent pixels); ``None`` for text.
        layout: dotted path of the module whose call tells where tokens stand; ``None`` if the tensor is (B, C, h, w).
        joint: text and image tokens stand in one sequence; what the id names is a part of the tensor.
        index: which output of a module that returns several.
        start: its first channel, where the module's tensor has several activations side by side.
        whole: dotted path of the module whose end completes the tensor, where the tapped one may run in several chunks.
    """

    id: str
    kind: Kind
    module: str
    tap: Tap
    channels: int
    stride: int | None
    layout: str | None = None
    whole: str | None = None
    joint: bool = False
    index: int = 0
    start: int | None = None

    @property
    def role(self) -> str:
        """What the tensor is, without its place: ``res-out``, ``self-q``, ``cross-map``, ``ffn-inner`` ..."""
        parts = self.id.split("-")
        return "-".join(parts[-2:]) if len(parts) > 1 else self.id


COMPOSED = (
    Activation("attn", "spatial", "", "composed", 0, None),
    Activation("vae-out", "spatial", "", "composed", 3, None),
)
"""What is no tensor of the denoiser, but made by ``FeatureExtractor`` of several: see ``composed``. Globs leave it out,
and ``list_activations`` does not list it."""


class Layout(NamedTuple):
    """Where tokens stand in one call of a denoiser: ``grid`` (h, w) of the image tokens, row-major; and, where text and
    image tokens share one sequence, the positions of either.

    Positions are a slice, the same for the whole batch, or an index (B, n) where each sample has its own. In it, -1
    stands for the tokens that a shorter text lacks; what is captured of them is zero.
    """

    grid: tuple[int, int]
    image: slice | Tensor = slice(None)
    text: slice | Tensor = slice(None)


def spans(starts: Sequence[int], lengths: Sequence[int]) -> slice | Tensor:
    """Positions for a ``Layout``, from one start and length a sample: a slice if all are the same, else an index
    (B, longest) with -1 after the shorter ones."""
    if len(set(zip(starts, lengths, strict=True))) == 1:
        return slice(starts[0], starts[0] + lengths[0])
    steps = torch.arange(max(lengths))
    return (torch.tensor(starts)[:, None] + steps).masked_fill(steps >= torch.tensor(lengths)[:, None], -1)


class UnknownActivation(ValueError):
    """An id, glob or preset that names nothing in this denoiser; the message lists the nearest that exist."""


def is_glob(text: str) -> bool:
    return any(c in text for c in "*?[")


def match(pattern: str, available: Iterable[Activation]) -> list[Activation]:
    """Activations whose id matches a glob, in forward order.

    Maps are large, so a glob selects one only if its own last component says so: ``mid-vit-*`` leaves them out,
    ``mid-vit-*-map`` does not.
    """
    wants_maps = "map" in pattern.rsplit("-", 1)[-1]
    found = [a for a in available if fnmatch.fnmatchcase(a.id, pattern) and a.tap != "composed"]
    return [a for a in found if a.kind != "map" or wants_maps]


def select(
    available: Sequence[Activation], spec: Spec, presets: Mapping[str, Sequence[str]] | None = None
) -> list[Activation]:
    """What a user asked for, as activations in forward order, each once.

    Args:
        available: everything the denoiser has, in forward order.
        spec: an id, an ``Activation``, a glob, the name of a preset, the path of a JSON or YAML file with any of these,
            a list of them, or an id→bool mapping as the papers' configurations have it.
        presets: name → list of ids and globs.

    Raises:
        UnknownActivation: a part of ``spec`` names nothing; the message has the nearest names.
        ValueError: nothing is asked for.
    """
    wanted = {a.id for name in names(spec) for a in _resolve(name, available, presets or {})}
    if not wanted:
        raise ValueError("no activation is asked for: give an id, a glob, a preset, a file or a list of these")
    return [a for a in available if a.id in wanted]


def names(spec: Spec, inside: tuple[str, ...] = ()) -> list[str]:
    """The ids, globs and presets that a spec names, with those in its files in the place of the files.

    A file that is named in a file is looked for beside it first, then in the working folder.

    Args:
        inside: the files that are being read.
    """
    found = []
    for part in _parts(spec):
        if Path(part).suffix.lower() not in {".json", ".yaml", ".yml"}:
            found.append(part)
            continue
        beside = Path(inside[-1]).parent / part if inside else Path(part)
        file = os.path.normpath(beside if beside.is_file() else part)
        if file in inside:
            raise ValueError(f"activation file {file} names itself")
        found += names(_read(Path(file)), (*inside, file))
    return found


def _parts(spec: Spec) -> list[str]:
    if isinstance(spec, Activation):
        return [spec.id]
    if isinstance(spec, os.PathLike):
        return [os.fspath(spec)]
    if isinstance(spec, str):
        return [spec]
    if isinstance(spec, Mapping):
        return [name for name, wanted in spec.items() if wanted]
    return [part for item in spec for part in _parts(item)]


def _resolve(name: str, available: Sequence[Activation], presets: Mapping[str, Sequence[str]]) -> list[Activation]:
    by_id = {a.id: a for a in available}
    if name in by_id:
        return [by_id[name]]
    if name in presets:
        return [a for part in presets[name] for a in _resolve(part, available, presets)]
    if is_glob(name) and (found := match(name, available)):
        return found
    _unknown(name, by_id, presets)


def _read(path: Path) -> Spec:
    if not path.is_file():
        raise FileNotFoundError(f"there is no activation file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is neither JSON nor YAML: {error}") from error
    named = isinstance(content, Mapping) and all(isinstance(k, str) and isinstance(v, bool) for k, v in content.items())
    listed = isinstance(content, list) and all(isinstance(v, str) for v in content)
    if not (named or listed):
        raise ValueError(f"{path} must hold a list of ids or globs, or a mapping from id to true or false")
    return content


def _unknown(name: str, by_id: Mapping[str, Activation], presets: Mapping[str, Sequence[str]]) -> NoReturn:
    if name in {a.id for a in COMPOSED}:
        raise UnknownActivation(f"{name!r} is no tensor of a denoiser: FeatureExtractor makes it of several")
    if is_glob(name):
        left_out = [a for a in by_id.values() if fnmatch.fnmatchcase(a.id, name)]
        if any(a.tap == "composed" for a in left_out):
            raise UnknownActivation(f"{name!r} matches only {left_out[-1].id}, which no glob takes; ask for it by name")
        if left_out:
            raise UnknownActivation(f"{name!r} matches only attention maps; ask for them by a glob ending in 'map'")
        literal = name.translate(str.maketrans("", "", "*?[]"))
        near = difflib.get_close_matches(literal, by_id, n=3, cutoff=0)
        raise UnknownActivation(f"no activation matches {name!r}; the nearest ids are {_listed(near)}")
    near = difflib.get_close_matches(name, [*by_id, *presets], n=4, cutoff=0.4)
    text = f"there is no activation {name!r} in this model"
    text += f"; did you mean {_listed(near)}?" if near else ""
    text += f" Presets for it: {_listed(presets)}." if presets else " It has no presets."
    raise UnknownActivation(text)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def presets(model: str | None, available: Iterable[Activation] = ()) -> dict[str, list[str]]:
    """Name → ids of the presets of a model; empty where it has none.

    Args:
        model: a key such as ``sd15``, ``sdxl`` or ``pgv2``.
        available: what the denoiser has. Of a transformer, it adds the presets of any transformer, whose blocks are
            chosen by their depth.
    """
    ids = [a.id for a in available]
    for_all = {name: [id for part in parts for id in _at_depth(part, ids)] for name, parts in _stored(ANY).items()}
    return {name: found for name, found in for_all.items() if found} | _stored(model)


def preset_timesteps(model: str | None, names: Iterable[str]) -> dict[str, int]:
    """Preset → the timestep that it was chosen at, of those ``names`` that have one."""
    files = (_preset_file(ANY), _preset_file(model))
    return {name: preset["t"] for file in files for name, preset in file.items() if name in names and "t" in preset}


def _stored(model: str | None) -> dict[str, list[str]]:
    return {name: preset["activations"] for name, preset in _preset_file(model).items()}


def _preset_file(model: str | None) -> dict[str, Any]:
    file = preset_folder() / f"{model}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _at_depth(part: str, ids: Sequence[str]) -> list[str]:
    """``vit-block@0.4-out`` → the output of the block at 0.4 of the way from the first to the last; nothing without."""
    share, kind = DEPTH.fullmatch(part).groups()  # type: ignore[union-attr]
    blocks = [id for id in ids if re.fullmatch(rf"vit-block\d+-{kind}", id)]
    return [blocks[round(float(share) * (len(blocks) - 1))]] if blocks else []


def preset_folder() -> Path:
    """Where the preset files are: inside an installed package, or ``configs/activations`` of a checkout."""
    package = Path(str(resources.files("diffusion_features")))
    installed = package / "presets"
    return installed if installed.is_dir() else package.parent / "configs" / "activations"
