"""``DiffusionBackbone``: a diffusion model as the backbone of any mmsegmentation config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn

from diffusion_features import FeatureExtractor
from diffusion_features.activations import Activation, Spec, select
from diffusion_features.families import unwrap
from diffusion_features.images import fit_size

from . import identity
from .cache import FeatureCache, describe
from .levels import as_given, by_stride, pick
from .metas import prompts_of
from .projection import Concatenation, Projection
from .tuning import LearntPrompt, add_lora

#: What changes features but may differ on purpose between training and test.
_CONDITIONS = ("t", "seed", "prompt", "prompt_key", "size")


@MODELS.register_module()
class DiffusionBackbone(BaseModule):
    """Activations of one denoiser call as a feature pyramid, finest level first.

    >>> backbone = dict(type="DiffusionBackbone", model="embedded", activations="practical")

    Images come from the data preprocessor as RGB in [-1, 1] (mean and std 127.5), of any size. Weights that do not
    learn stay out of checkpoints; loading a checkpoint that was made on another model is an error.

    Attributes:
        fx: the extractor.
        feature_info: each level's activations, their channels and their stride in image pixels.
        channels: of each level's tensor, which is what ``in_channels`` of a head or neck must be.
    """

    def __init__(
        self,
        model: str = "embedded",
        activations: Spec = "practical",
        *,
        levels: Sequence[Spec] | None = None,
        out_indices: Sequence[int] | None = None,
        t: int = 50,
        prompt: str = "",
        prompt_key: str | None = None,
        learn_prompt: bool = False,
        seed: int = 0,
        size: int | tuple[int, int] | None = None,
        tune: str | dict[str, Any] = "frozen",
        projection: dict[str, Any] | None = None,
        cache: str | dict[str, Any] | None = None,
        dtype: Literal["float32", "float16", "bfloat16"] | None = None,
        revision: str | None = None,
        variant: str | None = None,
        init_cfg: Any = None,
    ) -> None:
        """
        Args:
            model: as ``FeatureExtractor.from_pretrained`` takes it: "embedded", a hub id, a folder or a file.
            activations: preset, id, glob, list or file; one level is made of each stride.
            levels: instead of ``activations``: what makes each level, from fine to coarse.
            out_indices: which levels are returned; negative ones count from the coarsest.
            t: the timestep the denoiser is conditioned on.
            prompt: what the model is told about every image.
            prompt_key: take each image's own prompt from its metainfo instead; needs ``DiffusionEncoderDecoder``.
            learn_prompt: learn the text embedding, beginning with that of ``prompt``.
            seed: of the noise, the same for every image.
            size: (height, width) or square side that images are resized to for the model; by default each image is
                taken at its own size, or at the nearest that the model can take.
            tune: "frozen"; "full", where the whole denoiser learns; or ``dict(type="lora", r=..., alpha=...,
                targets=[...])``.
            projection: ``dict(channels=..., norm=dict(...))`` normalises and mixes each level's activations to that
                many channels, the norm being group normalisation with 32 groups if not given; ``None`` concatenates
                them as they are.
            cache: a folder, or ``dict(folder=..., dtype="float16")``, to keep features of frozen models in.
            dtype: of a frozen denoiser: float16 where there is CUDA, else float32. What learns is float32.
            revision, variant: as in diffusers.

        Raises:
            ValueError: levels of mixed strides or in the wrong order, or options that exclude each other.
            LoadError, UnknownActivation: as ``FeatureExtractor.from_pretrained``.
        """
        super().__init__(init_cfg)
        mode, lora = _tuning(tune)
        learns = mode != "frozen" or learn_prompt
        _check_options(learns, learn_prompt, prompt_key, cache, dtype)
        self.prompt, self.prompt_key, self.t, self.seed, self.size = prompt, prompt_key, t, seed, _pair(size)
        # On the CPU first: each process of a distributed run moves it to a device of its own.
        self.fx = FeatureExtractor.from_pretrained(
            model, activations if levels is None else cast(Spec, [*levels]), revision=revision, variant=variant,
            device="cpu", dtype=_dtype(dtype, learns), trainable=mode == "full",
        )  # fmt: skip
        available = (
            by_stride(self.fx.feature_info) if levels is None else as_given(self._ids(levels), self.fx.feature_info)
        )
        self.feature_info = tuple(available if out_indices is None else pick(available, out_indices))
        self.fx.activations = self._select([id for level in self.feature_info for id in level.activations])
        self.frozen = not learns
        self._identity = {
            "model": model, "weights": identity.sample_weights(unwrap(self.fx.denoiser)), "tune": mode,
            "activations": [list(level.activations) for level in self.feature_info],
            "t": t, "seed": seed, "prompt": prompt, "prompt_key": prompt_key,
            "size": self.size and list(self.size),  # as JSON gives it back
        }  # fmt: skip
        self.cache = None if cache is None else _cache(cache, self.fx, self._identity)
        if mode == "lora":
            self.lora = add_lora(self.fx.denoiser, **lora)
        if learn_prompt:
            self.learnt_prompt = LearntPrompt(self.fx, prompt)
        self.fx.trainable = learns  # lets gradients pass through what is frozen itself
        self._one_prompt = self.frozen and prompt_key is None
        self.projections = nn.ModuleList(projection_of(level.channels, projection) for level in self.feature_info)
        self.channels = tuple(
            sum(level.channels) if projection is None else projection["channels"] for level in self.feature_info
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """float (B, 3, H, W) in [-1, 1] → float32 (B, C_i, H / s_i, W / s_i) for each level i, finest first.

        Raises:
            ValueError: the images are not in [-1, 1], or one has no prompt where it needs one.
        """
        prompts = [self.prompt] * len(x) if self.prompt_key is None else prompts_of(self.prompt_key, len(x))
        size = fit_size(x.shape[-2], x.shape[-1], self.fx.multiple) if self.size is None else self.size
        features = self._features(x, prompts, size)
        return tuple(
            project([features[id].float() for id in level.activations])
            for level, project in zip(self.feature_info, self.projections, strict=True)
        )

    def _features(self, x: Tensor, prompts: list[str], size: tuple[int, int]) -> dict[str, Tensor]:
        """Activations of the batch."""
        if not self.frozen:
            return self.fx(x, prompts, t=self.t, seed=self.seed, size=size)
        with torch.autocast(x.device.type, enabled=False):  # so that features do not depend on who asks
            self._release_text_encoders()
            if self.cache is None:
                return self.fx(x, prompts, t=self.t, seed=self.seed, size=size)
            rows = [
                self.cache.get(
                    one, prompt, lambda one=one, prompt=prompt: self.fx(  # type: ignore[misc]
                        one[None], prompt, t=self.t, seed=self.seed, size=size
                    )
                )
                for one, prompt in zip(x, prompts, strict=True)
            ]  # fmt: skip
        return {id: torch.cat([row[id] for row in rows]) for id in rows[0]}

    def _release_text_encoders(self) -> None:
        """With one prompt for everything they are needed once, and on the model's device they are fast."""
        if self._one_prompt:
            self.fx.encode_prompts(self.prompt)
            self.fx.release_text_encoders()
            self._one_prompt = False

    def _select(self, spec: Spec) -> list[Activation]:
        return select(self.fx.available, spec, self.fx.presets)

    def _ids(self, groups: Sequence[Spec]) -> list[list[str]]:
        return [[activation.id for activation in self._select(group)] for group in groups]

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        return identity.pack(self._identity)

    def set_extra_state(self, state: Tensor) -> None:
        saved = identity.unpack(state)
        if different := identity.differences(saved, self._identity):
            raise ValueError(f"the checkpoint was trained on another backbone: {'; '.join(different)}")
        for name in _CONDITIONS:
            if saved[name] != self._identity[name]:
                print_log(
                    f"the checkpoint was trained with {name}={saved[name]!r}; here it is {self._identity[name]!r}",
                    logger="current", level=30,
                )  # fmt: skip


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else size


