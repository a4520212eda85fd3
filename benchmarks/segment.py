"""What each part of the training-free segmentor is worth, and what it costs.

    python benchmarks/segment.py [--split validation] [--scenes N] [--t T ...] [--json FILE]
    python benchmarks/segment.py --cost sd15|pixart|tiny|tiny-pixart [--repeats N] [--json FILE]

Quality: drawn scenes, each prompted with its own classes (protocol image-classes). All rows of the table read the same
runs of the model. Intervals are over images (percentile bootstrap, 95%); differences are paired: both rows are drawn
with the same images. Choose settings on the validation split; run test and held-out once.

Cost: random weights at the size the model was trained for, each way in a fresh process: a bare forward, all maps of the
segmentor streamed, and a straightforward program that stores every map and then computes the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from measure import cost, in_fresh_process, machine, peak_mib, spread, table
from torch import Tensor

from diffusion_features import FeatureExtractor, capture, list_activations
from diffusion_features.activations import select
from diffusion_features.embedded import Scene, label
from diffusion_features.embedded.dataset import SPLITS, scenes
from diffusion_features.images import as_tensor
from segmentors import Method, Preset, TrainingFreeSegmentor
from segmentors.evaluation import count, resampled, scores
from segmentors.training_free import PLAIN
from segmentors.training_free.aggregation import Aggregator, output_projection
from segmentors.training_free.labelling import labelled
from segmentors.training_free.presets import PRESETS
from segmentors.training_free.refinement import refine
from segmentors.training_free.rescaling import stretched

FULL = Method()
CLASSES = 18


class Row(NamedTuple):
    """A row of the table: a method, how often it refines, and by which layers; the preset's if not said."""

    name: str
    method: Method
    k: int | None = None
    refiners: tuple[str, ...] = ()


def _grid() -> list[Row]:
    """The method's three parts, each on or off, refined as often as the preset says."""
    return [
        Row(
            f"heads {h}, layers {la}, rescale {r}",
            replace(FULL, heads="dot" if h == "on" else "average", layers="dot" if la == "on" else "equal",
                    rescale="sum" if r == "on" else "none"),
        )
        for h in ("off", "on") for la in ("off", "on") for r in ("off", "on")
    ]  # fmt: skip


def _level(level: int) -> tuple[str, ...]:
    return tuple(f"up-level{level}-repeat{repeat}-vit-block0-self-map" for repeat in range(3))


ROWS = [
    *_grid(),
    *(Row(f"full, heads {h}", replace(FULL, heads=h)) for h in ("dot-clamped", "cosine", "l2", "dot-spectral")),
    *(Row(f"full, layers {la}", replace(FULL, layers=la)) for la in ("mse", "iou")),
    Row("full, layers not renormalised", replace(FULL, renormalise=False)),
    Row("full, layers as released", replace(FULL, as_released=True)),
    *(Row(f"full, rescale {r}", replace(FULL, rescale=r)) for r in ("max", "sum-raw", "sum-raw-again")),
    Row("all off, refined 0 times", PLAIN, 0),
    *(Row(f"full, refined {k} times", FULL, k) for k in (0, 1, 3)),
    *(Row(f"full, refined by up-level{level}, {k} times", FULL, k, _level(level)) for level in (1, 2) for k in (1, 2)),
    Row("full, edges by PAMR", replace(FULL, edges="pamr")),
    *([Row("full, edges by a CRF", replace(FULL, edges="crf"))] if find_spec("pydensecrf") else []),
]
VANILLA, BEST = ROWS[0].name, ROWS[7].name


