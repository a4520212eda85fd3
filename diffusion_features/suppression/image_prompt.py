"""IP-Adapters: the image itself as a prompt, through an image encoder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..families import unwrap
from ..in_turn import in_turn
from ..loading import LoadError, resolve
from .adapters import loading
from .once import once
from .technique import Call, Technique
from .weights import find_weights


@dataclass(frozen=True)
class _Parts:
    """What an IP-Adapter adds to a pipeline.

    Attributes:
        made_for: configuration of the UNet.
        processors: of its cross-attentions, by name.
        projection: from embeddings of the image to tokens.
        encoder, reader: from pixels to embeddings, and from images to pixels.
    """

    made_for: dict[str, Any]
    processors: dict[str, Any]
    projection: nn.Module
    encoder: nn.Module
    reader: Any


@dataclass
class IPAdapter(Technique):
    """An IP-Adapter whose image prompt is the image itself (arXiv 2308.06721; for features arXiv 2410.06719).

    >>> fx(photo, suppress=IPAdapter("h94/IP-Adapter", weight_name="models/ip-adapter_sd15.safetensors"))
    >>> fx(photo, suppress=IPAdapter("adapters/horses.safetensors", scale=0.5))

    Beside its attention to the prompt, each cross-attention attends to tokens of the image:
    ``Attention(Q, K, V) + scale · Attention(Q, K', V')`` (eq. 5). Activations named ``cross-map`` are those of the
    prompt. The image encoder sees the middle square of the image. Guidance (``CFG``) is about the prompt alone: both of
    its predictions see the image.

    Stable Diffusion, SDXL and other UNets have IP-Adapters here. A call loads them through diffusers, and they stay
    with this object; the model is as it was before, bit for bit, when the call is done.

    Args:
        source: a ``.safetensors`` file, a folder with one, or a hub id.
        scale: of the attention to the image; 0 gives the features of the model alone.
        weight_name: which file of a folder or hub repository, by its path there.
        image_encoder: folder of the image encoder (CLIP, with projection), from the folder of the file.
        pickle: allow weights that are no safetensors; opening a pickle can run any code hidden in it.
    """

    source: str | os.PathLike[str]
    scale: float = 1.0
    weight_name: str | None = None
    image_encoder: str = "image_encoder"
    pickle: bool = False
    _parts: _Parts | None = field(default=None, init=False, repr=False, compare=False)

    @contextmanager
    def applied(self, fx: Any, call: Call) -> Iterator[None]:
        """The UNet with this IP-Adapter, and every call of it with the image.

        Raises:
            LoadError: the file or the image encoder is missing, damaged, or a pickle that is not allowed.
            ValueError: it was made for another model, or the model takes none, or has an image prompt of its own.
        """
        parts = self._fitting(fx)
        unet: Any = unwrap(fx.denoiser)
        with _installed(fx.pipe, parts, self.scale):
            key = ("image prompt", parts.encoder, parts.projection)
            embeddings = once(call.pixels, key, lambda: _embeddings(fx, call)).to(unet.dtype)

            def show(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
                conditions = {**(kwargs.get("added_cond_kwargs") or {}), "image_embeds": [embeddings]}
                return args, {**kwargs, "added_cond_kwargs": conditions}

            handle = unet.register_forward_pre_hook(show, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()

    def _fitting(self, fx: Any) -> _Parts:
        """The parts for the extractor's UNet, on its device."""
        from diffusers.loaders import IPAdapterMixin  # slow to import, and talks to stderr

        unet: Any = unwrap(fx.denoiser)
        if not isinstance(fx.pipe, IPAdapterMixin):
            raise ValueError(
                f"IP-Adapters are for the UNets of pipelines that diffusers gives them to; {type(fx.pipe).__name__} "
                f"({type(unet).__name__}) is none"
            )
        if unet.encoder_hid_proj is not None:
            raise ValueError("this UNet has an image prompt of its own: call pipe.unload_ip_adapter() first")
        if self._parts is None or self._parts.made_for != dict(unet.config):
            file = find_weights(self.source, self.weight_name, self.pickle, "IP-Adapter", None)
            encoder = _load_encoder(*self._encoder_at(file), unet.dtype, self.pickle)
            self._parts = _load(fx.pipe, file, encoder, self.pickle)
        for part in (*self._parts.processors.values(), self._parts.projection, self._parts.encoder):
            part.to(fx.device)
        return self._parts

    def _encoder_at(self, file: Path) -> tuple[str, str]:
        """A folder or hub id, and the folder in it, of the image encoder."""
        source = resolve(self.source)
        if isinstance(source, Path):
            return str(file.parent), self.image_encoder
        assert self.weight_name is not None  # or the file would not have been found
        return source, os.path.normpath(Path(self.weight_name).parent / self.image_encoder)


