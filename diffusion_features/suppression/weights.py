"""Where the weights of an adapter are, on disk or on a hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import hf_hub_download

from ..loading import PICKLES, LoadError, resolve


def find_weights(
    source: str | os.PathLike[str],
    weight_name: str | None,
    pickle: bool,
    what: str = "LoRA",
    standard: str | None = "pytorch_lora_weights.safetensors",
) -> Path:
    """The local file of an adapter: a file, one of a folder, or one of a hub repository, which is then downloaded.

    Args:
        source: a file, a folder, or a hub id.
        weight_name: which file of a folder or a repository, by its path there.
        pickle: it may be a file that is no safetensors.
        what: kind of adapter, for messages.
        standard: the file of a repository where ``weight_name`` does not say.

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
        name = weight_name or standard
        if name is None:
            raise LoadError(f"{found} is a hub repository: say by weight_name which of its files is the {what}.")
        try:
            return _allowed(Path(hf_hub_download(found, name)), pickle)
        except OSError as error:
            raise LoadError(f"no {what} {name} in {found}: {' '.join(str(error).split())}") from error
    if weight_name is not None:
        if not (found / weight_name).is_file():
            raise LoadError(f"There is no {weight_name} in {found}.")
        return _allowed(found / weight_name, pickle)
    files = sorted(f for f in found.iterdir() if f.suffix in (".safetensors", *PICKLES))
    tensors = [f for f in files if f.suffix == ".safetensors"]
    if not files:
        raise LoadError(f"{found} holds no {what}: no .safetensors file is there.")
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
