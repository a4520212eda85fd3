"""Measures the embedded pipeline: its autoencoder, and how well its cross-attention finds the words of a prompt.

``python benchmarks/embedded.py`` measures test scenes; settings are chosen with ``--split validation``.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray

from diffusion_features import FeatureExtractor
from diffusion_features.embedded import CLASSES, TEST_SEED, VALIDATION_SEED, Scene, label, path, render

SPLITS = {"test": TEST_SEED, "validation": VALIDATION_SEED}
GRID = 32
Labels = NDArray[np.uint8]


def pixels(scene: Scene) -> torch.Tensor:
    """Return the image as float32 [1, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(scene.image)).permute(2, 0, 1)[None].float() / 127.5 - 1


@torch.no_grad()
def psnr(pipe: StableDiffusionPipeline, scene: Scene) -> float:
    """Return the peak signal-to-noise ratio, in dB, of one scene through the autoencoder."""
    x = pixels(scene)
    y = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    return float(10 * torch.log10(4 / F.mse_loss(y, x)))


def spans(pipe: StableDiffusionPipeline, prompt: str, words: Sequence[str]) -> list[list[int]]:
    """Return the token positions of each of ``words``, which occur once and in this order."""
    offsets = pipe.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    found, start = [], 0
    for word in words:
        start = prompt.index(word, start)
        end = start + len(word)
        found.append([i for i, (a, b) in enumerate(offsets) if start <= a < b <= end])
        start = end
    return found


def class_maps(fx: FeatureExtractor, scene: Scene, t: int, seed: int) -> torch.Tensor:
    """Return one map per class of ``scene.classes``, each spanning 0..1: float32 [classes, GRID, GRID].

    The plain mean over all heads and cross-attention layers of one forward, and over the tokens of a word.
    """
    prompt = "a photo of " + " and ".join(scene.classes)
    captured = fx(scene.image, prompt, t=t, seed=seed, activations="*-cross-map", heads="mean")
    mean = torch.stack([on_grid(tensor[0, 0]) for tensor in captured.values()]).mean(dim=0)
    maps = torch.stack([mean[positions].mean(dim=0) for positions in spans(fx.pipe, prompt, scene.classes)])
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-8)


def on_grid(probabilities: torch.Tensor) -> torch.Tensor:
    """Map of a square layer, [cells, tokens] → [tokens, GRID, GRID]."""
    side = round(probabilities.shape[0] ** 0.5)
    grid = probabilities.T.reshape(1, -1, side, side)
    return F.interpolate(grid, (GRID, GRID), mode="bilinear", align_corners=False)[0]


def segment(maps: torch.Tensor, classes: Sequence[str], size: tuple[int, int]) -> Labels:
    """Give every pixel of (height, width) the class whose map is highest there."""
    best = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0].argmax(dim=0).numpy()
    return np.array([label(name) for name in classes], np.uint8)[best]


def ceiling(semantic: Labels) -> Labels:
    """Return ``semantic`` reduced to the grid by majority and brought back: the best that the grid allows."""
    height, width = semantic.shape
    cells = np.eye(len(CLASSES), dtype=np.float32)[semantic]
    votes = cells.reshape(GRID, height // GRID, GRID, width // GRID, -1).sum(axis=(1, 3)).argmax(-1)
    return np.repeat(np.repeat(votes, height // GRID, 0), width // GRID, 1).astype(np.uint8)


def iou(pairs: Sequence[tuple[Labels, Labels]]) -> dict[str, float]:
    """Return each class's intersection over union over all (prediction, truth) pairs, and their mean."""
    confusion = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    for predicted, truth in pairs:
        np.add.at(confusion, (truth.ravel(), predicted.ravel()), 1)
    hit = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hit
    each = {name: float(hit[i] / union[i]) for i, name in enumerate(CLASSES) if union[i]}
    return {"mean": float(np.mean(list(each.values()))), **each}


def segmentation(fx: FeatureExtractor, scenes: Sequence[Scene], t: int) -> dict[str, float]:
    """Return the IoU of each class and their mean, of plain cross-attention against the truth."""
    predicted = [segment(class_maps(fx, s, t, seed), s.classes, s.semantic.shape) for seed, s in enumerate(scenes)]
    return iou([(p, s.semantic) for p, s in zip(predicted, scenes, strict=True)])


def measure(pipe: StableDiffusionPipeline, scenes: Sequence[Scene], timesteps: Sequence[int]) -> dict[str, Any]:
    """Return every figure of the benchmark for ``scenes``."""
    fx = FeatureExtractor.from_pipe(pipe)
    result: dict[str, Any] = {"scenes": len(scenes), "psnr_db": float(np.mean([psnr(pipe, s) for s in scenes]))}
    for t in timesteps:
        result[f"iou_t{t}"] = segmentation(fx, scenes, t)
    chance = copy.copy(pipe)
    torch.manual_seed(0)
    chance.unet = UNet2DConditionModel.from_config(pipe.unet.config).eval()
    result["iou_untrained"] = segmentation(FeatureExtractor.from_pipe(chance), scenes, timesteps[0])
    result["iou_ceiling"] = iou([(ceiling(s.semantic), s.semantic) for s in scenes])
    return result


def main() -> None:
    """Print the figures and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=path())
    parser.add_argument("--split", choices=list(SPLITS), default="test")
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--timesteps", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--out", type=Path, default=Path("outputs/embedded.json"))
    options = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(options.folder, dtype=torch.float32)
    scenes = [render(SPLITS[options.split] + i) for i in range(options.scenes)]
    result = {"split": options.split, **measure(pipe, scenes, options.timesteps)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for key, value in result.items():
        print(f"{key:12} {value['mean'] if isinstance(value, dict) else value}")


if __name__ == "__main__":
    main()