@in_turn
def _load_encoder(source: str, folder: str, dtype: torch.dtype, pickle: bool) -> nn.Module:
    """The image encoder, frozen.

    Raises:
        LoadError: there is none, or not all of it.
    """
    from transformers import CLIPVisionModelWithProjection

    try:
        encoder, found = CLIPVisionModelWithProjection.from_pretrained(
            source, subfolder=folder, dtype=dtype, use_safetensors=None if pickle else True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise LoadError(
            f"the image encoder of the IP-Adapter, {folder} in {source}, cannot be loaded: {reason}"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise LoadError(f"{folder} in {source} is no CLIP image encoder with projection: it has no {missing[0]}.")
    return encoder.requires_grad_(False).eval()


@in_turn
def _load(pipe: Any, file: Path, encoder: nn.Module, pickle: bool) -> _Parts:
    """Loads an IP-Adapter through diffusers, and takes it off again.

    Raises:
        LoadError: the file is damaged, or no IP-Adapter.
        ValueError: it was made for another model, or reads faces.
    """
    layers = None if pickle and file.suffix != ".safetensors" else _layers(file)
    unet: Any = unwrap(pipe.unet)
    with _unchanged(pipe), loading(file):
        pipe.register_modules(image_encoder=encoder)
        pipe.load_ip_adapter(str(file.parent), "", file.name, image_encoder_folder=None, local_files_only=True)
        processors = {name: p for name, p in unet.attn_processors.items() if hasattr(p, "to_k_ip")}
        if layers is not None and layers != len(processors):
            raise ValueError(f"it has {layers} layers, this model has {len(processors)} cross-attentions")
        for part in (*processors.values(), unet.encoder_hid_proj):
            part.requires_grad_(False).eval()
        return _Parts(dict(unet.config), processors, unet.encoder_hid_proj, encoder, pipe.feature_extractor)


def _layers(file: Path) -> int:
    """How many cross-attentions a file is for."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
    except SafetensorError as error:
        raise LoadError(f"{file} is no safetensors file, or is damaged ({error}).") from error
    found = sum(name.startswith("ip_adapter.") and name.endswith(".to_k_ip.weight") for name in names)
    if not found or not any(name.startswith("image_proj.") for name in names):
        raise LoadError(f"{file} is no IP-Adapter: its weights are named {', '.join(names[:3])} ...")
    of_faces = "image_proj.norm.weight" in names and "image_proj.proj.weight" not in names
    if of_faces or "image_proj.perceiver_resampler.proj_in.weight" in names:
        raise ValueError(f"{file} is a FaceID adapter: it reads embeddings of faces, not images")
    return found


@contextmanager
def _installed(pipe: Any, parts: _Parts, scale: float) -> Iterator[None]:
    """The pipeline with an IP-Adapter in its UNet, while inside."""
    unet: Any = unwrap(pipe.unet)
    with _unchanged(pipe):
        pipe.register_modules(image_encoder=parts.encoder, feature_extractor=parts.reader)
        unet.set_attn_processor({**unet.attn_processors, **parts.processors})
        unet.encoder_hid_proj = parts.projection
        unet.config.encoder_hid_dim_type = "ip_image_proj"
        pipe.set_ip_adapter_scale(scale)
        yield


@contextmanager
def _unchanged(pipe: Any) -> Iterator[None]:
    """A pipeline without an IP-Adapter has none afterwards either."""
    unet: Any = unwrap(pipe.unet)
    processors, kind = unet.attn_processors, unet.config.encoder_hid_dim_type
    encoder, reader, config = pipe.image_encoder, pipe.feature_extractor, pipe._internal_dict
    try:
        yield
    finally:
        unet.set_attn_processor(dict(processors))
        del unet.encoder_hid_proj  # it is a module now, and was none
        unet.encoder_hid_proj = None
        unet.config.encoder_hid_dim_type = kind
        pipe.image_encoder, pipe.feature_extractor, pipe._internal_dict = encoder, reader, config


@torch.no_grad()
def _embeddings(fx: Any, call: Call) -> Tensor:
    """Of each image, as diffusers makes them: (B, 1, ...), one image a row of the batch."""
    (found,) = fx.pipe.prepare_ip_adapter_image_embeds([call.pictures], None, fx.device, 1, False)
    return found.transpose(0, 1)
