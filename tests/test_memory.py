"""What is said where a model does not fit into memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffusion_features import FeatureExtractor, LoadError, memory
from tests.tiny import save_sd15
from tests.tiny_dits import build

MIB = 2**20


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("flux")
    build("flux_dev").save_pretrained(path)
    return path


def elements(folder: Path, part: str, pattern: str = "") -> int:
    """Of all weights of a component, or those whose names begin like ``pattern``; read whole, not from headers."""
    files = (folder / part).glob("*.safetensors")
    return sum(t.numel() for file in files for name, t in load_file(file).items() if re.match(pattern, name))


def load(folder: Path, free: int, monkeypatch: pytest.MonkeyPatch, device: str = "cpu", **options: Any) -> Any:
    """Loads onto a machine with so many bytes free; a "cuda" that is too small need not be there."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    return FeatureExtractor.from_pretrained(folder, options.pop("activations", "*"), device=device, **options)


def test_weights_that_just_fit_load_and_one_byte_less_is_refused(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ("transformer", "text_encoder", "text_encoder_2", "vae")
    needed = 2 * (sum(elements(flux, part) for part in parts) - elements(flux, "vae", "decoder"))
    half = dict(dtype=torch.bfloat16)
    assert load(flux, needed, monkeypatch, **half).dtype == torch.bfloat16
    sentence = rf"does not fit: .* {needed / MIB:.1f} MiB in bfloat16 \(.*transformer .*cpu has"
    with pytest.raises(LoadError, match=sentence):
        load(flux, needed - 1, monkeypatch, **half)
    last = 2 * elements(flux, "transformer", r"single_transformer_blocks\.1\.")
    assert load(flux, needed - last, monkeypatch, activations="vit-block2-out", **half).available
    with pytest.raises(LoadError):
        load(flux, needed - last - 1, monkeypatch, activations="vit-block2-out", **half)


def test_weights_in_their_own_dtype_are_mapped_on_the_cpu(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take no memory that anything else could use, so nothing is refused; and the pages are the file's."""
    fx = load(flux, 1, monkeypatch)
    address = fx.denoiser.x_embedder.weight.data_ptr()
    ranges = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    (path,) = (
        fields[5] for fields in ranges
        if int(fields[0].split("-")[0], 16) <= address < int(fields[0].split("-")[1], 16) and len(fields) > 5
    )  # fmt: skip
    assert path.endswith("transformer/diffusion_pytorch_model.safetensors")


def test_only_what_would_fit_is_advised(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = 4 * sum(elements(flux, part) for part in ("transformer", "text_encoder", "text_encoder_2", "vae"))
    whole -= 4 * elements(flux, "vae", "decoder")
    last = 4 * elements(flux, "transformer", r"single_transformer_blocks\.1\.")
    transformer = 4 * elements(flux, "transformer")
    block = 4 * max(elements(flux, "transformer", rf"{name}\.") for name in (
        r"transformer_blocks\.0", r"transformer_blocks\.1",
        r"single_transformer_blocks\.0", r"single_transformer_blocks\.1",
    ))  # fmt: skip

    def advice(free: int, device: str = "cuda", dtype: torch.dtype = torch.float32) -> str:
        with pytest.raises(LoadError) as refused:
            load(flux, free, monkeypatch, device, dtype=dtype)
        return str(refused.value)

    nearly = advice(whole - 1)
    assert f"activations no deeper than vit-block2 ({(whole - last) / MIB:.1f} MiB)" in nearly
    assert f"dtype=torch.bfloat16 ({whole / 2 / MIB:.1f} MiB)" in nearly
    assert f"makes the transformer int8 (about {(whole - transformer * 3 / 4) / MIB:.1f} MiB)" in nearly
    on_cpu = advice(whole // 2 - 1, "cpu", torch.bfloat16)
    assert "int8" in on_cpu and "offload" not in on_cpu  # there is nowhere to offload to
    assert f"enable_model_cpu_offload() ({transformer / MIB:.1f} MiB at a time)" in advice(transformer)
    assert "no deeper" not in advice(whole - transformer) and "int8" not in advice(whole - transformer)
    assert f"enable_group_offload(...) ({block / MIB:.1f} MiB for the largest block)" in advice(block)
    assert "model_cpu_offload" not in advice(block)
    assert advice(1).endswith("Nothing that diffusers offers would fit.")


def test_unet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_sd15(tmp_path)
    with pytest.raises(LoadError, match=r"unet .*What would fit: .*int8"):
        load(folder, 2 * elements(folder, "unet"), monkeypatch, activations="practical", dtype=torch.float16)


def test_free_memory_is_asked_of_the_device() -> None:
    free = memory.free_bytes(torch.device("cpu"))
    assert free is not None and MIB < free < 2**50
    assert memory.free_bytes(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("error", "advised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 45.9 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (MemoryError(), True),
    ],
)
def test_error_of_a_call_says_what_needs_less(error: Exception, advised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fx = FeatureExtractor.from_pipe(build("pixart_sigma"), "vit-block0-out")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(fx.denoiser, "forward", fail)
    for call in (fx, lambda image: fx.stream(image, lambda id, found: found)):
        with pytest.raises(type(error)) as raised:
            call(torch.zeros(1, 3, 64, 64))
        assert raised.value is error
    notes = " ".join(getattr(error, "__notes__", []))
    assert ("heads='mean'" in notes and "enable_group_offload" in notes) == advised


def test_a_real_allocation_that_fails_on_the_cpu() -> None:
    with pytest.raises(RuntimeError) as raised, memory.advised():
        torch.empty(2**50)
    assert raised.value.__notes__ == [memory.IN_A_CALL]
