"""What capturing costs in every family of transformers, as ratios to bare forwards of the same denoiser.

    python benchmarks/families.py [--size tiny|full] [--family NAME ...] [--pairs N] [--json FILE]

tiny: the random-weight pipelines of the tests, all families, at 256 x 256 pixels: what the hooks cost where the model
costs next to nothing. full: random weights with the layers of PixArt-Σ (0.6 billion parameters) and Stable Diffusion 3
medium (2 billion) at 512 x 512 pixels in float32, which takes 16 GB and minutes.

Time: a bare forward, for one block's output stopped there by a hook that raises, is run right before or after the
capture, in turn, and the ratio is taken pair by pair. Memory: in a fresh process a row, the peak of the capture
minus the peak of the same bare forward, minus the bytes of what was captured. There are no limits here: those of
``extract.py`` hold for a UNet of full size.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
from measure import in_fresh_process, machine, pair, peak_mib, spread, table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diffusion_features import capture, list_activations
from diffusion_features.activations import Activation, select
from diffusion_features.families import family_of
from tests.tiny_dits import PIPELINES, build

PAIRS = {"tiny": 20, "full": 3}
PIXELS = {"tiny": 256, "full": 512}
ROWS = {"one block's output": "", "all block outputs": "vit-block*[0-9]-out", "all maps, head mean": "*-map"}
"""Name → glob; the first is the output of the middle block, and the only one behind which the forward stops."""


# ---- the models -----------------------------------------------------------------------------------------------------


def pixart() -> tuple[nn.Module, Any]:
    transformer = PixArtTransformer2DModel(caption_channels=4096, sample_size=64)
    return transformer, lambda conditions: conditions(torch.randn(300, 4096), torch.ones(300))


def sd3() -> tuple[nn.Module, Any]:
    transformer = SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192, sample_size=128
    )
    return transformer, lambda conditions: conditions(torch.randn(333, 4096), torch.randn(2048))


FULL: dict[str, Callable[[], tuple[nn.Module, Any]]] = {"pixart_sigma": pixart, "sd3": sd3}


@dataclass
class Subject:
    """A denoiser, and one call of it."""

    transformer: Any
    call: Callable[[], Tensor]

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.call()

    def chosen(self, row: str) -> list[Activation]:
        available = list_activations(self.transformer)
        if ROWS[row]:
            return select(available, ROWS[row])
        outputs = select(available, ROWS["all block outputs"])
        return [outputs[len(outputs) // 2]]


def subject(name: str, size: str) -> Subject:
    torch.manual_seed(0)
    if size == "tiny":
        pipe = build(name)
        family = family_of(pipe.transformer)
        conditions = family.encode_prompts(pipe, ["a photo of a cat"])
        latents = family.encode_images(pipe, torch.rand(1, 3, PIXELS[size], PIXELS[size]) * 2 - 1, None)
    else:
        transformer, conditioned = FULL[name]()
        pipe = SimpleNamespace(transformer=transformer.eval().requires_grad_(False), vae_scale_factor=8)
        family = family_of(transformer)
        conditions = [conditioned(family.Conditions)]
        latents = torch.randn(1, transformer.config.in_channels, PIXELS[size] // 8, PIXELS[size] // 8)
    side = (PIXELS[size], PIXELS[size])
    return Subject(pipe.transformer, partial(family.denoise, pipe, latents, 300, conditions, side))


# ---- the two ways to run one ----------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def bare(subject: Subject, row: str, chosen: list[Activation]) -> None:
    if ROWS[row]:
        subject()
        return

    def stop(*_: Any) -> None:
        raise Stop

    handle = subject.transformer.get_submodule(chosen[0].module).register_forward_hook(stop)
    try:
        subject()
    except Stop:
        pass
    finally:
        handle.remove()


def captured(subject: Subject, row: str, chosen: list[Activation]) -> dict[str, Tensor]:
    with capture(subject.transformer, chosen, stop_early=not ROWS[row], heads="mean") as features:
        subject()
    return features


# ---- figures --------------------------------------------------------------------------------------------------------


def times(name: str, size: str, pairs: int) -> dict[str, dict[str, float]]:
    """Row → ratio of wall time, and the seconds of a bare forward."""
    model = subject(name, size)
    found: dict[str, dict[str, float]] = {}
    for row in ROWS:
        chosen = model.chosen(row)
        without, with_capture = partial(bare, model, row, chosen), partial(captured, model, row, chosen)
        without(), with_capture()
        costs = [pair(without, with_capture, swap=i % 2 == 1) for i in range(pairs)]
        found[row] = spread(b.wall / a.wall for a, b in costs)
        found[row]["bare_seconds"] = spread(a.wall for a, _ in costs)["median"]
    return found


def memory(name: str, size: str, row: str) -> dict[str, float]:
    """MiB of the peak of a bare forward, of what was captured, and of what the capture took beyond both."""
    model = subject(name, size)
    chosen = model.chosen(row)
    bare(model, row, chosen)  # whatever is allocated once
    bare_peak = peak_mib(partial(bare, model, row, chosen))
    kept: list[Tensor] = []
    peak = peak_mib(lambda: kept.extend(captured(model, row, chosen).values()))
    size_of = sum(t.nbytes for t in kept) / 2**20
    return {"bare": bare_peak, "captured": size_of, "excess": peak - bare_peak - size_of}


def report(found: dict[str, Any]) -> str:
    head = ["family: row", "time to bare", "bare forward", "bare peak", "captured", "excess"]
    rows = []
    for name, figures in found.items():
        for row, time in figures["time"].items():
            mib = figures["memory"][row]
            ratio = f"{time['median']:.2f}x ({time['min']:.2f}–{time['max']:.2f})"
            sizes = [f"{mib[key]:.1f} MiB" for key in ("bare", "captured", "excess")]
            rows.append([f"{name}: {row}", ratio, f"{time['bare_seconds'] * 1000:.1f} ms", *sizes])
    return table(head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(PAIRS), default="tiny", help="default: %(default)s")
    parser.add_argument("--family", action="append", choices=list(PIPELINES), help="repeatable; default: all there are")
    parser.add_argument("--pairs", type=int, metavar="N", help=f"timed pairs a row; by default {PAIRS}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    offered = list(PIPELINES if args.size == "tiny" else FULL)
    names = args.family or offered
    if wrong := [name for name in names if name not in offered]:
        parser.error(f"{wrong[0]} has no configuration of size {args.size}; there are {', '.join(offered)}")
    found = {}
    for name in names:
        mib = {row: in_fresh_process(memory, name, args.size, row) for row in ROWS}
        found[name] = {"memory": mib, "time": times(name, args.size, args.pairs or PAIRS[args.size])}
        print(f"{name} done", file=sys.stderr)
    versions = machine()
    print(f"{args.size}; " + ", ".join(f"{key} {value}" for key, value in versions.items()), end="\n\n")
    print(report(found))
    if args.json:
        args.json.write_text(json.dumps({"size": args.size, "machine": versions, "families": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
