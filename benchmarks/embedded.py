"""Measures an embedded pipeline: autoencoder, denoising, generation, and how well cross-attention finds words.

``python benchmarks/embedded.py`` measures the test scenes and, beside them, the held-out ones, whose styles, shapes and
pairs of classes no training saw. Settings are chosen with ``--split validation``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import classifier
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiffusionPipeline
from segment import ceiling, finest

from diffusion_features import FeatureExtractor
from diffusion_features.embedded import BACKGROUNDS, CLASSES, COLOURS, OBJECTS, TEST_SEED, Scene, label, render
from diffusion_features.embedded.dataset import SPLITS, scenes
from diffusion_features.loading import load_pipeline
from diffusion_features.suppression.shift import roc_area
from segmentors.evaluation import count, scores
from segmentors.training_free.words import find_phrases, token_positions

GRID = 32
LEVELS = (100, 300, 500, 700, 900)
#: What the pipeline of the transformer is told: otherwise it draws 256 pixels and shrinks them.
CALL = {"PixArtAlphaPipeline": {"use_resolution_binning": False, "clean_caption": False}}


def pixels(scene: Scene) -> torch.Tensor:
    """Return the image as float32 [1, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(scene.image)).permute(2, 0, 1)[None].float() / 127.5 - 1


@torch.no_grad()
def psnr(pipe: DiffusionPipeline, scene: Scene) -> float:
    """Return the peak signal-to-noise ratio, in dB, of one scene through the autoencoder."""
    x = pixels(scene)
    y = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    return float(10 * torch.log10(4 / F.mse_loss(y, x)))


def class_maps(fx: FeatureExtractor, scene: Scene, names: Sequence[str], t: int, seed: int) -> torch.Tensor:
    """Return one map per name, each spanning 0..1: float32 [names, GRID, GRID]. The prompt has the names in this order.

    The plain mean over all heads and cross-attention layers of one forward, and over the tokens of a word.
    """
    prompt = "a photo of " + " and ".join(names)
    captured = fx(scene.image, prompt, t=t, seed=seed, activations="*-cross-map", heads="mean")
    mean = torch.stack([on_grid(tensor[0, 0]) for tensor in captured.values()]).mean(dim=0)
    spans = find_phrases(prompt, {name: [name] for name in names})
    tokens = [token_positions(fx.pipe.tokenizer, prompt, spans[name]) for name in names]
    maps = torch.stack([mean[positions].mean(dim=0) for positions in tokens])
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-8)


def on_grid(probabilities: torch.Tensor) -> torch.Tensor:
    """Map of a square layer, [cells, tokens] → [tokens, GRID, GRID]."""
    side = round(probabilities.shape[0] ** 0.5)
    grid = probabilities.T.reshape(1, -1, side, side)
    return F.interpolate(grid, (GRID, GRID), mode="bilinear", align_corners=False)[0]


def counted(maps: torch.Tensor, scene: Scene) -> torch.Tensor:
    """Give every pixel the class whose map is highest there, and count against the truth, see ``count``."""
    truth = torch.from_numpy(scene.semantic).long()
    best = F.interpolate(maps[None], truth.shape, mode="bilinear", align_corners=False)[0].argmax(dim=0)
    return count(torch.tensor([label(name) for name in scene.classes])[best], truth, len(CLASSES))


