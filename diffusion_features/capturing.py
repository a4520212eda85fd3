"""The only place that touches a running model: forward hooks, one interception of attention, and the early stop.

Almost every softmax attention of diffusers ends in ``torch.nn.functional.scaled_dot_product_attention``. While a
requested attention layer runs, and only then, a ``TorchFunctionMode`` sees that call with its exact query and key, so
one small function yields the maps of every model while the model keeps its fused attention. No processor of a layer
whose map is not asked for is touched, and no file of another library is patched.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .activations import Activation, Layout, Spec, select
from .attention_call import AttentionCall, attention_call
from .attention_map import attention_map, take
from .families import family_of, offered, unwrap

BY_SDPA = {
    "AttnProcessor": AttnProcessor2_0,
    "SlicedAttnProcessor": AttnProcessor2_0,
    "XFormersAttnProcessor": AttnProcessor2_0,
    "XFormersJointAttnProcessor": JointAttnProcessor2_0,
}
"""diffusers' processors that hide the probabilities, and the one that computes the same by SDPA."""


class CaptureError(RuntimeError):
    """Something that was asked for could not be captured."""


class CFGPair(NamedTuple):
    """The two halves of a classifier-free guidance batch, each (B, ...)."""

    uncond: Tensor
    cond: Tensor