def counted(segmentor: TrainingFreeSegmentor, scene: Scene, rows: Sequence[Row], seed: int) -> Tensor:
    """(rows, 5, classes) of one scene."""
    size = (scene.image.height, scene.image.width)
    wanted = segmentor.wanted(scene.classes)
    pixels = as_tensor(scene.image)[0]
    seen = [replace(row.method, rescale="sum", edges="none") for row in rows]  # what the runs of the model depend on
    apart = list(dict.fromkeys(seen))
    kept = tuple(dict.fromkeys([*segmentor.preset.refiners, *(id for row in rows for id in row.refiners)]))
    every = TrainingFreeSegmentor(segmentor.fx, replace(segmentor.preset, refiners=kept))
    runs = every.collect([scene.image], [one.prompt for one in wanted.told], size, seed, apart)
    truth = torch.from_numpy(scene.semantic).long()
    names = torch.tensor([label(name) for name in scene.classes])
    found = []
    for row, method in zip(rows, seen, strict=True):
        run = runs[apart.index(method)]
        maps = segmentor.maps(run, wanted, row.method.rescale)
        k = segmentor.preset.k if row.k is None else row.k
        if k:
            layers = [run[0].refiners[id] for id in row.refiners or segmentor.preset.refiners]
            maps = stretched(refine(maps, layers, k)[0])[None]
        labels, _ = labelled(maps[0], size, False, row.method, pixels)
        found.append(count(names[labels], truth, CLASSES))
    return torch.stack(found)


def finest(fx: FeatureExtractor) -> int:
    """Cells across a square image in the finest cross-attention, at the size that the model was trained for."""
    side: int = fx.denoiser.config.sample_size
    return side // min(a.stride or 1 for a in fx.available if a.id.endswith("-cross-map"))


def ceiling(scene: Scene, grid: int) -> Tensor:
    """(5, classes) of the truth itself, reduced to ``grid`` cells across by majority and brought back as maps are."""
    truth = torch.from_numpy(scene.semantic).long()
    masks = F.one_hot(truth, CLASSES).permute(2, 0, 1).float()[None]
    cells = F.interpolate(masks, (grid, grid), mode="area").argmax(1)
    small = F.one_hot(cells, CLASSES).permute(0, 3, 1, 2).float()
    return count(F.interpolate(small, truth.shape, mode="bilinear")[0].argmax(0), truth, CLASSES)


def difference(one: Tensor, other: Tensor) -> dict[str, Any]:
    """Mean IoU of counts (N, 5, K) minus that of others on the same images, with its 95% interval."""
    low, high = (resampled(one) - resampled(other)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"difference": scores(one)["miou"] - scores(other)["miou"], "interval": [low, high]}


def quality(segmentor: TrainingFreeSegmentor, drawn: Sequence[Scene]) -> dict[str, Any]:
    """Every row of the table on some scenes."""
    there = {a.id for a in segmentor.fx.available}
    rows = [row for row in ROWS if there.issuperset(row.refiners)]
    counts = torch.stack([counted(segmentor, scene, rows, seed) for seed, scene in enumerate(drawn)], dim=1)
    named = {row.name: one for row, one in zip(rows, counts, strict=True)}
    result: dict[str, Any] = {}
    for name, one in named.items():
        figures = scores(one)
        figures.pop("iou")
        result[name] = {**figures, "over_vanilla": difference(one, named[VANILLA]),
                        "under_full": difference(named[BEST], one)}  # fmt: skip
    grid = finest(segmentor.fx)
    top = scores(torch.stack([ceiling(scene, grid) for scene in drawn]))
    highest = {key: top[key] for key in ("miou", "accuracy", "boundary_iou")}
    return {"rows": result, "ceiling": {"grid": grid, **highest}}


def show_quality(result: dict[str, Any]) -> str:
    def shown(found: dict[str, Any]) -> str:
        low, high = found["interval"]
        return f"{found['difference']:+.3f} ({low:+.3f} to {high:+.3f})"

    rows = [
        [name, f"{one['miou']:.3f}", f"{one['miou_interval'][0]:.3f} to {one['miou_interval'][1]:.3f}",
         shown(one["over_vanilla"]), shown(one["under_full"]), f"{one['boundary_iou']:.3f}"]
        for name, one in result["rows"].items()
    ]  # fmt: skip
    top = result["ceiling"]
    name = "ceiling of the {grid}x{grid} grid".format(**top)
    rows.append([name, f"{top['miou']:.3f}", "", "", "", f"{top['boundary_iou']:.3f}"])
    return table(["", "mean IoU", "95% interval", "over all off", "all on, over it", "boundary IoU"], rows)


