"""Whether the weights of a pipeline fit into memory, told before they are read, and what would where they do not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from safetensors import safe_open

IN_A_CALL = (
    "What needs less: smaller images, fewer at a time, fewer maps or heads='mean', output_device='cpu'; or the model "
    "loaded with a quantization_config, or with device='cpu' and then pipe.enable_model_cpu_offload() or "
    "pipe.enable_group_offload(...)."
)


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free for new tensors; ``None`` where nobody can say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) if device.type == "cpu" else None


STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def sizes_of(files: Sequence[Path], dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Name → number of elements, of those tensors in safetensors files that take memory of their own once loaded.

    On the CPU, tensors that are stored in ``dtype`` do not: they are mapped from the file. Only headers are read.
    """
    mapped = STORED.get(dtype) if device.type == "cpu" else None
    sizes: dict[str, int] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            sizes |= {name: math.prod(x.get_shape()) for name, x in slices.items() if x.get_dtype() != mapped}
    return sizes


def too_large(
    parts: Mapping[str, Mapping[str, int]], blocks: Sequence[str], dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why a pipeline cannot be loaded onto a device, and what can; ``None`` if its weights fit.

    Args:
        parts: component → its tensors that would be loaded, and how many elements each has.
        blocks: dotted paths, inside ``transformer``, of the blocks that would be loaded, in forward order.
        dtype: of the weights once loaded.
    """
    free = free_bytes(device)
    if free is None:
        return None
    size = {part: sum(tensors.values()) * dtype.itemsize for part, tensors in parts.items()}
    whole = sum(size.values())
    if whole <= free:
        return None
    each = ", ".join(f"{part} {_gib(n)}" for part, n in sorted(size.items(), key=lambda item: -item[1]))
    needs = f"the weights take {_gib(whole)} in {str(dtype).removeprefix('torch.')} ({each}); {device} has {_gib(free)}"
    fitting = list(_fitting(parts, size, blocks, dtype, device, free))
    advice = "What would fit: " + "; ".join(fitting) if fitting else "Nothing that diffusers offers would fit"
    return f"{needs} free. {advice}."


def _fitting(
    parts: Mapping[str, Mapping[str, int]],
    size: Mapping[str, int],
    blocks: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    free: int,
) -> Iterator[str]:
    whole = sum(size.values())
    kept = whole
    for number, block in reversed(list(enumerate(blocks))):
        if kept <= free:
            yield f"activations no deeper than vit-block{number} ({_gib(kept)})"
            break
        kept -= _within(parts["transformer"], [block]) * dtype.itemsize
    if dtype.itemsize > 2 and whole * 2 // dtype.itemsize <= free:
        yield f"dtype=torch.bfloat16 ({_gib(whole * 2 // dtype.itemsize)})"
    denoiser = max(size, key=lambda part: size[part] if part in ("transformer", "unet") else -1)
    quantised = whole - size[denoiser] + size[denoiser] // dtype.itemsize
    if dtype.itemsize > 1 and quantised <= free:
        yield f"a quantization_config that makes the {denoiser} int8 (about {_gib(quantised)})"
    if device.type == "cpu":
        return
    if max(size.values()) <= free:
        yield f"device='cpu', then pipe.enable_model_cpu_offload() ({_gib(max(size.values()))} at a time)"
    largest = max((_within(parts["transformer"], [block]) * dtype.itemsize for block in blocks), default=free + 1)
    if largest <= free:
        yield f"device='cpu', then pipe.enable_group_offload(...) ({_gib(largest)} for the largest block)"


def _within(tensors: Mapping[str, int], paths: Sequence[str]) -> int:
    """Elements of the tensors inside some modules."""
    inside = re.compile(rf"(?:{'|'.join(map(re.escape, paths))})\.")
    return sum(n for name, n in tensors.items() if inside.match(name))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


@contextmanager
def advised() -> Iterator[None]:
    """Where memory runs out inside, the error, whatever it is, also says what needs less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            error.add_note(IN_A_CALL)
        raise
