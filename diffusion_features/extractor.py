"""``FeatureExtractor``: image and prompt → condition → latents → noise at t → denoiser under capture → activations."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
from diffusers import PipelineQuantizationConfig
from torch import Tensor, nn

from .activations import COMPOSED, Activation, Kind, Spec, names, preset_timesteps, presets, select
from .attention import use_fast_attention
from .attention_call import AttentionCall
from .capturing import capture
from .composed import (
    CELL,
    AttentionSum,
    Group,
    attention_channels,
    attention_groups,
    check_attention,
    next_image,
)
from .families import denoiser_classes, family_of, list_activations, unwrap
from .images import Picture, as_tensor
from .loading import Absent, has_decoder, load_pipeline, model_revision
from .memory import advised
from .modulating import discarded, is_block_output, runs, without
from .noising import Draw, Predict, add_noise, check_t, travel
from .suppression.applying import applied, asked
from .suppression.spec import Spec as TechniqueSpec
from .suppression.technique import Call, guided
from .truncating import untruncated

_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()
RECENT = 256
"""Distinct prompts of calls that an extractor of its own pipeline remembers: a server would gather them without end."""


@dataclass(frozen=True)
class FeatureInfo:
    """channels: of the tensor (heads for a map); 0 for an ``attn`` whose channels depend on the image or the prompt.
    stride: side of a feature cell in image pixels, ``None`` for text."""

    channels: int
    stride: int | None
    kind: Kind


class FeatureExtractor(nn.Module):
    """Dense features of images from the inside of a diffusion model.

    >>> fx = FeatureExtractor.from_pretrained("embedded")
    >>> features = fx(image, prompt="a photo of a cat", t=50, seed=0)
    >>> features["up-level1-repeat2-res-out"].shape  # (1, C, h, w)

    Make one with ``from_pretrained`` or ``from_pipe``. Frozen by default: it has no parameters and an empty
    ``state_dict``, so that a model built on it saves only its own weights.

    Attributes:
        pipe: the diffusers pipeline.
        available: everything the model has to capture, in forward order.
        activations: what a call captures when it does not say.
        presets: name → ids and globs; any activation, or list of activations, may be named by it.
        preset_timesteps: name → the t that the preset was chosen at. A call does not take it by itself.
        attention: categories of the maps that ``attn`` is made of.
        model_id, revision: where the weights came from, if known.
    """

    def __init__(
        self,
        pipe: Any,
        activations: Spec = "practical",
        *,
        owned: bool = False,
        trainable: bool = False,
        attention: str | Sequence[str] = "up_cross",
        model_id: str = "",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.pipe = pipe
        inner = unwrap(self.denoiser)
        if trainable:  # a frozen denoiser stays out of nn.Module's registry, and so out of the state_dict
            self.trained = self.denoiser.requires_grad_(True)
        self.owned, self.trainable = owned, trainable
        self.model_id, self.revision = model_id or str(pipe.config.get("_name_or_path", "")), revision
        loaded = list_activations(inner)
        self.available = untruncated(inner) or loaded
        self._loaded = [a.id for a in loaded]
        preset_model = self.family.preset_model(inner, self.model_id)
        self.presets = presets(preset_model, self.available)
        self.preset_timesteps = preset_timesteps(preset_model, self.presets)
        self.attention = check_attention(attention)
        self.activations = self._select(activations)
        self._prompts: dict[str, Any] = {}  # asked for
        self._recent: dict[str, Any] = {}  # of calls
        self._released = False

    # ---- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        activations: Spec = "practical",
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        local_files_only: bool = False,
        trainable: bool = False,
        attention: str | Sequence[str] = "up_cross",
        prompts: str | Sequence[str] | None = None,
        quantization_config: PipelineQuantizationConfig | None = None,
    ) -> FeatureExtractor:
        """Load a pipeline that belongs to the extractor alone.

        Args:
            model: ``"embedded"`` or another of ``embedded.MODELS``, a hub id, a folder in the diffusers format, or a
                single ``.safetensors`` file.
            activations: what calls capture by default: an id, a glob, a preset, a file, a list, an id→bool mapping.
                A transformer is loaded only up to the deepest of them; ``"*"`` loads all of it. A UNet is loaded whole.
            revision, variant, local_files_only: as in diffusers.
            dtype: float32 on a CPU and float16 on a GPU if not given.
            device: a CUDA device if there is one.
            trainable: the denoiser becomes a submodule with gradients; otherwise everything is frozen.
            attention: what the activation ``attn`` is made of, in this order of its channels: ``down_cross``,
                ``mid_cross``, ``up_cross``, ``down_self``, ``mid_self``, ``up_self``. See ``composed``.
            prompts: encode these now and release the text encoders; other prompts are then refused.
            quantization_config: diffusers' own: which components are quantised as they are loaded, and how.

        Offloading is diffusers' own too: load with ``device="cpu"``, then ``pipe.enable_model_cpu_offload()`` or
        ``pipe.enable_group_offload(...)``.

        The VAE decoder is loaded only for ``vae-out``. xformers is used where it is installed and works.

        Raises:
            LoadError: the model cannot be loaded; the message says why.
            UnknownActivation: ``activations`` names nothing in this model.
            ValueError: ``attention`` names no category, or one that this model lacks and ``attn`` would need.
        """
        pipe = load_pipeline(
            model, revision=revision, variant=variant, dtype=dtype, device=device, local_files_only=local_files_only,
            activations=activations, quantization_config=quantization_config,
        )  # fmt: skip
        if getattr(pipe, "vae", None) is not None and "vae-out" not in names(activations):
            pipe.vae.decoder = Absent("the VAE's decoder", "name vae-out among its activations")
        extractor = cls(
            pipe, activations, owned=True, trainable=trainable, attention=attention, model_id=str(model),
            revision=model_revision(pipe),
        )  # fmt: skip
        use_fast_attention(extractor.denoiser)
        if prompts is not None:
            extractor.encode_prompts(prompts)
            extractor.release_text_encoders()
        return extractor

    @classmethod
    def from_pipe(
        cls,
        pipe: Any,
        activations: Spec = "practical",
        *,
        trainable: bool = False,
        attention: str | Sequence[str] = "up_cross",
    ) -> FeatureExtractor:
        """Use a loaded pipeline of the caller, which is never moved, freed, frozen or rescheduled.

        Its prompts are encoded anew at each call, because the caller may load LoRAs between two of them.

        A pipeline that has an IP-Adapter loaded is refused by each call.
        """
        return cls(pipe, activations, trainable=trainable, attention=attention)

    # ---- what it is -------------------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> nn.Module:
        """The pipeline's denoiser.

        Raises:
            TypeError: it has none.
        """
        denoiser = getattr(self.pipe, "unet", None) or getattr(self.pipe, "transformer", None)
        if denoiser is None:
            name, known = type(self.pipe).__name__, ", ".join(denoiser_classes())
            raise TypeError(f"{name} has no denoiser (neither unet nor transformer); known denoisers are {known}")
        return denoiser

    # Modules and locks cannot be copied or pickled; an extractor that does not hold them can.

    @property
    def family(self) -> ModuleType:
        """The module of ``families`` that knows this denoiser."""
        return family_of(self.denoiser)

    @property
    def _lock(self) -> threading.RLock:
        """One lock a denoiser, whichever extractor uses it."""
        with _LOCKS_GUARD:
            return _LOCKS.setdefault(unwrap(self.denoiser), threading.RLock())

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        """id → channels, stride in image pixels and kind, of the default activations."""
        return {a.id: self.info(a) for a in self.activations}

    def info(self, activation: Activation) -> FeatureInfo:
        """Channels, stride in image pixels and kind of one of ``available``, or of ``attn`` or ``vae-out``."""
        if activation.id == "vae-out":
            return FeatureInfo(activation.channels, 1, activation.kind)
        if activation.id == "attn":
            tokens = self.family.text_tokens(self.pipe)
            channels = attention_channels(self._attention_groups(), self.attention, tokens)
            return FeatureInfo(channels, CELL, activation.kind)
        cell = self.family.pixels_per_cell(self.pipe)
        stride = None if activation.stride is None else activation.stride * cell
        return FeatureInfo(activation.channels, stride, activation.kind)

    def _attention_groups(self) -> dict[str, Group]:
        return attention_groups(self.available, self.attention, self.family.pixels_per_cell(self.pipe))

    @property
    def multiple(self) -> int:
        """Image sides must be multiples of this many pixels."""
        return self.family.multiple(self.pipe)

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device

    @property
    def dtype(self) -> torch.dtype:
        return unwrap(self.denoiser).dtype  # type: ignore[return-value]

    # ---- what it does by default ------------------------------------------------------------------------------------

    def set_activations(self, activations: Spec) -> None:
        """Change what calls capture when they do not say, and so ``feature_info``.

        Raises:
            UnknownActivation, ValueError: as a call with ``activations``.
        """
        self.activations = self._select(activations)

    def keep_gradients(self) -> None:
        """Make calls return features with their graph, although the denoiser is frozen.

        For what learns inside it, such as adapters, or before it, such as a prompt's embedding.
        """
        self.trainable = True

    # ---- the call ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        images: Picture | Sequence[Picture] | None,
        prompt: str | Sequence[str] = "",
        *,
        t: int | Sequence[int] = 50,
        seed: int | Sequence[int] = 0,
        activations: Spec | None = None,
        size: int | tuple[int, int] | None = None,
        ensemble: int = 1,
        sample_posterior: bool = False,
        modulate: bool = False,
        discard: Sequence[int] = (),
        noise: Tensor | None = None,
        latents: Tensor | None = None,
        invert: bool = False,
        denoise_from: int | None = None,
        solver_steps: int = 10,
        suppress: TechniqueSpec | Sequence[TechniqueSpec] = (),
        heads: Literal["each", "mean"] = "each",
        output_device: torch.device | str | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """Features of images.

        Args:
            images: a PIL image, a list of them, or a (B, 3, H, W) tensor in [-1, 1]; sides are multiples of
                ``multiple``. May be ``None`` if ``latents`` are given.
            prompt: one string, or one an image.
            t: the training timestep the denoiser is conditioned on, 0 (clean) to 999 (noise). A list of T adds an axis
                of size T after B; every t sees the same noise.
            seed: one for all images, or one an image. Image i of a batch equals the same image alone.
            activations: what to capture, if not the default.
            size: resize images to this (height, width) or square side first.
            ensemble: average the features over this many draws of noise.
            sample_posterior: sample the VAE posterior as the papers do, instead of taking its mean.
            modulate: give block outputs of transformers (``vit-block…-out``) as the next block reads them, behind its
                adaptive layer norm: y = (1+γ)·LN(x) + β, see ``modulating``. Other activations stay as they are.
            discard: channels of block outputs that are set to zero, before they are modulated if they are; for Flux.1
                (154, 1446) (arXiv 2505.18584). With ``modulate``, each block costs a run of the denoiser of its own.
            noise: (B, c, h, w) to use instead of drawing.
            latents: (B, c, h, w) clean, scaled latents to use instead of encoding images.
            invert: reach t by DDIM inversion of the clean latents in ``solver_steps`` steps, without drawn noise.
            denoise_from: add noise at this higher timestep and denoise to t in ``solver_steps`` DDIM steps.
            suppress: techniques against content shift, such as ``ControlNet`` or ``LoRA``, see ``suppression``; in any
                order, or as configurations. The model is as it was before, bit for bit, when the call is done.
            heads: ``mean`` averages maps over heads, to (B, 1, queries, keys).
            output_device, output_dtype: where captures go as soon as they are made.

        Returns:
            id → (B, C, h, w), (B, tokens, C) for text-side ids or (B, heads, queries, keys) for maps, in forward order,
            with ``attn`` (B, channels, H/8, W/8) and ``vae-out`` (B, 3, H, W) behind them, see ``composed``.
            Detached, unless the extractor is trainable.

        Raises:
            UnknownActivation: ``activations`` names nothing in this model.
            ValueError: sizes, counts or timesteps that do not fit, or an activation beyond what was loaded; the message
                says what would fit.
            FloatingPointError: an activation has infinite or undefined values; the message names it and the remedy.
        """
        chosen = self.activations if activations is None else self._select(activations)
        together, apart = runs(unwrap(self.denoiser), chosen, self.available, self._loaded, modulate, discard)
        call = asked(suppress, Call(images, prompt, t, denoise_from, solver_steps, size=size, multiple=self.multiple))
        denoise_from, solver_steps = call.denoise_from, call.solver_steps
        levels = self._levels(t, denoise_from)
        if invert and (denoise_from is not None or noise is not None or ensemble != 1):
            raise ValueError("invert draws no noise: it does not go with denoise_from, noise or ensemble")
        if ensemble < 1 or (noise is not None and ensemble != 1):
            raise ValueError("ensemble must be at least 1, and exactly 1 where noise is given")
        if solver_steps < 1:
            raise ValueError("solver_steps must be at least 1")

        grad = self.trainable and torch.is_grad_enabled()
        self._refuse_image_prompt()
        with self._lock, advised(), torch.set_grad_enabled(grad), applied(self, call):
            clean, pixels = self._clean(images, size, latents, seed if sample_posterior else None)
            run, step = self._predictors(call, len(clean), pixels)

            def noisy(eps: Tensor, level: int) -> Tensor:
                if invert:
                    return travel(clean, 0, level, solver_steps, step, self.pipe.scheduler)
                return self._noisy(clean, eps, level, call, step)

            def kept(id: str, found: Tensor | AttentionCall) -> Tensor:
                tensor = found if isinstance(found, Tensor) else found.map.rows(head_mean=heads == "mean")
                return tensor.to(device=output_device, dtype=output_dtype or clean.dtype)

            def captured(x: Tensor, level: int, wanted: list[Activation]) -> dict[str, Tensor]:
                return self._captured(
                    wanted, x, level, run, pixels, kept, only_composed=True, heads=heads,
                    device=output_device, dtype=output_dtype,
                )  # fmt: skip

            def features_at(eps: Tensor, level: int) -> dict[str, Tensor]:
                latents_t = noisy(eps, level)
                features = captured(latents_t, level, together) if together else {}
                for activation in apart:
                    with discarded(unwrap(self.denoiser), activation, discard):
                        features |= captured(latents_t, level, [activation])
                if discard and not modulate:
                    features |= {a.id: without(features[a.id], discard, 1) for a in chosen if is_block_output(a)}
                _check_finite(features)
                return {a.id: features[a.id] for a in chosen}

            draws = self._draws(clean, seed, ensemble, noise)
            found = [_mean((features_at(eps, level) for eps in draws), len(draws)) for level in levels]
        if _is_single(t):
            return found[0]
        return {id: torch.stack([f[id] for f in found], dim=1) for id in found[0]}

    def stream(
        self,
        images: Picture | Sequence[Picture],
        reduce: Callable[[str, Any], Any],
        prompt: str | Sequence[str] = "",
        *,
        t: int = 50,
        seed: int | Sequence[int] = 0,
        activations: Spec | None = None,
        size: int | tuple[int, int] | None = None,
        suppress: TechniqueSpec | Sequence[TechniqueSpec] = (),
    ) -> dict[str, Any]:
        """As a call, but each activation is handed to ``reduce`` as it comes, and only what that returns is kept.

        ``attn`` and ``vae-out`` come last.

        An attention map comes as an ``AttentionCall``, and is not made: see ``capture``. Of the steps that a technique
        takes down to t, ``reduce`` sees nothing.

        Returns:
            id → what ``reduce(id, tensor or call)`` returned.
        """
        chosen = self.activations if activations is None else self._select(activations)
        call = asked(suppress, Call(images, prompt, t, size=size, multiple=self.multiple))
        (level,) = self._levels(t, call.denoise_from)
        self._refuse_image_prompt()
        with self._lock, advised(), torch.no_grad(), applied(self, call):
            clean, pixels = self._clean(images, size, None, None)
            run, step = self._predictors(call, len(clean), pixels)
            (noise,) = self._draws(clean, seed, 1, None)
            noisy = self._noisy(clean, noise, level, call, step)
            return self._captured(chosen, noisy, level, run, pixels, reduce)

    def _captured(
        self,
        wanted: list[Activation],
        noisy: Tensor,
        level: int,
        run: Predict,
        pixels: tuple[int, int],
        keep: Callable[[str, Any], Any],
        *,
        only_composed: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        """What one run of the denoiser on x_t gives: what is captured, then what is composed of it.

        Args:
            pixels: (height, width) of the images.
            keep: called with an id and its tensor or ``AttentionCall``; what it returns is kept.
            only_composed: ``capture`` keeps what no composed activation is made of, with these ``options``.
        """
        ids = {a.id for a in wanted}
        attention = AttentionSum(self._attention_groups() if "attn" in ids else {})
        tapped = [a for a in wanted if a.tap != "composed"]
        tapped += [a for a in self.available if a.id in attention.groups and a.id not in ids]

        def take(id: str, found: Tensor | AttentionCall) -> Any:
            if isinstance(found, AttentionCall) and id in attention.groups:
                attention.add(id, found)
            return keep(id, found) if id in ids else None

        taken = dict.fromkeys(attention.groups if only_composed else (a.id for a in tapped), take)
        options |= dict(stop_early="vae-out" not in ids, grad=torch.is_grad_enabled(), reduce=taken)
        nothing: AbstractContextManager[dict[str, Any]] = nullcontext({})
        with capture(self.denoiser, tapped, **options) if tapped else nothing as features:
            prediction = run(noisy, level)
        found = {id: value for id, value in features.items() if id in ids}
        if "attn" in ids:
            found["attn"] = keep("attn", attention.result(pixels))
        if "vae-out" in ids:
            decode = partial(self.family.decode_latents, self.pipe)
            found["vae-out"] = keep("vae-out", next_image(noisy, prediction, level, self.pipe.scheduler, decode))
        return found

    def _predictors(self, call: Call, batch: int, pixels: tuple[int, int]) -> tuple[Predict, Predict]:
        """(x_t, t) → the denoiser's prediction: told the call's prompts, and guided as the call's steps are."""

        def told(prompts: str | Sequence[str]) -> Predict:
            conditions = self._conditions(prompts, batch)
            return lambda x, level: self.family.denoise(self.pipe, x, level, conditions, pixels)

        run = told(call.prompts)
        return run, run if call.guidance == 1 else guided(run, told(call.negative), call.guidance)

    def _noisy(self, clean: Tensor, eps: Tensor, level: int, call: Call, step: Predict) -> Tensor:
        """Clean latents with noise at ``level``; by the steps down to it that the call takes, if any."""
        start, scheduler = call.denoise_from, self.pipe.scheduler
        if start is None:
            return add_noise(clean, eps, level, scheduler)
        return travel(add_noise(clean, eps, start, scheduler), start, level, call.solver_steps, step, scheduler)

    def _select(self, spec: Spec) -> list[Activation]:
        chosen = select([*self.available, *COMPOSED], spec, self.presets)
        ids = {a.id for a in chosen}
        if "vae-out" in ids and not has_decoder(self.pipe):
            raise ValueError(
                "vae-out needs the VAE's decoder, which was not loaded: name vae-out among the activations of "
                "from_pretrained"
            )
        ids |= set(self._attention_groups()) if "attn" in ids else set()
        whole = self.available if "vae-out" in ids else [a for a in self.available if a.id in ids]
        loaded = set(self._loaded)
        if beyond := [a.id for a in whole if a.id not in loaded]:
            raise ValueError(
                f"{beyond[-1]} was not loaded: this model was loaded only up to {self._loaded[-1]}. Name it, or '*', "
                "among the activations of from_pretrained"
            )
        return chosen

    def _refuse_image_prompt(self) -> None:
        with self._lock:  # during a call, ``IPAdapter`` loads one itself
            if getattr(unwrap(self.denoiser).config, "encoder_hid_dim_type", None) != "ip_image_proj":
                return
        raise ValueError(
            "this pipeline has an IP-Adapter loaded, so that its denoiser wants an image prompt each time: call "
            "pipe.unload_ip_adapter() first. To use one, give suppress=[IPAdapter(...)]"
        )

    def _levels(self, t: int | Sequence[int], denoise_from: int | None) -> list[int]:
        wanted: Any = [t] if _is_single(t) else t
        levels = [check_t(x, self.pipe.scheduler) for x in wanted]
        if not levels:
            raise ValueError("t is an empty list")
        if denoise_from is not None and check_t(denoise_from, self.pipe.scheduler) < max(levels):
            raise ValueError(f"denoise_from={denoise_from} must not be below t={max(levels)}")
        return levels

    def _clean(
        self,
        images: Picture | Sequence[Picture] | None,
        size: int | tuple[int, int] | None,
        latents: Tensor | None,
        posterior_seed: int | Sequence[int] | None,
    ) -> tuple[Tensor, tuple[int, int]]:
        """Clean latents (B, c, h, w) on the denoiser's device, and the (height, width) of the images in pixels."""
        if latents is not None:
            return self._given(latents)
        if images is None:
            raise ValueError("give images, or latents to use instead")
        pixels = as_tensor(images, size=size, multiple=self.multiple).to(self.device)
        draw = None if posterior_seed is None else Draw(posterior_seed, len(pixels), stream=1)
        return self.family.encode_images(self.pipe, pixels, draw), (pixels.shape[-2], pixels.shape[-1])

    def _given(self, latents: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The caller's latents on the denoiser's device, and the (height, width) in pixels of images that have them."""
        if latents.ndim != 4:
            raise ValueError(f"latents must have shape (B, c, h, w), not {tuple(latents.shape)}")
        cell = self.family.pixels_per_latent(self.pipe)
        height, width = (side * cell for side in latents.shape[-2:])
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"latents are {tuple(latents.shape[-2:])} cells; for this model each side must be a multiple of "
                f"{self.multiple // cell}"
            )
        return latents.to(device=self.device, dtype=self.dtype), (height, width)

    def _draws(self, clean: Tensor, seed: int | Sequence[int], ensemble: int, noise: Tensor | None) -> list[Tensor]:
        """The noises to use, each (B, c, h, w)."""
        if noise is None:
            draw = Draw(seed, len(clean))
            return [draw(clean) for _ in range(ensemble)]
        if noise.shape != clean.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}; the latents have {tuple(clean.shape)}")
        return [noise.to(clean)]

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: str | Sequence[str]) -> None:
        """Encode prompts and keep the result, so that calls with them need no text encoder."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        with self._lock, torch.no_grad():
            new = [p for p in dict.fromkeys(prompts) if p not in self._prompts]
            self._prompts.update(zip(new, self.family.encode_prompts(self.pipe, new), strict=True))

    def release_text_encoders(self) -> None:
        """Free the text encoders. Prompts given to ``encode_prompts``, and the last 256 of calls, stay available.

        Others are refused.

        Raises:
            ValueError: the pipeline belongs to the caller.
        """
        if not self.owned:
            raise ValueError("the pipeline belongs to its caller; only one loaded by from_pretrained is released")
        for name in [n for n in self.pipe.components if n.startswith("text_encoder")]:
            setattr(self.pipe, name, None)
        self._released = True

    def _conditions(self, prompt: str | Sequence[str], batch: int) -> list[Any]:
        prompts = [prompt] * batch if isinstance(prompt, str) else list(prompt)
        if len(prompts) != batch:
            raise ValueError(f"{len(prompts)} prompts for {batch} images: give one prompt, or one an image")
        known = {**self._recent, **self._prompts}
        new = [p for p in dict.fromkeys(prompts) if p not in known]
        if new and self._released:
            raise ValueError(f"the text encoders were released; known prompts are {list(known)}, not {new[0]!r}")
        if new:
            with torch.no_grad():
                encoded = dict(zip(new, self.family.encode_prompts(self.pipe, new), strict=True))
            known |= encoded
            if self.owned:
                self._recent = dict([*self._recent.items(), *encoded.items()][-RECENT:])
        return [known[p] for p in prompts]

    # ---- nn.Module --------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FeatureExtractor:
        """``.to()`` and its kin reach an owned pipeline too; a caller's pipeline stays where it is."""
        super()._apply(fn, recurse)
        if self.owned:
            for module in self.pipe.components.values():
                if isinstance(module, nn.Module) and module is not self._modules.get("trained"):
                    module._apply(fn)
        return self


def _is_single(t: Any) -> bool:
    """Whether ``t`` is meant as one timestep; what is no sequence is one, and ``check_t`` says if it is a wrong one."""
    return not isinstance(t, Iterable) or getattr(t, "ndim", 1) == 0


def _mean(results: Iterator[dict[str, Tensor]], count: int) -> dict[str, Tensor]:
    """Mean over ``count`` results, summed in at least float32 as they come."""
    first = next(results)
    if count == 1:
        return first
    total = {id: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for id, tensor in first.items()}
    for result in results:
        total = {id: total[id] + tensor for id, tensor in result.items()}
    return {id: (tensor / count).to(first[id].dtype) for id, tensor in total.items()}


def _check_finite(features: dict[str, Tensor]) -> None:
    for id, tensor in features.items():
        if not torch.isfinite(tensor).all():
            half = " Load the model with, or ask for output_dtype, torch.float32 or torch.bfloat16."
            remedy = half if tensor.dtype == torch.float16 else ""
            raise FloatingPointError(f"{id} has infinite or undefined values in {tensor.dtype}.{remedy}")
