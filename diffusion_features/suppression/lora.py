"""LoRAs: small changes of the weights, learnt from a few images of the domain, for the duration of a call."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import nn

from ..families import unwrap
from ..loading import PICKLES, LoadError, resolve
from ..truncating import untruncated
from .technique import Call, Technique

DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight", ".lora_A.default.weight")
OFFLOADING = ("_hf_hook", "_old_forward", "forward", "_diffusers_hook")
STANDARD = "pytorch_lora_weights.safetensors"


@dataclass
class LoRA(Technique):
    """A LoRA trained on images of the domain (arXiv 2106.09685; for features arXiv 2410.06719).

    >>> fx(photo, suppress=[LoRA("horses.safetensors"), LoRA("overfitted.safetensors", scale=0.5)])

    It is loaded through diffusers and peft when a call begins and unloaded when it ends, never fused: the weights of
    the model are not touched, and adapters that it has already stay as they are. Several in one call add up.

    Args:
        source: a ``.safetensors`` file, in the format of diffusers, peft or kohya; a folder with one; or a hub id.
        scale: multiplies the change; 0 gives the features of the model alone.
        weight_name: which file of a folder or hub repository, if it has several.
        pickle: allow a file that is no safetensors; opening a pickle can run any code hidden in it.
    """

    source: str | os.PathLike[str]
    scale: float = 1.0
    weight_name: str | None = None
    pickle: bool = False
    _file: Path | None = field(default=None, init=False, repr=False, compare=False)

    @contextmanager
    def applied(self, fx: Any, call: Call) -> Iterator[None]:
        """The model with this LoRA. Prompts are encoded anew inside if it changes a text encoder.

        Raises:
            LoadError: the file is missing, damaged, or a pickle that is not allowed.
            ValueError: it was made for another model, or the model takes none, or its text encoder was released.
        """
        pipe = fx.pipe
        if not hasattr(pipe, "load_lora_weights"):
            raise ValueError(f"diffusers loads no LoRA into a {type(pipe).__name__}")
        if self._file is None:
            self._file = find_weights(self.source, self.weight_name, self.pickle)
        layers = _layers(self._file)
        texts = sorted({name.split(".")[0] for name in layers if name.startswith(("text_encoder", "lora_te"))})
        if texts and fx._released:
            raise ValueError(f"{self._file} changes the text encoder, which was released: load without prompts=")
        gradients = {p: p.requires_grad for component in _components(pipe) for p in component.parameters()}
        with ExitStack() as stack:
            stack.enter_context(_unchanged(_components(pipe)))
            self._load(pipe, layers, whole=untruncated(unwrap(fx.denoiser)) is None)
            for parameter, flag in gradients.items():  # peft freezes everything but its own
                parameter.requires_grad_(flag)
            if texts:
                stack.enter_context(_forgotten_prompts(fx))
            yield

    def _load(self, pipe: Any, layers: list[str], whole: bool) -> None:
        """Adds the layers to the pipeline as one more active adapter.

        Args:
            layers: those in the file.
            whole: the denoiser was not loaded only in part, so that every layer must have its place.
        """
        assert self._file is not None
        name = f"suppression_{uuid.uuid4().hex}"  # no other adapter can have it
        before = {layer: [*layer.active_adapters] for layer in _tuned(pipe)}
        level = diffusers.utils.logging.get_verbosity()
        diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)  # what it logs is raised below
        try:
            pipe.load_lora_weights(
                str(self._file.parent), weight_name=self._file.name, adapter_name=name,
                use_safetensors=None if self.pickle else True, local_files_only=True,
            )  # fmt: skip
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{self._file} does not fit this model: {_reason(error)}") from error
        finally:
            diffusers.utils.logging.set_verbosity(level)
        new = [layer for layer in _tuned(pipe) if name in getattr(layer, "scaling", {})]
        if not new or (whole and len(new) < len(layers)):
            raise ValueError(
                f"{self._file} was made for another model: of its {len(layers)} layers, such as {layers[0]}, "
                f"{len(layers) - len(new)} have no place in {type(unwrap(pipe_denoiser(pipe))).__name__}"
            )
        for layer in new:
            layer.set_adapter([*(a for a in before.get(layer, []) if a != name), name])
            layer.set_scale(name, self.scale)
            layer.requires_grad_(False)


def pipe_denoiser(pipe: Any) -> nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer


def _reason(error: Exception) -> str:
    """The first complaint of an error that may list hundreds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)


