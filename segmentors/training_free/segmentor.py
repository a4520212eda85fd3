"""``TrainingFreeSegmentor``: class names and images in, a label for every pixel out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from diffusion_features import AttentionCall, FeatureExtractor, list_activations
from diffusion_features.activations import select
from diffusion_features.captioning import Captioner, captions
from diffusion_features.captioning import captioner as load_captioner
from diffusion_features.families import unwrap
from diffusion_features.images import Picture, as_tensor, check_size, fit_size, read_image

from .aggregation import Aggregator, output_projection, self_of
from .background import check_background
from .crf import densecrf
from .encoders import text_parts
from .labelling import Segmentation, Wanted, class_maps, labelled
from .method import Method
from .presets import Preset, preset_for
from .prompts import check_names, passes, shortened
from .refinement import refine
from .rescaling import Rescale, stretched


class TrainingFreeSegmentor:
    """Semantic segmentation by the attention of a text-to-image model, without training (arXiv 2603.06178).

    >>> segment = TrainingFreeSegmentor(FeatureExtractor.from_pretrained("embedded"))
    >>> result = segment(image, classes=["cat", "grass"], background=["sky"])
    >>> result.labels.shape  # (H, W), of the image
    """

    def __init__(
        self,
        fx: FeatureExtractor,
        preset: Preset | None = None,
        method: Method | None = None,
        captioner: str | Captioner | None = None,
    ) -> None:
        """
        Args:
            fx: the model; a transformer has to be loaded as far as the preset reads it, which ``"*"`` among its default
                activations sees to.
            preset: layers and timestep; by default those of the paper for this model.
            method: how the maps are put together; by default as in the paper.
            captioner: describes each image for the prompt, where a call gives no caption: a hub id or folder of an
                image-to-text model of transformers, loaded now, or a function from a list of PIL images to as many
                strings.

        Raises:
            ValueError: there is no preset for this model, it is not known how it reads text, it lacks the
                self-attention that the method asks for, or it was loaded only in part.
            UnknownActivation: the preset names a layer that the model does not have.
            ImportError: the method asks for a CRF, and pydensecrf is not installed.
        """
        self.fx, self.method = fx, method or Method()
        self.preset = preset or preset_for(fx)
        self.parts = text_parts(fx)
        self._cross = select(fx.available, list(self.preset.cross), fx.presets)
        others = select(fx.available, [self.preset.reference, *self.preset.refiners], fx.presets)
        loaded = {a.id for a in list_activations(unwrap(fx.denoiser))}
        if beyond := [a.id for a in (*self._cross, *others) if a.id not in loaded]:
            raise ValueError(
                f"{beyond[-1]} was not loaded, and this preset reads it: load the model with activations='*', or give "
                "a Preset that names only layers that were loaded"
            )
        if self.method.layers != "equal" and not {self_of(a.id) for a in self._cross} <= loaded:
            name = type(unwrap(fx.denoiser)).__name__
            raise ValueError(f"{name} has no self-attention maps to weigh layers by: use Method(layers='equal')")
        if self.method.edges == "crf":
            densecrf()
        self.captioner = load_captioner(captioner) if isinstance(captioner, str) else captioner

    def __call__(
        self,
        image: Picture | Sequence[Picture],
        classes: Sequence[str] | Mapping[str, Sequence[str]],
        background: Sequence[str] | None = None,
        *,
        caption: str | None = None,
        size: int | tuple[int, int] | None = None,
        seed: int = 0,
    ) -> Segmentation | list[Segmentation]:
        """Label every pixel of an image with one of the classes.

        Args:
            image: a PIL image, a path, an array or a tensor (3, H, W) in [-1, 1], of any size; or a list of them, or a
                tensor (B, 3, H, W). Those that the model sees in one size, under one caption, go through it as one
                batch.
            classes: names, such as ``["cat", "potted plant"]``; or name → words that stand for it, all of which are
                used, such as ``{"cat": ["cat", "kitten"]}``.
            background: things that are no class of interest, but may be there; they make the class "background", which
                comes first. An empty list makes one too, with the threshold of the method as its score. Without,
                every pixel is one of the classes.
            caption: a description of the image. Without, the model is told what the captioner says and the names, or
                the names alone. What a captioner says beyond what the model reads is left out.
            size: (height, width) or square side that the model works at; by default about as many pixels as the model
                was trained for, in the shape of the image. (Where a model does not say what it was trained for, the
                size of the image.)
            seed: of the noise, for each image.

        Returns:
            The segmentation at the size of the image; of several, a list.

        Raises:
            ValueError: no class, an empty name or the same name twice; a name that the tokenizer has no token for, or
                that is longer than the model reads (more names than it reads at once are told in several passes); a
                background that could never be found, see ``check_background``.
            FloatingPointError: the attention of the model has infinite or undefined values.
        """
        self.wanted(classes, background, caption)  # what is wrong with the names is said before any caption is made
        several = isinstance(image, Sequence) and not isinstance(image, str)
        several = several or (isinstance(image, Tensor) and image.ndim == 4)
        given = list(cast("Sequence[Picture]", image)) if several else [cast("Picture", image)]
        pictures = [read_image(one) if isinstance(one, (str, PathLike)) else one for one in given]
        found: list[Segmentation | None] = [None] * len(pictures)
        for working, indices in self.by_size(pictures, size).items():
            alike: dict[str | None, list[int]] = {}
            for index in indices:
                alike.setdefault(self.caption_of(pictures[index]) if caption is None else caption, []).append(index)
            for said, those in alike.items():
                wanted = self.wanted(classes, background, said)
                results = self._segment([pictures[i] for i in those], wanted, working, seed)
                for index, result in zip(those, results, strict=True):
                    found[index] = result
        done = cast("list[Segmentation]", found)
        return done if several else done[0]

    def caption_of(self, image: Picture) -> str | None:
        """What the captioner says of an image, as far as the model reads it; ``None`` without a captioner."""
        if self.captioner is None:
            return None
        (said,) = captions(self.captioner, as_tensor(image))
        return shortened(self.parts, said)

    def wanted(
        self,
        classes: Sequence[str] | Mapping[str, Sequence[str]],
        background: Sequence[str] | None = None,
        caption: str | None = None,
    ) -> Wanted:
        """What a call with these arguments asks of each image, prompts and token positions worked out."""
        names, behind = check_names(classes, background or [])
        if background is not None:
            check_background(names, behind, self.method.background, self.method.threshold)
        every = {**names, **{word: [word] for word in behind}}
        told = passes(self.parts, every, self.preset.template, caption)
        return Wanted([*names], behind, background is not None, told)

    @torch.no_grad()
    def collect(
        self,
        pictures: Sequence[Picture],
        prompts: Sequence[str],
        size: tuple[int, int],
        seed: int,
        methods: Sequence[Method],
    ) -> list[list[Aggregator]]:
        """Run the model once a prompt on a batch at ``size``, (height, width).

        Returns:
            For each method, what it collected of each prompt. All methods read the same attention as it comes.
        """
        cell = self.fx.family.pixels_per_cell(self.fx.pipe) * min(a.stride for a in self._cross if a.stride)
        grid = (math.ceil(size[0] / cell), math.ceil(size[1] / cell))
        projections = {a.id: output_projection(unwrap(self.fx.denoiser), a) for a in self._cross}
        collected: list[list[Aggregator]] = [[] for _ in methods]
        for prompt in prompts:
            readers = [
                Aggregator(
                    projections, self.preset.reference, self.preset.refiners if m.refine else (), grid,
                    heads=m.heads, layers=m.layers, renormalise=m.renormalise, as_released=m.as_released,
                ) for m in methods
            ]  # fmt: skip
            self._stream(list(pictures), readers, prompt, size, seed)
            for one, reader in zip(collected, readers, strict=True):
                one.append(reader)
        return collected

    def _stream(
        self, pictures: list[Picture], readers: Sequence[Aggregator], prompt: str, size: tuple[int, int], seed: int
    ) -> None:
        wanted = [set(reader.wanted) for reader in readers]

        def read(id: str, found: Tensor | AttentionCall) -> None:
            for reader, ids in zip(readers, wanted, strict=True):
                if id in ids:
                    reader(id, found)

        ids = sorted(set().union(*wanted))
        self.fx.stream(pictures, read, prompt, t=self.preset.t, seed=seed, activations=ids, size=size)

    def by_size(
        self, pictures: Sequence[Picture], size: int | tuple[int, int] | None
    ) -> dict[tuple[int, int], list[int]]:
        """Working size → which pictures the model sees in it."""
        if not pictures:
            raise ValueError("there are no images")
        fixed = None if size is None else check_size(size, self.fx.multiple)
        groups: dict[tuple[int, int], list[int]] = {}
        for index, picture in enumerate(pictures):
            groups.setdefault(fixed or self._size(*_full_size(picture)), []).append(index)
        return groups

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """The shape of an image, at about as many pixels as the model was trained for, if its configuration says so."""
        pipe, config = self.fx.pipe, cast(Any, unwrap(self.fx.denoiser)).config
        sample = getattr(pipe, "default_sample_size", None) or getattr(config, "sample_size", None)
        scale = int(sample) * int(pipe.vae_scale_factor) / math.sqrt(height * width) if sample else 1
        return fit_size(round(height * scale), round(width * scale), self.fx.multiple)

    @torch.no_grad()
    def _segment(self, pictures: list[Picture], wanted: Wanted, size: tuple[int, int], seed: int) -> list[Segmentation]:
        """Segment images that the model sees in one size, as one batch."""
        seconds: dict[str, float] = {}
        with self._timed("model", seconds, len(pictures)):
            (runs,) = self.collect(pictures, [one.prompt for one in wanted.told], size, seed, [self.method])
        with self._timed("rescale", seconds, len(pictures)):
            maps = self.maps(runs, wanted, self.method.rescale)
        with self._timed("refine", seconds, len(pictures)):
            if self.method.refine and self.preset.k:
                maps = self.refined(maps, runs[0])
        names = tuple(["background"] * wanted.with_background + wanted.names)
        prompts = tuple(one.prompt for one in wanted.told)
        found = []
        for index, picture in enumerate(pictures):
            with self._timed("label", seconds, 1):
                seen = None if self.method.edges == "none" else as_tensor(picture, size=size)[0]
                labels, scores = labelled(maps[index], _full_size(picture), wanted.with_background, self.method, seen)
            heads, layers = runs[0].head_maps(index), runs[0].layer_shares(index)
            found.append(Segmentation(labels, scores, names, prompts, heads, layers, dict(seconds)))
        return found

    def maps(self, runs: Sequence[Aggregator], wanted: Wanted, rescale: Rescale) -> Tensor:
        """One rescaled map a class, and behind them one of the background if there is one: (B, K, h, w).

        Args:
            runs: what each pass collected.
        """
        tokens = [run.tokens() for run in runs]
        found = []
        for index in range(len(tokens[0])):
            classes, behind = class_maps([t[index] for t in tokens], wanted, rescale)
            found.append(torch.cat([classes, behind[None]]) if wanted.with_background else classes)
        return torch.stack(found)

    def refined(self, maps: Tensor, run: Aggregator) -> Tensor:
        """Maps (B, K, h, w) after refinement, each stretched to [0, 1] again."""
        spread = refine(maps, list(run.refiners.values()), self.preset.k)
        return stretched(spread.flatten(0, 1)).unflatten(0, spread.shape[:2])

    @contextmanager
    def _timed(self, step: str, seconds: dict[str, float], images: int) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self.fx.device.type == "cuda":  # its work goes on after the calls have returned
            torch.cuda.synchronize(self.fx.device)
        seconds[step] = (time.perf_counter() - begin) / images


def _full_size(picture: Picture) -> tuple[int, int]:
    """Height and width in pixels."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    pixels = as_tensor(picture)
    return pixels.shape[-2], pixels.shape[-1]