def iou(counts: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return the mean IoU, its 95% interval over images, its means over objects and over backgrounds, and each class's.

    A class that is in no truth and no prediction counts in no mean.
    """
    found = scores(torch.stack(list(counts)))
    each, first = np.array(found["iou"]), len(BACKGROUNDS)
    return {
        "mean": found["miou"], "interval": found["miou_interval"],
        "backgrounds": float(np.nanmean(each[:first])), "objects": float(np.nanmean(each[first:])),
        **{name: value for name, value in zip(CLASSES, found["iou"], strict=True) if not np.isnan(value)},
    }  # fmt: skip


def segmentation(fx: FeatureExtractor, drawn: Sequence[Scene], t: int, backwards: bool = False) -> dict[str, Any]:
    """Return the IoU of each class and their mean, of plain cross-attention against the truth.

    The prompt names backgrounds first and objects then, or, ``backwards``, the other way round.
    """
    counts = []
    for seed, scene in enumerate(drawn):
        maps = class_maps(fx, scene, scene.classes[::-1] if backwards else scene.classes, t, seed)
        counts.append(counted(maps.flip(0) if backwards else maps, scene))
    return iou(counts)


def ranking(fx: FeatureExtractor, drawn: Sequence[Scene], t: int) -> dict[str, float]:
    """Return how well the map of an object's name ranks its pixels above all others: the mean area under the ROC curve.

    "together": the prompt names all classes of the scene; "alone": this object and nothing else. 0.5 is chance.
    """
    found: dict[str, list[float]] = {"together": [], "alone": []}
    for seed, scene in enumerate(drawn):
        together = class_maps(fx, scene, scene.classes, t, seed)
        for name in (name for name in scene.classes if name not in BACKGROUNDS):
            inside = torch.from_numpy(scene.semantic == label(name))
            alone = class_maps(fx, scene, [name], t, seed)[0]
            for how, one in (("together", together[scene.classes.index(name)]), ("alone", alone)):
                seen = F.interpolate(one[None, None], inside.shape, mode="bilinear", align_corners=False)[0, 0]
                found[how].append(roc_area(seen[inside], seen[~inside]))
    return {how: float(np.mean(areas)) for how, areas in found.items()}


@torch.no_grad()
def denoising(fx: FeatureExtractor, drawn: Sequence[Scene]) -> dict[str, float]:
    """Return the mean squared error of the noise over ``LEVELS``: with a scene's own caption, the next one's, and none.

    One is what a prediction of zero scores.
    """
    size = drawn[0].image.size[::-1]
    latents = torch.cat([fx.family.encode_images(fx.pipe, pixels(scene), None) for scene in drawn])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    captions = [scene.caption for scene in drawn]
    result = {}
    for name, texts in (("right", captions), ("another", captions[1:] + captions[:1]), ("empty", [""] * len(drawn))):
        conditions, errors = fx.family.encode_prompts(fx.pipe, texts), []
        for t in LEVELS:
            kept = fx.pipe.scheduler.alphas_cumprod[t]
            noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
            for i in range(0, len(drawn), 16):
                predicted = fx.family.denoise(fx.pipe, noisy[i : i + 16], t, conditions[i : i + 16], size)
                errors.append(F.mse_loss(predicted, noise[i : i + 16]).item())
        result[name] = float(np.mean(errors))
    return result


def generation(pipe: DiffusionPipeline, judge: torch.nn.Module, count: int) -> dict[str, Any]:
    """Return the shares of generated objects and colours that the classifier recognises, and the same of renderings.

    Prompts go through all pairs of class and colour in a fixed random order; 20 DDIM steps, guidance 4.
    """
    pairs = [(name, colour) for name in OBJECTS for colour in COLOURS]
    chosen = [pairs[i % len(pairs)] for i in np.random.default_rng(0).permutation(max(count, len(pairs)))[:count]]
    sampler = copy.copy(pipe)
    sampler.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    sampler.set_progress_bar_config(disable=True)
    images = []
    for i in range(0, count, 8):
        prompts = [
            f"a picture of a {colour} {name} on green grass under a blue sky" for name, colour in chosen[i : i + 8]
        ]
        seeds = [torch.Generator().manual_seed(i + k) for k in range(len(prompts))]
        call = CALL.get(type(pipe).__name__, {})
        images += sampler(prompts, num_inference_steps=20, guidance_scale=4.0, generator=seeds, **call).images
    names = torch.tensor([OBJECTS.index(name) for name, _ in chosen])
    colours = torch.tensor([list(COLOURS).index(colour) for _, colour in chosen])
    real = [scene for scene in map(classifier.single, range(TEST_SEED, TEST_SEED + 400)) if scene.objects]
    return {
        "generated": classifier.accuracy(judge, images, names, colours),
        "renderings": classifier.accuracy(judge, [s.image for s in real], *classifier.targets(real)),
    }


def rendering(count: int = 300) -> float:
    """Images of 128 pixels a second that one process draws."""
    began = time.perf_counter()
    for seed in range(TEST_SEED, TEST_SEED + count):
        render(seed)
    return count / (time.perf_counter() - began)


def untrained(fx: FeatureExtractor) -> FeatureExtractor:
    """The same pipeline with a denoiser that learnt nothing: what chance scores."""
    chance = copy.copy(fx.pipe)
    torch.manual_seed(0)
    fresh = type(fx.denoiser).from_config(fx.denoiser.config).eval()
    setattr(chance, "unet" if "unet" in fx.pipe.components else "transformer", fresh)
    return FeatureExtractor.from_pipe(chance, "*-cross-map")


def measure(fx: FeatureExtractor, drawn: Sequence[Scene], timesteps: Sequence[int]) -> dict[str, Any]:
    """Return every figure of the benchmark for scenes of one split."""
    result: dict[str, Any] = {"psnr_db": float(np.mean([psnr(fx.pipe, s) for s in drawn]))}
    result["denoising"] = denoising(fx, drawn)
    for t in timesteps:
        result[f"iou_t{t}"] = segmentation(fx, drawn, t)
    result[f"iou_t{timesteps[0]}_backwards"] = segmentation(fx, drawn, timesteps[0], backwards=True)
    result["ranking"] = ranking(fx, drawn, timesteps[0])
    result["iou_untrained"] = segmentation(untrained(fx), drawn, timesteps[0])
    result["iou_ceiling"] = iou([ceiling(s, finest(fx)) for s in drawn])
    return result


def main() -> None:
    """Print the figures and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="a pipeline that knows the drawn world (default: embedded)")
    parser.add_argument("--split", choices=list(SPLITS), nargs="+", default=["test", "held-out"])
    parser.add_argument("--scenes", type=int, default=64, help="of each split (default: %(default)s)")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[50, 100, 200, 300])
    parser.add_argument("--generate", type=int, default=96, help="images to generate and judge; 0 leaves it out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    fx = FeatureExtractor.from_pipe(load_pipeline(options.model, device="cpu"), "*")
    result: dict[str, Any] = {"scenes": options.scenes, "rendered_per_second": rendering()}
    for split in options.split:
        result[split] = measure(fx, list(scenes(split, options.scenes)), options.timesteps)
    if options.generate:
        result["generation"] = generation(fx.pipe, classifier.train(), options.generate)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


def show(result: dict[str, Any], name: str = "") -> None:
    """Print one figure a line, means alone where there is one for each class."""
    for key, value in result.items():
        if isinstance(value, dict) and "interval" in value:
            low, high = value["interval"]
            parts = f"objects {value['objects']:.3f}, backgrounds {value['backgrounds']:.3f}"
            print(f"{name}{key}: {value['mean']:.3f} ({low:.3f} to {high:.3f}); {parts}")
        elif isinstance(value, dict):
            show(value, f"{name}{key} ")
        else:
            print(f"{name}{key}: {value:.4g}")


if __name__ == "__main__":
    main()
