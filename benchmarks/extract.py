"""What capturing costs, in time and memory, as ratios to bare forwards of the same denoiser in the same run.

    python benchmarks/extract.py [--model sd15|embedded|tiny] [--json FILE] [--pairs N]

Time: a bare forward is stopped by a hook that raises at the module of the row's last activation, and keeps nothing.
It is run right before or after ``capture(..., stop_early=True)`` of the row, in turn, and the ratio of the two is taken
pair by pair. Limit: 1.03x in the median, for activations that the model itself computes. Maps are computed on top, as a
fused attention never makes them, so their time is printed without a limit. Ids are turned into activations once, as a
FeatureExtractor does; a ``capture`` that is given strings walks the module tree each time (printed as well).

Memory: in a fresh process per row, the peak of the capture minus the peak of the same bare forward, minus the bytes of
what was captured. Limit: 5% of the bare peak or 64 MiB, whichever is larger.

Beside them, the approach of the papers' released code: diffusers' explicit softmax in every attention layer, all maps
kept in float16, never stopped. Threads: as PyTorch finds them; OMP_NUM_THREADS changes that.
The exit code is 1 if a limit is broken.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from measure import cost, in_fresh_process, machine, pair, peak_mib, spread, table
from torch import Tensor, nn

from diffusion_features import FeatureExtractor, capture, list_activations
from diffusion_features.activations import Activation, presets, select
from diffusion_features.embedded import path as embedded_path

TIME_LIMIT = 1.03
MEMORY_LIMIT = (0.05, 64.0)  # share of the bare peak, MiB
PAIRS = {"sd15": 5, "embedded": 100, "tiny": 100}
SIZES: dict[str, dict[str, Any]] = {
    "sd15": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "tiny": dict(
        sample_size=32,
        cross_attention_dim=64,
        attention_head_dim=4,
        block_out_channels=(32, 64, 128, 128),
        norm_num_groups=8,
    ),
}


@dataclass(frozen=True)
class Row:
    name: str
    ids: tuple[str, ...]
    heads: Literal["each", "mean"] = "each"
    timed: bool = True  # whether the time limit holds


ROWS = (
    Row("practical", tuple(presets("sd15")["practical"])),
    Row("up-level1", ("up-level1-upsampler-out",)),
    Row("one cross map", ("up-level1-repeat1-vit-block0-cross-map",), timed=False),
    Row("one self-map of the finest level", ("up-level3-repeat0-vit-block0-self-map",), timed=False),
    Row("all cross maps, head mean", ("*-cross-map",), "mean", timed=False),
)


class Subject:
    """A denoiser and the inputs it is run on."""

    def __init__(self, model: str) -> None:
        torch.manual_seed(0)
        self.extractor = FeatureExtractor.from_pretrained("embedded") if model == "embedded" else None
        if self.extractor is not None:
            self.unet: Any = self.extractor.denoiser
        else:
            self.unet = UNet2DConditionModel(**SIZES[model]).eval().requires_grad_(False)
        available = list_activations(self.unet)
        self.resolved = {row.name: select(available, row.ids) for row in ROWS}
        config = self.unet.config
        self.latents = torch.randn(1, config.in_channels, config.sample_size, config.sample_size)
        self.text = torch.randn(1, 77, config.cross_attention_dim)

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.unet(self.latents, 50, encoder_hidden_states=self.text, return_dict=False)[0]

    def chosen(self, row: Row) -> list[Activation]:
        return self.resolved[row.name]


# ---- the three ways to run it ---------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@contextmanager
def stopped_at(unet: nn.Module, activation: Activation) -> Any:
    """The body ends when the activation's module does."""

    def stop(*_: Any) -> None:
        raise Stop

    handle = unet.get_submodule(activation.module).register_forward_hook(stop)
    try:
        yield
    except Stop:
        pass
    finally:
        handle.remove()


def bare(subject: Subject, last: Activation) -> None:
    with stopped_at(subject.unet, last):
        subject()


def captured(subject: Subject, row: Row) -> dict[str, Tensor]:
    with capture(subject.unet, subject.chosen(row), stop_early=True, heads=row.heads) as features:
        subject()
    return features