def find_weights(source: str | os.PathLike[str], weight_name: str | None, pickle: bool) -> Path:
    """The local file of a LoRA: a file, one of a folder, or one of a hub repository, which is then downloaded.

    Raises:
        LoadError: there is none, several, or only a pickle and these are not allowed.
    """
    path = Path(os.fspath(source)).expanduser()
    if path.is_file():
        return _allowed(path, pickle)
    if path.suffix in (".safetensors", *PICKLES):
        raise LoadError(f"There is no file {path}.")
    found = resolve(source)
    if isinstance(found, str):
        try:
            return _allowed(Path(hf_hub_download(found, weight_name or STANDARD)), pickle)
        except OSError as error:
            raise LoadError(f"no LoRA {weight_name or STANDARD} in {found}: {' '.join(str(error).split())}") from error
    if weight_name is not None:
        if not (found / weight_name).is_file():
            raise LoadError(f"There is no {weight_name} in {found}.")
        return _allowed(found / weight_name, pickle)
    files = sorted(f for f in found.iterdir() if f.suffix in (".safetensors", *PICKLES))
    tensors = [f for f in files if f.suffix == ".safetensors"]
    if not files:
        raise LoadError(f"{found} holds no LoRA: no .safetensors file is there.")
    if len(tensors or files) > 1:
        names = ", ".join(f.name for f in tensors or files)
        raise LoadError(f"{found} holds several files: choose one by weight_name: {names}.")
    return _allowed((tensors or files)[0], pickle)


def _allowed(path: Path, pickle: bool) -> Path:
    if path.suffix != ".safetensors" and not pickle:
        raise LoadError(
            f"{path} is no safetensors file, and opening a pickle can run any code hidden in it. "
            "Use safetensors, or pass pickle=True if you trust its author."
        )
    return path


def _layers(path: Path) -> list[str]:
    """The layers that a LoRA file changes, by the names of their down-projections; of a pickle, none are known.

    Raises:
        LoadError: it is damaged, or no LoRA.
    """
    if path.suffix != ".safetensors":
        return []
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise LoadError(f"{path} is no safetensors file, or is damaged ({error}).") from error
    found = sorted(name for name in names if name.endswith(DOWN))
    if not found:
        raise LoadError(f"{path} is no LoRA: its weights are named {', '.join(names[:3])} ...")
    return found


# ---- without a trace ------------------------------------------------------------------------------------------------


def _components(pipe: Any) -> list[nn.Module]:
    found = (getattr(pipe, name, None) for name in pipe._lora_loadable_modules)
    return [module for module in found if isinstance(module, nn.Module)]


def _tuned(pipe: Any) -> list[Any]:
    """The layers of a pipeline that adapters wrap."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [m for component in _components(pipe) for m in component.modules() if isinstance(m, BaseTunerLayer)]


@contextmanager
def _unchanged(components: list[nn.Module]) -> Iterator[None]:
    """Adapters that are added inside are taken away at the end, and those from before are as they were."""
    with ExitStack() as stack:
        for component in components:
            stack.enter_context(_component_unchanged(component))
        yield


@contextmanager
def _component_unchanged(component: Any) -> Iterator[None]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = dict(component.named_modules())
    attributes = {module: _attributes(module) for module in modules.values()}  # loaders leave marks of their own
    gradients = {parameter: parameter.requires_grad for parameter in component.parameters()}
    states = {m: _state(m) for m in modules.values() if isinstance(m, BaseTunerLayer)}
    configs = dict(getattr(component, "peft_config", {}))
    try:
        yield
    finally:
        _unwrap_new_layers(component, modules)
        for layer, state in states.items():
            _restore(layer, state)
        for name in set(getattr(component, "peft_config", {})) - set(configs):
            del component.peft_config[name]
        for module, before in attributes.items():
            for name in _attributes(module).keys() - before.keys():
                del module.__dict__[name]
            module.__dict__.update(before)
        for parameter, flag in gradients.items():
            parameter.requires_grad_(flag)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes, without those of offloading, which diffusers takes off and puts on again itself."""
    return {name: value for name, value in module.__dict__.items() if name not in OFFLOADING}


def _unwrap_new_layers(component: nn.Module, before: dict[str, nn.Module]) -> None:
    """Puts every module that was wrapped since back in its place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    new = [(path, m) for path, m in component.named_modules() if isinstance(m, BaseTunerLayer)]
    for path, layer in new:
        if path in before and layer is not before[path]:
            parent, _, name = path.rpartition(".")
            setattr(component.get_submodule(parent), name, before[path])


def _state(layer: Any) -> tuple[list[str], dict[str, float], bool]:
    return [*layer.active_adapters], dict(getattr(layer, "scaling", {})), layer.disable_adapters


def _restore(layer: Any, state: tuple[list[str], dict[str, float], bool]) -> None:
    active, scaling, disabled = state
    for name in set(getattr(layer, "scaling", {})) - set(scaling):
        layer.delete_adapter(name)
    layer.set_adapter(active)
    layer.scaling.update(scaling)
    layer._disable_adapters = disabled


@contextmanager
def _forgotten_prompts(fx: Any) -> Iterator[None]:
    """Prompts are encoded anew inside, by the text encoder as it is there, and nothing of that is kept."""
    before = fx._prompts, fx._recent
    fx._prompts, fx._recent = {}, {}
    try:
        yield
    finally:
        fx._prompts, fx._recent = before