# ---- cost -----------------------------------------------------------------------------------------------------------


def _unet(model: str) -> tuple[Any, Callable[[], Tensor], Preset, int]:
    from extract import Subject as Bare

    bare = Bare(model)
    return bare.unet, bare, PRESETS["sd15"], bare.unet.config.sample_size


def _pixart(**size: int) -> tuple[Any, Callable[[], Tensor], Preset, int]:
    """512 x 512 pixels, 120 text tokens."""
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(sample_size=64, **size).eval().requires_grad_(False)
    latents, text = torch.randn(1, 4, 64, 64), torch.randn(1, 120, model.config.caption_channels)

    def run() -> Tensor:
        told = {"resolution": None, "aspect_ratio": None}
        with torch.no_grad():
            return model(latents, text, torch.tensor([50]), added_cond_kwargs=told, return_dict=False)[0]

    return model, run, PRESETS["pixart"], 64 // model.config.patch_size


MODELS: dict[str, Callable[[], tuple[Any, Callable[[], Tensor], Preset, int]]] = {
    "sd15": partial(_unet, "sd15"),
    "pixart": partial(_pixart, caption_channels=4096),
    "tiny": partial(_unet, "tiny"),
    "tiny-pixart": partial(
        _pixart, caption_channels=32, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32
    ),
}
"""Name → denoiser, a forward of it, the preset, and cells along a side of its finest maps."""


class Subject:
    """A denoiser of random weights, its inputs, and 12 class maps to refine."""

    def __init__(self, model: str) -> None:
        self.denoiser, self.run, self.preset, side = MODELS[model]()
        self.grid = (side, side)
        self.maps = torch.rand(1, 12, side, side, generator=torch.Generator().manual_seed(0))

    def bare(self) -> Tensor:
        return self.run()

    def streamed(self) -> Tensor:
        """Aggregated and refined as the segmentor does it."""
        cross = select(list_activations(self.denoiser), list(self.preset.cross))
        reader = Aggregator(
            {a.id: output_projection(self.denoiser, a) for a in cross},
            self.preset.reference,
            self.preset.refiners,
            self.grid,
        )
        with torch.no_grad(), capture(self.denoiser, reader.wanted, stop_early=True, reduce=reader):
            self.run()
        return refine(self.maps, list(reader.refiners.values()), self.preset.k) + reader.tokens().mean()

    def stored(self) -> Tensor:
        """Every map kept, head outputs written out, then the same equations."""
        outs: dict[str, Any] = {}
        found = {a.id: a for a in list_activations(self.denoiser)}
        cross = [id for id in found if id.endswith("cross-map")]
        hooks = []
        for id in cross:
            out = self.denoiser.get_submodule(found[id].module).to_out[0]
            keep = partial(lambda id, m, x: outs.update({id: (x[0], m.weight)}), id)
            hooks.append(out.register_forward_pre_hook(keep))
        with torch.no_grad(), capture(self.denoiser, ["*-cross-map", "*-self-map", self.preset.reference]) as maps:
            self.run()
        for hook in hooks:
            hook.remove()
        return _naive(maps, outs, self.preset.reference, self.preset.refiners, self.grid, self.maps, self.preset.k)