def released(subject: Subject) -> list[Tensor]:
    """Explicit softmax in every layer, every map kept."""
    maps: list[Tensor] = []

    def keeping(scores: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def get_attention_scores(*args: Any) -> Tensor:
            probabilities = scores(*args)
            maps.append(probabilities.to(torch.float16))
            return probabilities

        return get_attention_scores

    before = subject.unet.attn_processors
    layers = [m for m in subject.unet.modules() if isinstance(m, Attention)]
    subject.unet.set_attn_processor(AttnProcessor())
    for layer in layers:
        layer.get_attention_scores = keeping(layer.get_attention_scores)
    try:
        subject()
    finally:
        for layer in layers:
            del layer.get_attention_scores
        subject.unet.set_attn_processor(before)
    return maps


# ---- time -----------------------------------------------------------------------------------------------------------


def times(subject: Subject, pairs: int) -> dict[str, dict[str, Any]]:
    """Per row, ratios of wall time to the bare forward stopped there and to the full one; ``cpu``: of CPU time."""
    runs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
    for row in ROWS:
        last = subject.chosen(row)[-1]
        runs[row.name] = partial(bare, subject, last), partial(captured, subject, row)
    if subject.extractor is not None:
        runs["practical, FeatureExtractor call"] = by_hand(subject), by_extractor(subject)
    runs["released approach"] = subject, partial(released, subject)
    subject()
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
    full_seconds = []
    for i in range(pairs):
        full = cost(subject)
        full_seconds.append(full.wall)
        for name, (without, with_capture) in runs.items():
            a, b = pair(without, with_capture, swap=i % 2 == 1)
            found[name].append((b.wall / a.wall, b.wall / full.wall, b.cpu / a.cpu))
            print(f"pair {i + 1} of {pairs}: {name} {b.wall / a.wall:.3f}x", file=sys.stderr)
    lookup = spread(cost(partial(list_activations, subject.unet)).wall for _ in range(9))
    result: dict[str, dict[str, Any]] = {"bare forward": {"seconds": spread(full_seconds), "lookup": lookup}}
    for name, ratios in found.items():
        stopped, whole, cpu = zip(*ratios, strict=True)
        result[name] = {"stopped": spread(stopped), "full": spread(whole), "cpu": spread(cpu)}
    return result


def by_extractor(subject: Subject) -> Callable[[], object]:
    """One call of a FeatureExtractor, image to features."""
    assert subject.extractor is not None
    fx, image = subject.extractor, picture(subject)
    return lambda: fx(image, prompt="a photo", t=50, seed=0)


def by_hand(subject: Subject) -> Callable[[], object]:
    """What that call cannot do without: VAE encoder, noise, denoiser up to the same module."""
    assert subject.extractor is not None
    pipe, image, noise = subject.extractor.pipe, picture(subject), torch.randn_like(subject.latents)
    t, last = torch.tensor([50]), subject.chosen(ROWS[0])[-1]

    @torch.no_grad()
    def run() -> None:
        latents = pipe.vae.encode(image).latent_dist.mean * pipe.vae.config.scaling_factor
        with stopped_at(subject.unet, last):
            subject.unet(pipe.scheduler.add_noise(latents, noise, t), t, encoder_hidden_states=subject.text)

    return run


def picture(subject: Subject) -> Tensor:
    assert subject.extractor is not None
    side = subject.unet.config.sample_size * subject.extractor.pipe.vae_scale_factor
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory(model: str, row: Row | None) -> dict[str, float]:
    """Peaks in MiB, in this process, of a row or (None) of the released approach."""
    subject = Subject(model)
    last = subject.chosen(row)[-1] if row else None
    without: Callable[[], object] = subject if last is None else partial(bare, subject, last)
    without()  # whatever is allocated once
    bare_peak = peak_mib(without)
    kept: list[Tensor] = []

    def run() -> None:
        kept.extend(captured(subject, row).values() if row else released(subject))

    peak = peak_mib(run)
    size = sum(t.nbytes for t in kept) / 2**20
    return {"bare": bare_peak, "peak": peak, "captured": size, "excess": peak - bare_peak - size}


def allowed(found: dict[str, float]) -> float:
    share, least = MEMORY_LIMIT
    return max(share * found["bare"], least)


# ---- the report -----------------------------------------------------------------------------------------------------


def verdicts(time: dict[str, Any], mib: dict[str, Any]) -> dict[str, bool]:
    """Whether each limit holds."""
    found = {}
    for row in ROWS:
        if row.timed:
            found[f"{row.name}: time at most {TIME_LIMIT}x the bare forward stopped there"] = (
                time[row.name]["stopped"]["median"] <= TIME_LIMIT
            )
        limit = allowed(mib[row.name])
        found[f"{row.name}: memory beyond what was captured at most {limit:.0f} MiB"] = mib[row.name]["excess"] <= limit
    return found


def report(time: dict[str, Any], mib: dict[str, Any]) -> str:
    def ratio(x: dict[str, float]) -> str:
        return f"{x['median']:.3f}x ({x['min']:.2f}–{x['max']:.2f})"

    head = ["", "to bare, stopped there", "same, CPU time", "to full bare", "bare peak", "captured", "excess"]
    rows = [["bare forward", "", "", "1.000x", "", "", ""]]
    for name, found in time.items():
        if name == "bare forward":
            continue
        m = mib.get(name)
        sizes = [f"{m[k]:.1f} MiB" for k in ("bare", "captured", "excess")] if m else ["", "", ""]
        rows.append([name, ratio(found["stopped"]), ratio(found["cpu"]), ratio(found["full"]), *sizes])
    seconds, lookup = (time["bare forward"][k]["median"] for k in ("seconds", "lookup"))
    medians = f"Medians: a full bare forward {seconds:.3g} s, listing all activations {1000 * lookup:.1f} ms."
    return f"{table(head, rows)}\n\n{medians}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(PAIRS), default="sd15", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--pairs", type=int, metavar="N", help=f"timed pairs a row; by default {PAIRS}")
    args = parser.parse_args()
    if args.model == "embedded" and not (embedded_path() / "model_index.json").is_file():
        print("Skipped: the embedded model is not there (diffusion_features/embedded/sd).")
        return 0
    pairs = args.pairs or PAIRS[args.model]
    mib = {row.name: in_fresh_process(memory, args.model, row) for row in ROWS}
    mib["released approach"] = in_fresh_process(memory, args.model, None)
    time = times(Subject(args.model), pairs)
    limits = verdicts(time, mib)
    versions = machine()
    print(f"{args.model}, {pairs} pairs; " + ", ".join(f"{k} {v}" for k, v in versions.items()), end="\n\n")
    print(report(time, mib), end="\n\n")
    for limit, holds in limits.items():
        print(f"- {'PASS' if holds else 'FAIL'} {limit}")
    if args.json:
        result = {
            "model": args.model,
            "pairs": pairs,
            "machine": versions,
            "time": time,
            "memory": mib,
            "limits": limits,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(limits.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
