"""``DiffusionBackbone``: a diffusion model as the backbone of any mmsegmentation config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn

from diffusion_features import FeatureExtractor
from diffusion_features.activations import Spec, select
from diffusion_features.families import unwrap
from diffusion_features.images import fit_size

from . import identity, options
from .amalgamation import Amalgamation
from .cache import FeatureCache, describe
from .compression import Compression
from .levels import Level, as_given, by_stride, pick
from .metas import prompts_of
from .projection import Concatenation, Projection
from .techniques import TechniqueSets
from .tuning import LearntPrompt, add_lora

#: What changes features but may differ on purpose between training and test.
_CONDITIONS = ("t", "seed", "prompt", "prompt_key", "size", "suppress")


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
        suppress: Sequence[Mapping[str, Any]] = (),
        amalgamate: Mapping[str, Any] | None = None,
        attention: str | Sequence[str] = "up_cross",
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
            suppress: techniques against content shift, as ``dict(type="ControlNet", model=..., condition="canny")``;
                see ``diffusion_features.suppression``.
            amalgamate: ``dict(variants=[[...], [...]], how="assigned")``: features under several sets of techniques,
                each besides those of ``suppress``, made one; other keys are arguments of ``Amalgamation``.
            attention: what the activation ``attn`` is made of, as ``FeatureExtractor.from_pretrained`` takes it.
            tune: "frozen"; "full", where the whole denoiser learns; or ``dict(type="lora", r=..., alpha=...,
                targets=[...])``.
            projection: ``dict(channels=..., norm=dict(...))`` normalises and mixes each level's activations to that
                many channels, the norm being group normalisation with 32 groups if not given; ``None`` concatenates
                them as they are.
            cache: a folder, or ``dict(folder=..., dtype="int8", components=32)``, to keep features of frozen models
                in; what is lost is described in ``Compression``.
            dtype: of a frozen denoiser: float16 where there is CUDA, else float32. What learns is float32.
            revision, variant: as in diffusers.

        Raises:
            ValueError: levels of mixed strides or in the wrong order, or options that exclude each other.
            LoadError, UnknownActivation: as ``FeatureExtractor.from_pretrained``.
        """
        super().__init__(init_cfg)
        mode, lora = options.tuning(tune)
        learns = mode != "frozen" or learn_prompt
        self.techniques = TechniqueSets.of(suppress, () if amalgamate is None else options.variants(amalgamate))
        options.check(learns, learn_prompt, prompt_key, cache, dtype, self.techniques)
        self.prompt, self.prompt_key, self.t, self.seed, self.size = prompt, prompt_key, t, seed, options.pair(size)
        # On the CPU first: each process of a distributed run moves it to a device of its own.
        self.fx = FeatureExtractor.from_pretrained(
            model, activations if levels is None else cast(Spec, [*levels]), revision=revision, variant=variant,
            device="cpu", dtype=options.dtype(dtype, learns), trainable=mode == "full", attention=attention,
        )  # fmt: skip
        info = self.fx.feature_info
        available = by_stride(info) if levels is None else as_given(self._ids(levels), info)
        chosen = available if out_indices is None else pick(available, out_indices)
        self.fx.set_activations([id for level in chosen for id in level.activations])
        self.amalgamation = None if amalgamate is None else Amalgamation(
            {id: one.channels for id, one in self.fx.feature_info.items()}, **options.plain(amalgamate)
        )  # fmt: skip
        self.feature_info = tuple(chosen if self.amalgamation is None else map(self.amalgamation.widened, chosen))
        self.frozen = not learns
        self._identity = {
            "model": model, "weights": identity.sample_weights(unwrap(self.fx.denoiser)), "tune": mode,
            "activations": [list(level.activations) for level in self.feature_info],
            "t": t, "seed": seed, "prompt": prompt, "prompt_key": prompt_key, "suppress": options.plain(suppress),
            "amalgamate": options.plain(amalgamate), "size": options.plain(self.size),
            "attention": options.plain(attention),
        }  # fmt: skip
        self.cache = None if cache is None else self._cache(cache)
        if mode == "lora":
            self.lora = add_lora(self.fx.denoiser, **lora)
        if learn_prompt:
            self.learnt_prompt = LearntPrompt(self.fx, prompt)
        if learns:
            self.fx.keep_gradients()
        self._one_prompt = self.frozen and prompt_key is None
        self.projections = nn.ModuleList(projection_of(level.channels, projection) for level in self.feature_info)
        self.channels = tuple(
            sum(level.channels) if projection is None else projection["channels"] for level in self.feature_info
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """float (B, 3, H, W) in [-1, 1] → float32 (B, C_i, H / s_i, W / s_i) for each level i, finest first.

        Raises:
            ValueError: the images are not in [-1, 1], one has no prompt where it needs one, or a prompt is too long for
                the channels of ``attn``.
        """
        prompts = [self.prompt] * len(x) if self.prompt_key is None else prompts_of(self.prompt_key, len(x))
        size = fit_size(x.shape[-2], x.shape[-1], self.fx.multiple) if self.size is None else self.size
        features = self._features(x, prompts, size)
        if self.amalgamation is not None:
            features = self.amalgamation(features)
        for level in self.feature_info:
            _check_channels(level, features)
        return tuple(
            project([features[id].float() for id in level.activations])
            for level, project in zip(self.feature_info, self.projections, strict=True)
        )

    def _features(self, x: Tensor, prompts: list[str], size: tuple[int, int]) -> dict[str, Tensor]:
        """Activations of the batch; where several sets of techniques are amalgamated, those of each."""
        asked: dict[str, Any] = dict(t=self.t, seed=self.seed, size=size)
        if not self.frozen:
            return self.techniques.features(self.fx, x, prompts, **asked)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # so that they do not depend on who asks
            self._release_text_encoders()
            if self.cache is None:
                return self.techniques.features(self.fx, x, prompts, **asked)
            rows = [
                self.cache.get(
                    one, prompt, lambda one=one, prompt=prompt: self.techniques.features(  # type: ignore[misc]
                        self.fx, one[None], [prompt], **asked
                    )
                )
                for one, prompt in zip(x, prompts, strict=True)
            ]  # fmt: skip
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _release_text_encoders(self) -> None:
        """With one prompt for everything they are needed once, and on the model's device they are fast.

        Techniques may change the prompt, or the encoders, and need them again.
        """
        if self._one_prompt:
            self.fx.encode_prompts(self.prompt)
            if not self.techniques:
                self.fx.release_text_encoders()
            self._one_prompt = False

    def _cache(self, where: str | dict[str, Any]) -> FeatureCache:
        compression = {"folder": where} if isinstance(where, str) else dict(where)
        folder = compression.pop("folder")
        settings = {name: self._identity[name] for name in ("activations", "attention", "t", "seed", "size")}
        settings["techniques"] = self.techniques.fingerprints()
        return FeatureCache(folder, {**settings, **describe(self.fx)}, Compression(**compression))

    def _ids(self, groups: Sequence[Spec]) -> list[list[str]]:
        asked = self.fx.activations
        return [[activation.id for activation in select(asked, group, self.fx.presets)] for group in groups]

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


def _check_channels(level: Level, features: Mapping[str, Tensor]) -> None:
    for id, channels in zip(level.activations, level.channels, strict=True):
        if (found := features[id].shape[1]) != channels:
            raise ValueError(
                f"{id} has {found} channels, not {channels}: the prompt has more tokens than the text encoder reads at "
                "once; shorten it"
            )


def projection_of(channels: Sequence[int], settings: dict[str, Any] | None) -> nn.Module:
    """The projection of a level of these activations, as the option ``projection`` has it."""
    if settings is None:
        return Concatenation()
    return Projection(channels, settings["channels"], settings.get("norm", dict(type="GN", num_groups=32)))
