"""What semantic-aware guidance (S-CFG) does to pictures of the embedded model, beside ordinary guidance.

    python benchmarks/guidance.py [--images N] [--scale S ...] [--steps N] [--json FILE]

Both draw the same prompts from the same noise. A small classifier, trained here on renderings alone, says whether the
object and the colour that were asked for are there. Differences are paired, with a 95% interval over images (percentile
bootstrap). The classifier's own accuracy on renderings that it did not see stands below, as what could be reached.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import classifier
import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from measure import cost, machine, table
from PIL import Image
from torch import Tensor, nn

from diffusion_features.embedded import COLOURS, OBJECTS, TEST_SEED, path
from segmentors.training_free import PRESETS
from segmentors.training_free.guidance import generate

WAYS: dict[str, Callable[..., Any]] = {
    "CFG": lambda pipe, prompts, **options: pipe(prompts, **options),
    "S-CFG": lambda pipe, prompts, **options: generate(pipe, prompts, preset=PRESETS["embedded"], **options),
}
ASKED = ("object", "colour", "both")
TOGETHER = 8


def prompts_and_truth(count: int) -> tuple[list[str], Tensor, Tensor]:
    """Prompts through all pairs of object and colour in a fixed random order, and the numbers of both."""
    pairs = [(name, colour) for name in OBJECTS for colour in COLOURS]
    order = np.random.default_rng(0).permutation(len(pairs))
    chosen = [pairs[order[i % len(pairs)]] for i in range(count)]
    prompts = [f"a picture of a {colour} {name} on green grass under a blue sky" for name, colour in chosen]
    names = torch.tensor([OBJECTS.index(name) for name, _ in chosen])
    colours = torch.tensor([list(COLOURS).index(colour) for _, colour in chosen])
    return prompts, names, colours


def drawn(way: str, pipe: Any, prompts: Sequence[str], scale: float, steps: int) -> list[Image.Image]:
    """A picture a prompt, picture i from the noise of seed i."""
    images = []
    for first in range(0, len(prompts), TOGETHER):
        told = list(prompts[first : first + TOGETHER])
        seeds = [torch.Generator().manual_seed(first + i) for i in range(len(told))]
        images += WAYS[way](pipe, told, guidance_scale=scale, num_inference_steps=steps, generator=seeds).images
    return images


@torch.no_grad()
def right(judge: nn.Module, images: Sequence[Image.Image], names: Tensor, colours: Tensor) -> Tensor:
    """Whether object, colour and both are recognised in each image: float64 (3, N)."""
    logits = judge(classifier.pixels(images))
    name = logits[:, : len(OBJECTS)].argmax(1) == names
    colour = logits[:, len(OBJECTS) :].argmax(1) == colours
    return torch.stack([name, colour, name & colour]).double()


def interval(values: Tensor) -> list[float]:
    """95% of the means of values (N,) that are drawn anew with replacement."""
    rows = torch.randint(len(values), (1000, len(values)), generator=torch.Generator().manual_seed(0))
    return values[rows].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()


def measured(pipe: Any, judge: nn.Module, count: int, scale: float, steps: int) -> dict[str, Any]:
    """Shares of what is recognised under both ways, their paired difference, and how much longer S-CFG takes."""
    prompts, names, colours = prompts_and_truth(count)
    found, seconds = {}, {}
    for way in WAYS:
        images: list[Image.Image] = []
        seconds[way] = cost(lambda way=way, images=images: images.extend(drawn(way, pipe, prompts, scale, steps))).wall
        found[way] = right(judge, images, names, colours)
    shares = {way: dict(zip(ASKED, each.mean(1).tolist(), strict=True)) for way, each in found.items()}
    gained = found["S-CFG"] - found["CFG"]
    differences = {
        what: {"difference": row.mean().item(), "interval": interval(row)}
        for what, row in zip(ASKED, gained, strict=True)
    }
    return {**shares, "S-CFG over CFG": differences, "time": seconds["S-CFG"] / seconds["CFG"]}


def shown(found: dict[str, Any]) -> str:
    def gain(what: str) -> str:
        one = found["S-CFG over CFG"][what]
        return "{:+.3f} ({:+.3f} to {:+.3f})".format(one["difference"], *one["interval"])

    rows = [[way, *(f"{found[way][what]:.3f}" for what in ASKED)] for way in WAYS]
    rows.append(["S-CFG over CFG", *map(gain, ASKED)])
    return table(["", *ASKED], rows) + f"\n\nS-CFG takes {found['time']:.2f}x the time"


def main() -> None:
    """Print a table and, asked to, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, help="pictures of each way (default: %(default)s)")
    parser.add_argument("--scale", type=float, nargs="+", default=[4.0], help="of guidance (default: 4)")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps (default: %(default)s)")
    parser.add_argument(
        "--renderings", type=int, default=4000, help="the classifier learns from (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(path(), dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    judge = classifier.train(options.renderings)
    real = [scene for scene in map(classifier.single, range(TEST_SEED, TEST_SEED + 400)) if scene.objects]
    seen = right(judge, [scene.image for scene in real], *classifier.targets(real)).mean(1)
    result: dict[str, Any] = {
        "machine": machine(), "images": options.images, "steps": options.steps,
        "renderings": dict(zip(ASKED, seen.tolist(), strict=True)),
    }  # fmt: skip
    for scale in options.scale:
        found = result[f"scale {scale:g}"] = measured(pipe, judge, options.images, scale, options.steps)
        print(f"\n{options.images} pictures, guidance {scale:g}, {options.steps} steps\n\n{shown(found)}", flush=True)
    print("\nof renderings: " + ", ".join(f"{what} {share:.3f}" for what, share in result["renderings"].items()))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
