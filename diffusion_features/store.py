"""Features on disk: one safetensors file an image, and a manifest that says how they were made.

Layout of a store's folder::

    manifest.json                   settings and package versions, and a record of each image
    cat.jpg.safetensors             features of cat.jpg: activation id -> tensor without the batch axis
    more/dog.png.safetensors        folders of the source are kept

Every file is written under a hidden name, flushed to the disk and then renamed, and carries its own record and the
digest of its settings in its header. So a file that has its final name is whole, whatever was killed when, and the
manifest's list of images is only a copy of what the headers say.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

MANIFEST = "manifest.json"
FORMAT = "diffusion-features store 1"
HEADER = "diffusion_features"
SUFFIX = ".safetensors"
PARTIAL = ".part"
LONGEST = 128
"""Bytes of a file name that is made longer while the file is written; 255 is what most file systems take."""
WEIGHTS = "weights"
"""The setting that tells two states of one model's weights apart."""
PACKAGES = ("diffusion-features", "torch", "diffusers", "transformers", "safetensors")


class StoreError(ValueError):
    """A folder that cannot be used as the store asked for; the message says why and what to do."""


class Store:
    """A folder of features that one program fills and any may read.

    A key is an image's name in the store: a relative path with ``/``, such as ``more/dog.png``.
    Used as a context manager, leaving it brings the manifest's list of images up to date.

    Attributes:
        folder: where it is.
        settings: how the features were made, as given to ``create`` (after a round trip through JSON).
        versions: package -> version of each time it was written with other versions than before, oldest first.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], versions: list[dict[str, str]]) -> None:
        self.folder = folder
        self.settings = settings
        self.versions = versions
        self._digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self._replaced: list[str] | None = None  # keys of features that the first new file replaces
        self._records = dict(self._scan())

    @classmethod
    def create(cls, folder: str | os.PathLike[str], settings: Mapping[str, Any], overwrite: bool = False) -> Store:
        """A store to write to: a new one, or the one in ``folder`` where its settings are these.

        Args:
            folder: made if it does not exist. Files in it that no store wrote are left alone.
            settings: everything the features depend on besides the image, as JSON values; ``WEIGHTS`` among them says
                which weights the model has.
            overwrite: throw away everything the folder's store holds, whatever its settings, as soon as the first new
                features are on the disk; until then they stay.

        Raises:
            StoreError: the folder holds features of other settings (all that differ are listed), or a
                ``manifest.json`` of something else. A store without features is of no settings.
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        wanted: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file, not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        old = cls.open(folder) if (folder / MANIFEST).exists() else None
        resumed = old if old is not None and len(old) and not overwrite else None
        if resumed is not None and resumed.settings != wanted:
            raise StoreError(
                f"{folder} holds features made with other settings: {_differences(resumed.settings, wanted)}; "
                "choose another folder, or pass --overwrite (overwrite=True) to replace them"
            )
        for left_over in [path for written in (SUFFIX, MANIFEST) for path in folder.rglob(f".*{written}.*{PARTIAL}")]:
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        versions = resumed.versions if resumed else []
        if (current := _versions()) not in versions[-1:]:
            versions = [*versions, current]
        store = cls(folder, wanted, versions)
        if old is not None and len(old) and overwrite:
            store._replaced, store._records = [*old], {}
        store.flush()
        return store

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Store:
        """The store in a folder, with every image that is completely written.

        Raises:
            FileNotFoundError: there is no manifest.
            StoreError: the manifest is of something else.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no feature store: it has no {MANIFEST}")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            known = manifest["format"] == FORMAT
            settings, versions = manifest["settings"], manifest["versions"]
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise StoreError(f"{path} is not the manifest of a feature store of this version; choose another folder")
        return cls(Path(folder), settings, versions)

    def has(self, key: str, **expected: Any) -> bool:
        """Whether the image is completely written, with these values in its record (such as its ``sha256``)."""
        record = self._records.get(key)
        return record is not None and all(name in record and record[name] == value for name, value in expected.items())

    def write(self, key: str, features: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Put one image's features on the disk, all or nothing; an older file of the same key is replaced.

        Args:
            key: the image's name.
            features: activation id -> tensor of any shape and dtype, which are kept, on any device.
            meta: the image's record, as JSON values.

        Raises:
            ValueError: the key leads out of the folder.
            OSError: the disk is full or not writable, or (``errno.ENAMETOOLONG``) the key is longer than its file
                system takes.
        """
        path = self.folder / _file_name(key)
        record = {**meta, "file": _file_name(key), "order": list(features)}
        header = json.dumps({"key": key, "settings": self._digest, "record": record}, sort_keys=True)
        packed = torch.contiguous_format  # slices of a batch and views of one tensor become files of their own
        tensors = {name: value.detach().cpu().clone(memory_format=packed) for name, value in features.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(path)
        try:
            partial.mkdir(exist_ok=True)  # the library writes a file of its own beside the one that it is told
            whole = partial / "features"
            whole.touch()
            mode = whole.stat().st_mode  # and makes files that only their owner can read
            save_file(tensors, whole, metadata={HEADER: header})
            whole.chmod(mode)
            _publish(whole, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._records[key] = json.loads(header)["record"]
        self._replace()

    def read(self, key: str, ids: list[str] | None = None) -> dict[str, torch.Tensor]:
        """An image's features on the CPU, in the order they were written in; only ``ids`` where given.

        Raises:
            KeyError: no such image, or no such activation.
        """
        record = self.record(key)
        if unknown := [name for name in ids or () if name not in record["order"]]:
            raise KeyError(f"{key} has no activation {', '.join(unknown)} in {self.folder}")
        with safe_open(self.folder / record["file"], framework="pt") as file:
            return {name: file.get_tensor(name) for name in record["order"] if ids is None or name in ids}

    def record(self, key: str) -> dict[str, Any]:
        """What was noted of an image: the ``meta`` it was written with, its ``file``, the ``order`` of its ids."""
        if key not in self._records:
            raise KeyError(f"{self.folder} has no features of {key}")
        return self._records[key]

    def flush(self) -> None:
        """Bring the manifest up to date. Only its list of images can lag behind, and ``open`` does not rely on it."""
        if self._replaced is not None:  # nothing of this store is there: the manifest is of what will be replaced
            return
        manifest = {
            "format": FORMAT,
            "settings": self.settings,
            "versions": self.versions,
            "images": {key: self._records[key] for key in self},
        }
        path = self.folder / MANIFEST
        partial = _partial(path)
        try:
            partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            _publish(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._records))

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: object) -> bool:
        return key in self._records

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # which may have come between a file's getting its name and our noting it
            self._records = dict(self._scan())
        self.flush()

    def _replace(self) -> None:
        """Throw away what this store was made to overwrite, now that it has features of its own."""
        if self._replaced is None:
            return
        old, self._replaced = self._replaced, None
        self.flush()  # first, so that files of other settings count for nothing from here on, even after a kill
        for key in old:
            if key not in self._records:
                (self.folder / _file_name(key)).unlink(missing_ok=True)

    def _scan(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Key and record of every whole file of these settings in the folder."""
        for path in self.folder.rglob(f"*{SUFFIX}"):
            header = _header(path)
            if header is None or header["settings"] != self._digest:
                continue
            if path == self.folder / _file_name(header["key"]):  # not a copy under another name
                yield header["key"], header["record"]


def is_store(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has a manifest (of this or another version)."""
    return (Path(folder) / MANIFEST).is_file()


def _header(path: Path) -> dict[str, Any] | None:
    """What ``Store.write`` noted in a file; ``None`` for any other file, a damaged or a shortened one.

    Opening compares the file's length with the tensors its header lists, without reading them.
    """
    try:
        with safe_open(path, framework="pt") as file:
            note = (file.metadata() or {}).get(HEADER)
    except (SafetensorError, OSError):
        return None
    return json.loads(note) if note else None


def _file_name(key: str) -> str:
    path = PurePosixPath(key)
    if not key or path.is_absolute() or ".." in path.parts or path.as_posix() != key:
        raise ValueError(f"a key must be a relative path with /, inside the store, not {key!r}")
    return key + SUFFIX


def _partial(path: Path) -> Path:
    """Where a file, or a folder with it, is written before it has its name: hidden, beside it, apart for each process.

    A long name gives way to its digest, because one that just fits the file system does not if anything is added.
    """
    name, encoded = path.name, os.fsencode(path.name)
    if len(encoded) > LONGEST:
        name = hashlib.sha256(encoded).hexdigest()[:32] + path.suffix
    return path.with_name(f".{name}.{os.getpid()}{PARTIAL}")


def _publish(partial: Path, path: Path) -> None:
    """Give a written file its name once its bytes are on the disk."""
    _sync(partial)
    partial.replace(path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # run from a checkout that was never installed
    return found


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Every setting that differs, as ``t: 50 there, 100 asked for``."""
    parts = []
    for name in [*old, *(name for name in new if name not in old)]:
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        if name == WEIGHTS and before is None:
            parts.append(f"{name}: which ones the features were made with was not noted")
            continue
        if name == WEIGHTS:
            parts.append(
                f"{name}: those of the model are not those that the features were made with "
                f"({_shown(before)} there, {_shown(after)} now)"
            )
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            parts.append(f"{name}: {_dict_difference(before, after)}")
        else:
            parts.append(f"{name}: {_shown(before)} there, {_shown(after)} asked for")
    return "; ".join(parts)


def _dict_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    groups = {
        "only there": [name for name in old if name not in new],
        "only asked for": [name for name in new if name not in old],
        "described otherwise": [name for name in new if name in old and old[name] != new[name]],
    }
    return ", ".join(f"{what} {_few(names)}" for what, names in groups.items() if names)


def _few(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