@contextmanager
def capture(
    denoiser: nn.Module,
    activations: Spec | list[Activation],
    *,
    stop_early: bool = False,
    steps: Collection[int] | None = None,
    heads: Literal["each", "mean"] = "each",
    split_cfg: bool = False,
    grad: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    reduce: Callable[[str, Any], Any] | Mapping[str, Callable[[str, Any], Any]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Capture activations while a denoiser runs: in a direct call, in training, or inside a pipeline's generation.

    >>> with capture(unet, ["mid-vit-block0-cross-q", "up-level1-*-res-out"]) as features:
    ...     unet(latents, t, encoder_hidden_states=text)
    >>> features["mid-vit-block0-cross-q"].shape  # (B, C, h, w)

    Args:
        denoiser: a diffusers denoiser; compiled, distributed and PEFT-wrapped ones too. Of one that has no family (see
            ``list_activations``), what its modules return can be captured, under their dotted paths.
        activations: an id, a glob, a file, a list of these, an id→bool mapping, or chosen ``Activation`` objects.
        stop_early: leave the denoiser, and the body of the ``with``, as soon as everything asked for is there.
        steps: 0-based calls of the denoiser to keep; the result is then ``{id: {call: tensor}}``. Without it the last
            call wins.
        heads: ``each`` keeps maps as (B, heads, queries, keys); ``mean`` averages them to (B, 1, queries, keys).
        split_cfg: the batch is [unconditional; conditional]; every tensor becomes a ``CFGPair``.
        grad: keep the autograd graph; otherwise captures are detached.
        device, dtype: where to put captures as soon as they are made; by default as the model makes them.
        reduce: called with each id and its tensor, while the denoiser runs; for a map with its ``AttentionCall``, and
            no map is made. What it returns is kept instead. It is called without gradients, unless ``grad``, and must
            not change what it is given. ``heads``, ``split_cfg``, ``device`` and ``dtype`` do not apply. A mapping has
            such a function for some ids, and the others are captured as without it.

    Yields:
        id → tensor, filled while the denoiser runs: (B, C, h, w), (B, tokens, C) for text-side ids, or
        (B, heads, queries, keys) for maps. Every tensor is a contiguous copy. Where a layer makes several attention
        calls (IP-Adapter, PAG), the map is that of the first.

    Raises:
        UnknownActivation: an id, glob or file names nothing in this denoiser.
        CaptureError: on a clean exit, an activation was never reached; or a map is wanted with gradients inside a
            checkpointed block.

    Only the thread that entered is captured and stopped. The denoiser is the same before and after, bit for bit,
    whatever happens inside.
    """
    inner = unwrap(denoiser)
    chosen = _chosen(inner, activations)
    recorder = _Recorder(
        inner, chosen, stop_early=stop_early, steps=steps, heads=heads, split_cfg=split_cfg, grad=grad,
        device=device, dtype=dtype, reduce=reduce,
    )  # fmt: skip
    if grad:
        _refuse_checkpointed_maps(inner, chosen)
    with ExitStack() as stack:
        if _compiled(denoiser, inner, chosen):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for activation in chosen:
            if activation.tap == "attention":
                stack.enter_context(_sdpa_processor(inner.get_submodule(activation.module)))
        for handle in recorder.hooks():
            stack.callback(handle.remove)
        try:
            yield recorder.features
        except _Stop as stop:
            if stop.recorder is not recorder:
                raise
    recorder.check()


def _chosen(denoiser: nn.Module, activations: Spec) -> list[Activation]:
    if isinstance(activations, list) and activations and all(isinstance(a, Activation) for a in activations):
        return activations
    return select(offered(denoiser), activations)


class _Stop(Exception):
    """Everything is there. Caught by the capture it belongs to."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__("every activation asked for has been captured")
        self.recorder = recorder


class _Recorder:
    """What one ``capture`` knows while the denoiser runs."""

    def __init__(
        self,
        denoiser: nn.Module,
        chosen: list[Activation],
        *,
        stop_early: bool,
        steps: Collection[int] | None,
        heads: Literal["each", "mean"],
        split_cfg: bool,
        grad: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        reduce: Callable[[str, Any], Any] | Mapping[str, Callable[[str, Any], Any]] | None,
    ) -> None:
        if heads not in ("each", "mean"):
            raise ValueError(f"heads must be 'each' or 'mean', not {heads!r}")
        self.features: dict[str, Any] = {}
        self.denoiser, self.chosen = denoiser, chosen
        self.stop_early, self.steps, self.split_cfg, self.grad = stop_early, steps, split_cfg, grad
        self.head_mean, self.device, self.dtype = heads == "mean", device, dtype
        self.reduce = dict.fromkeys((a.id for a in chosen), reduce) if callable(reduce) else dict(reduce or {})
        self.thread = threading.get_ident()
        self.call = -1
        self.running = False
        self.missing: set[str] = set()
        self.layouts: dict[str, Layout] = {}
        self.parts: dict[str, list[Tensor]] = {}

    # A recomputation by gradient checkpointing runs modules outside a call of the denoiser: it is not recorded again.
    @property
    def listening(self) -> bool:
        wanted = self.steps is None or self.call in self.steps
        return self.running and wanted and threading.get_ident() == self.thread

    def hooks(self) -> Iterator[RemovableHandle]:
        root = self.denoiser
        yield root.register_forward_pre_hook(self._begin)
        yield root.register_forward_hook(self._end, always_call=True)
        for path in dict.fromkeys(a.layout for a in self.chosen if a.layout is not None):
            yield root.get_submodule(path).register_forward_pre_hook(self._note_layout(path), with_kwargs=True)
        for activation in self.chosen:
            yield from self._tap(activation)

    def _tap(self, activation: Activation) -> Iterator[RemovableHandle]:
        module, part = _resolve(self.denoiser, activation)
        whole = self.denoiser.get_submodule(activation.whole) if activation.whole else None
        if activation.tap == "attention":
            yield from self._tap_attention(activation, module)
        elif getattr(whole, "_chunk_size", None) is not None:
            assert whole is not None
            yield self._listen(module, activation, self._on_chunk(activation))
            yield whole.register_forward_hook(self._on_whole(activation, whole._chunk_dim))  # type: ignore[arg-type]
        else:
            yield self._listen(module, activation, self._on_tensor(activation, part))

    def _listen(self, module: nn.Module, activation: Activation, use: Callable[[Any], None]) -> RemovableHandle:
        """Hand the tapped input or output of a module to ``use``."""
        if activation.tap == "input":
            return module.register_forward_pre_hook(lambda m, args: use(args[0]) if self.listening else None)
        return module.register_forward_hook(lambda m, args, output: use(output) if self.listening else None)

    def _tap_attention(self, activation: Activation, module: nn.Module) -> Iterator[RemovableHandle]:
        modes: list[_AttentionMode] = []

        def enter(*_: Any) -> None:
            if self.listening:
                modes.append(_AttentionMode(self, activation))
                modes[-1].__enter__()

        def leave(*_: Any) -> None:
            if modes and threading.get_ident() == self.thread:
                modes.pop().__exit__(None, None, None)

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave, always_call=True)

    def _begin(self, *_: Any) -> None:
        if threading.get_ident() == self.thread:
            self.call += 1
            self.running = True
            self.missing = {a.id for a in self.chosen}

    def _end(self, *_: Any) -> None:
        if threading.get_ident() == self.thread:
            self.running = False

    def _note_layout(self, path: str) -> Callable[..., None]:
        family = family_of(self.denoiser)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.listening:
                self.layouts[path] = family.layout(module, args, kwargs)

        return hook

    def _on_tensor(self, activation: Activation, part: slice) -> Callable[[Any], None]:
        def use(output: Any) -> None:
            several = isinstance(output, tuple)
            tensor = output[activation.index] if several else getattr(output, "sample", output)
            if not isinstance(tensor, Tensor):
                raise CaptureError(f"{activation.id} returns a {type(tensor).__name__}, no tensor: name a part of it")
            self.record(activation, tensor[..., part] if part != slice(None) else tensor)

        return use

    def _on_chunk(self, activation: Activation) -> Callable[[Tensor], None]:
        return lambda tensor: self.parts.setdefault(activation.id, []).append(tensor)

    def _on_whole(self, activation: Activation, dim: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self.listening:
                self.record(activation, torch.cat(self.parts.pop(activation.id), dim=dim))

        return hook

    def record(self, activation: Activation, tensor: Tensor) -> None:
        """Keep a copy: the model may go on to change its own tensor in place (FreeU and T2I-Adapters do)."""
        layout = self.layouts[activation.layout] if activation.layout is not None else None
        if layout and activation.joint and activation.kind != "map":
            tensor = take(tensor, layout.image if activation.kind == "spatial" else layout.text, -2)
        if layout and activation.kind == "spatial":
            tensor = tensor.transpose(1, 2).unflatten(2, layout.grid)
        if activation.id in self.reduce:
            self.keep_reduced(activation, tensor)
            return
        if not self.grad:
            tensor = tensor.detach()
        tensor = tensor.to(device=self.device, dtype=self.dtype or tensor.dtype, copy=activation.kind != "map")
        self._keep(activation.id, self._halves(activation.id, tensor.contiguous()))

    def keep_reduced(self, activation: Activation, found: Tensor | AttentionCall) -> None:
        """Keep what ``reduce`` makes of something that was asked for."""
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            self._keep(activation.id, self.reduce[activation.id](activation.id, found))

    def part(self, activation: Activation) -> tuple[slice | Tensor, slice | Tensor]:
        """Queries and keys of a map: all of a layer of its own, a block of a joint one."""
        if not activation.joint or activation.layout is None:
            return slice(None), slice(None)
        layout = self.layouts[activation.layout]
        queries = layout.text if activation.role == "text-map" else layout.image
        keys = layout.text if activation.role == "cross-map" else layout.image
        return queries, keys

    def _halves(self, id: str, tensor: Tensor) -> Tensor | CFGPair:
        if not self.split_cfg:
            return tensor
        if tensor.shape[0] % 2:
            raise CaptureError(f"split_cfg needs an even batch of [uncond; cond]; {id} has {tensor.shape[0]}")
        return CFGPair(*tensor.chunk(2))

    def _keep(self, id: str, value: Any) -> None:
        if self.steps is None:
            self.features[id] = value
        else:
            self.features.setdefault(id, {})[self.call] = value
        self.missing.discard(id)
        if self.stop_early and not self.missing and self._no_later_step():
            raise _Stop(self)

    def _no_later_step(self) -> bool:
        return self.steps is None or self.call >= max(self.steps)

    def check(self) -> None:
        """Raises CaptureError for what was asked for and never came."""
        if self.call < 0:
            raise CaptureError("nothing was captured: the denoiser was not called inside the 'with', in its thread")
        absent = [a for a in self.chosen if a.id not in self.features]
        if absent:
            raise CaptureError("; ".join(self._why(a) for a in absent[:5]))
        if self.steps is not None and (late := sorted(s for s in self.steps if s > self.call)):
            raise CaptureError(f"the denoiser was called {self.call + 1} times; there are no steps {late}")

    def _why(self, activation: Activation) -> str:
        if activation.tap != "attention":
            return f"{activation.id} was never reached"
        processor = type(getattr(self.denoiser.get_submodule(activation.module), "processor", None)).__name__
        return f"{activation.id}: its layer made no scaled_dot_product_attention call (processor {processor})"


class _AttentionMode(TorchFunctionMode):
    """Alive while one requested attention layer runs; its first attention call is the layer's map."""

    def __init__(self, recorder: _Recorder, activation: Activation) -> None:
        super().__init__()
        self.recorder, self.activation, self.seen = recorder, activation, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention or self.seen:
            return func(*args, **kwargs)
        self.seen = True
        if self.activation.id not in self.recorder.reduce:
            self._record(*args, **kwargs)
            return func(*args, **kwargs)
        output = func(*args, **kwargs)
        self.recorder.keep_reduced(self.activation, self._call(output, *args, **kwargs))
        return output

    def _call(self, output: Tensor, *args: Any, **kwargs: Any) -> AttentionCall:
        recorder, activation = self.recorder, self.activation
        rows, columns = recorder.part(activation)
        assert activation.layout is not None
        grid = recorder.layouts[activation.layout].grid
        module = recorder.denoiser.get_submodule(activation.module)
        return attention_call(module, rows, columns, grid, output, *args, **kwargs)

    def _record(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        rows, columns = self.recorder.part(self.activation)
        with torch.set_grad_enabled(self.recorder.grad and torch.is_grad_enabled()):
            probabilities = attention_map(
                query, key, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
                head_mean=self.recorder.head_mean, rows=rows, columns=columns,
            )  # fmt: skip
        self.recorder.record(self.activation, probabilities)


def _resolve(denoiser: nn.Module, activation: Activation) -> tuple[nn.Module, slice]:
    """The module that really runs, and which channels of its output are meant: ``fuse_qkv_projections`` joins some."""
    if activation.start is not None:
        part = slice(activation.start, activation.start + activation.channels)
        return denoiser.get_submodule(activation.module), part
    parent_path, _, name = activation.module.rpartition(".")
    parent: Any = denoiser.get_submodule(parent_path)
    if not (getattr(parent, "fused_projections", False) and name in ("to_q", "to_k", "to_v")):
        return denoiser.get_submodule(activation.module), slice(None)
    fused, names = (
        (parent.to_kv, ["to_k", "to_v"])
        if getattr(parent, "is_cross_attention", False)
        else (parent.to_qkv, ["to_q", "to_k", "to_v"])
    )
    if name not in names:
        return getattr(parent, name), slice(None)
    if activation.tap == "input":
        return fused, slice(None)
    start = sum(getattr(parent, n).out_features for n in names[: names.index(name)])
    return fused, slice(start, start + getattr(parent, name).out_features)


@contextmanager
def _sdpa_processor(attention: Any) -> Iterator[None]:
    """Let a layer attend through SDPA for the duration if its own processor or backend hides the probabilities."""
    own = attention.processor
    substitute = BY_SDPA.get(type(own).__name__) if getattr(attention, "scale_qk", True) else None
    if substitute is not None:
        attention.processor = substitute()
    elif hasattr(own, "_attention_backend"):
        attention.processor = copy.copy(own)
        attention.processor._attention_backend = AttentionBackendName.NATIVE
    try:
        yield
    finally:
        attention.processor = own


def _compiled(denoiser: nn.Module, inner: nn.Module, chosen: list[Activation]) -> bool:
    """Whether torch.compile has anything that holds a tap: a hook added after compiling would never fire there."""
    around: Iterable[nn.Module]
    if denoiser is inner:  # walking every module would take longer than all the hooks together
        around = (inner.get_submodule(path) for path in {p for a in chosen for p in _prefixes(a.module)})
    else:
        around = denoiser.modules()
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in around)


def _prefixes(path: str) -> list[str]:
    """The paths from a denoiser, "", down to one of its modules."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]


def _refuse_checkpointed_maps(denoiser: nn.Module, chosen: list[Activation]) -> None:
    for activation in chosen:
        for path in _prefixes(activation.module)[:-1]:
            block = denoiser.get_submodule(path)
            if activation.kind == "map" and getattr(block, "gradient_checkpointing", False):
                name = path or "the denoiser"
                raise CaptureError(
                    f"{activation.id} with gradients lies inside {name}, which is checkpointed; disable gradient "
                    "checkpointing there, or capture without grad"
                )
