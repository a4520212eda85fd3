"""Adapters of peft in a pipeline: added, switched on, kept for a while, and taken away without a trace."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

from ..families import unwrap
from ..in_turn import in_turn
from ..truncating import untruncated

OFFLOADING = ("_hf_hook", "_old_forward", "forward", "_diffusers_hook")


@dataclass
class _Held:
    """Adapters that stay in one denoiser's pipeline.

    Attributes:
        names: of each file, the adapter.
        busy: adapters that a call has switched on.
        holders: how many contexts want them there.
        undo: takes all of them away.
    """

    names: dict[Path, str] = field(default_factory=dict)
    busy: set[str] = field(default_factory=set)
    holders: int = 0
    undo: ExitStack = field(default_factory=ExitStack)


_HELD: weakref.WeakKeyDictionary[nn.Module, _Held] = weakref.WeakKeyDictionary()


@contextmanager
def held(fx: Any, file: Path, layers: list[str], pickle: bool) -> Iterator[None]:
    """The adapter of a file stays in the pipeline of an extractor while inside, switched off.

    Contexts of one model may end in any order: everything is taken away when the last of them ends.

    Args:
        layers: that the file changes, by name.
        pickle: the file may be one.

    Raises:
        ValueError: it does not fit the model.
    """
    denoiser = unwrap(fx.denoiser)
    with fx._lock:
        shelf = _HELD.setdefault(denoiser, _Held())
        shelf.holders += 1
    try:
        with fx._lock:
            if file not in shelf.names:
                shelf.names[file] = shelf.undo.enter_context(_added(fx, file, layers, pickle))
        yield
    finally:
        with fx._lock:
            shelf.holders -= 1
            if not shelf.holders:
                del _HELD[denoiser]
                shelf.undo.close()


@contextmanager
def adapter(fx: Any, file: Path, layers: list[str], pickle: bool) -> Iterator[str]:
    """The name of a file's adapter in the pipeline, switched off: one that is held there, or added for the while.

    Raises:
        ValueError: it does not fit the model.
    """
    shelf = _HELD.get(unwrap(fx.denoiser), _Held())
    name = shelf.names.get(file)
    if name is None or name in shelf.busy:  # the same file twice in a call counts twice
        with _added(fx, file, layers, pickle) as name:
            yield name
        return
    shelf.busy.add(name)
    try:
        yield name
    finally:
        shelf.busy.discard(name)


@contextmanager
def switched_on(pipe: Any, name: str, scale: float) -> Iterator[None]:
    """An adapter acts inside, beside those that act already; afterwards these are as they were.

    Raises:
        ValueError: the caller has fused adapters into the weights, so that layers would pass this one by.
    """
    _refuse_fused(pipe)
    layers = [layer for layer in _tuned(pipe) if name in getattr(layer, "scaling", {})]
    states = {layer: _state(layer) for layer in layers}
    gradients = _gradients(_components(pipe))
    try:
        for layer in layers:
            acting = [] if layer.disable_adapters else [*layer.active_adapters]
            layer.set_adapter([*acting, name])
            layer.set_scale(name, scale)
            layer._disable_adapters = False
        _put_back(gradients)  # peft lets what acts learn
        yield
    finally:
        for layer, state in states.items():
            _restore(layer, state)
        _put_back(gradients)


def changes_text(fx: Any, name: str) -> bool:
    """Whether an adapter is in a text encoder too."""
    of_denoiser = set(unwrap(fx.denoiser).modules())
    return any(name in getattr(layer, "scaling", {}) and layer not in of_denoiser for layer in _tuned(fx.pipe))


@contextmanager
def _added(fx: Any, file: Path, layers: list[str], pickle: bool) -> Iterator[str]:
    """One more adapter in the pipeline inside, switched off and frozen; its name, which no other can have."""
    pipe, name = fx.pipe, f"suppression_{uuid.uuid4().hex}"
    _refuse_fused(pipe)
    with ExitStack() as stack:
        for component in _components(pipe):
            stack.enter_context(_unchanged(component))
        gradients = _gradients(_components(pipe))
        before = {layer: _state(layer) for layer in _tuned(pipe)}
        _load(pipe, file, name, pickle)
        new = [layer for layer in _tuned(pipe) if name in getattr(layer, "scaling", {})]
        whole = untruncated(unwrap(fx.denoiser)) is None  # else a LoRA of the whole model has layers too many
        if not new or (whole and len(new) < len(layers)):
            example = f", such as {layers[0]}," if layers else ""
            raise ValueError(
                f"{file} was made for another model: of its {len(layers) or 'unknown'} layers{example} "
                f"{len(layers) - len(new) if new else 'all'} have no place in {type(unwrap(fx.denoiser)).__name__}"
            )
        for layer in _tuned(pipe):
            active, _, disabled = before.get(layer, ([], {}, False))
            layer.set_adapter(active)
            layer._disable_adapters = disabled
        _put_back(gradients)  # peft freezes everything but its own
        yield name


def _refuse_fused(pipe: Any) -> None:
    """A layer with fused adapters passes others by, and loading one would take them out of its weights."""
    if any(layer.merged for layer in _tuned(pipe)):
        raise ValueError("the pipeline's own adapters are fused into its weights: call pipe.unfuse_lora() first")


@in_turn
def _load(pipe: Any, file: Path, name: str, pickle: bool) -> None:
    """Loads a LoRA through diffusers, as an adapter of this name."""
    with loading(file):
        pipe.load_lora_weights(
            str(file.parent), weight_name=file.name, adapter_name=name,
            use_safetensors=None if pickle else True, local_files_only=True,
        )  # fmt: skip


@contextmanager
def loading(file: Path) -> Iterator[None]:
    """What diffusers would log while it loads a file is raised, as a ValueError that names the file."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{file} does not fit this model: {_reason(error)}") from error
    finally:
        diffusers.utils.logging.set_verbosity(level)


def _reason(error: Exception) -> str:
    """The first complaint of an error that may list hundreds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)


# ---- without a trace ------------------------------------------------------------------------------------------------


def _gradients(components: list[nn.Module]) -> dict[nn.Parameter, bool]:
    return {p: p.requires_grad for component in components for p in component.parameters()}


def _put_back(gradients: dict[nn.Parameter, bool]) -> None:
    for parameter, flag in gradients.items():
        parameter.requires_grad_(flag)


def _components(pipe: Any) -> list[nn.Module]:
    found = (getattr(pipe, name, None) for name in pipe._lora_loadable_modules)
    return [module for module in found if isinstance(module, nn.Module)]


def _tuned(pipe: Any) -> list[Any]:
    """The layers of a pipeline that adapters wrap."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [m for component in _components(pipe) for m in component.modules() if isinstance(m, BaseTunerLayer)]


@contextmanager
def _unchanged(component: Any) -> Iterator[None]:
    """Adapters that are added inside are taken away at the end, and those from before are as they were."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = dict(component.named_modules())
    attributes = {module: _attributes(module) for module in modules.values()}  # loaders leave marks of their own
    gradients = _gradients([component])
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
        _put_back(gradients)


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