def _tuning(tune: str | dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """ "frozen", "lora" or "full", and the settings of LoRA."""
    settings = {"type": tune} if isinstance(tune, str) else dict(tune)
    mode = settings.pop("type", None)
    if mode not in ("frozen", "lora", "full") or (settings and mode != "lora"):
        raise ValueError(
            f'tune must be "frozen", "full" or dict(type="lora", r=..., alpha=..., targets=...), not {tune!r}'
        )
    return mode, settings


def _check_options(learns: bool, learn_prompt: bool, prompt_key: str | None, cache: Any, dtype: str | None) -> None:
    if learn_prompt and prompt_key is not None:
        raise ValueError("learn_prompt learns one embedding for all images: it does not go with prompt_key")
    if learns and cache is not None:
        raise ValueError("features of a model that learns change at every step: they cannot be cached")
    if learns and dtype not in (None, "float32"):
        raise ValueError(f"what learns is float32, not {dtype}; use AMP for speed")
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise ValueError(f'dtype must be "float32", "float16" or "bfloat16", not {dtype!r}')


def _dtype(name: str | None, learns: bool) -> torch.dtype:
    if name is not None:
        return cast(torch.dtype, getattr(torch, name))
    return torch.float16 if torch.cuda.is_available() and not learns else torch.float32


def projection_of(channels: Sequence[int], settings: dict[str, Any] | None) -> nn.Module:
    """The projection of a level of these activations, as the option ``projection`` has it."""
    if settings is None:
        return Concatenation()
    return Projection(channels, settings["channels"], settings.get("norm", dict(type="GN", num_groups=32)))


def _cache(where: str | dict[str, Any], fx: FeatureExtractor, identity: dict[str, Any]) -> FeatureCache:
    settings = {"folder": where} if isinstance(where, str) else where
    asked = {name: identity[name] for name in ("activations", "t", "seed", "size")}
    return FeatureCache(settings["folder"], {**asked, **describe(fx)}, settings.get("dtype", "float32"))