@torch.no_grad()
def _naive(
    maps: dict[str, Tensor], outs: dict[str, Any], reference: str, refiners: Sequence[str], grid: tuple[int, int],
    classes: Tensor, k: int,
) -> Tensor:  # fmt: skip
    feature = maps[reference][0].flatten(1)
    affinity = (feature.T @ feature / feature.shape[0] ** 0.5).softmax(-1)
    size = maps[reference].shape[-2:]
    layers, weights = [], []
    for id, (out, weight) in outs.items():
        heads = maps[id].shape[1]
        each = torch.einsum("nhd,chd->hnc", out[0].unflatten(-1, (heads, -1)), weight.unflatten(1, (heads, -1)))
        share = (each * each.sum(0)).sum(-1)
        mean = ((share / share.sum(0))[..., None] * maps[id][0]).sum(0)
        side = (round(mean.shape[0] ** 0.5),) * 2
        own = _resized(maps[id.replace("cross-map", "self-map")][0].mean(0), side, size)
        weights.append((affinity * own / own.sum(-1, keepdim=True)).sum())
        layers.append(F.interpolate(mean.T.reshape(1, -1, *side), grid, mode="bilinear")[0])
    total = sum(w * layer for w, layer in zip(weights, layers, strict=True))
    tokens = total.clamp(min=0)  # type: ignore[union-attr]
    tokens = tokens / tokens.sum(0)
    s = torch.stack([maps[id][0].mean(0) for id in refiners]).mean(0)
    spread_maps = classes[0].flatten(1).T
    for _ in range(k):
        spread_maps = s @ spread_maps
    return spread_maps.T.unflatten(1, grid)[None] + tokens.mean()


def _resized(whole: Tensor, side: tuple[int, int], size: Sequence[int]) -> Tensor:
    rows = F.interpolate(whole.view(1, -1, *side), tuple(size), mode="bilinear")[0].flatten(1)
    return F.interpolate(rows.T.reshape(1, -1, *side), tuple(size), mode="nearest")[0].flatten(1).T


WAYS = ("bare", "streamed", "stored")


def peak_of(model: str, way: str) -> float:
    subject = Subject(model)
    subject.bare()
    return peak_mib(getattr(subject, way))


def costs(model: str, repeats: int) -> dict[str, Any]:
    """Seconds as ratios to bare forwards in turn, and peak memory of each way."""
    subject = Subject(model)
    assert torch.allclose(subject.streamed(), subject.stored(), atol=1e-4), "the two programs differ"
    seconds = {way: [] for way in WAYS}  # type: ignore[var-annotated]
    for _ in range(repeats):
        for way in WAYS:
            seconds[way].append(cost(getattr(subject, way)).wall)
    ratios = {
        way: spread(s / b for s, b in zip(seconds[way], seconds["bare"], strict=True)) for way in ("streamed", "stored")
    }
    return {"ratios": ratios, "peak_mib": {way: in_fresh_process(peak_of, model, way) for way in WAYS}}


def show_costs(result: dict[str, Any]) -> str:
    bare = result["peak_mib"]["bare"]
    rows = [
        [way, "1.00x" if way == "bare" else "{median:.2f}x ({min:.2f}-{max:.2f})".format(**result["ratios"][way]),
         f"{result['peak_mib'][way]:.0f} MiB", f"{result['peak_mib'][way] / bare:.2f}x"]
        for way in WAYS
    ]  # fmt: skip
    return table(["", "time to bare", "peak memory", "to bare"], rows)


def main() -> None:
    """Print a table and, asked to, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="a pipeline that knows the drawn world (default: embedded)")
    parser.add_argument("--split", choices=list(SPLITS), nargs="+", default=["validation"])
    parser.add_argument("--scenes", type=int, default=64, help="of each split (default: %(default)s)")
    parser.add_argument("--t", type=int, nargs="+", help="timesteps (default: the preset's)")
    parser.add_argument("--cost", choices=[*MODELS], help="measure time and memory instead")
    parser.add_argument("--repeats", type=int, default=3, help="of the times (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine()}
    if options.cost:
        result["cost"] = {options.cost: costs(options.cost, options.repeats)}
        print(show_costs(result["cost"][options.cost]))
    else:
        result["quality"] = {}
        segmentor = TrainingFreeSegmentor(FeatureExtractor.from_pretrained(options.model, "*"))
        for split in options.split:
            drawn = list(scenes(split, options.scenes))
            for t in options.t or [segmentor.preset.t]:
                segmentor.preset = replace(segmentor.preset, t=t)
                found = result["quality"][f"{split}, t={t}"] = quality(segmentor, drawn)
                print(f"\n{split}, {len(drawn)} scenes, t={t}\n\n{show_quality(found)}", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
