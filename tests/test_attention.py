"""xformers: used where a trial call works, otherwise left alone with one notice.

A machine without CUDA cannot run xformers' kernels, so a stand-in module gives both answers, and what diffusers is
told to do is recorded. The last test takes the real xformers where it is installed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_features import attention
from tests.tiny import sd15_unet


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No answer and no notice is left over from another test."""
    monkeypatch.setattr(attention, "_noticed", [])
    attention._trial.cache_clear()
    yield
    attention._trial.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor]], list[torch.Size]]:
    """Puts a stand-in xformers in place, whose operation is given; returns the shapes it is called with."""

    def put(operation: Callable[..., Tensor]) -> list[torch.Size]:
        shapes: list[torch.Size] = []

        def recorded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            shapes.append(query.shape)
            return operation(query, key, value)

        package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
        package.ops, ops.memory_efficient_attention = ops, recorded  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "xformers", package)
        monkeypatch.setitem(sys.modules, "xformers.ops", ops)
        return shapes

    return put


def works(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """xformers' layout, (batch, tokens, heads, head_dim), on PyTorch's attention."""
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def has_no_kernel(*_: Tensor) -> Tensor:
    raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n  query ...")


class OnCuda:
    """What `use_fast_attention` sees of a denoiser on CUDA: where its first weight is, and diffusers' switch."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.switched = 0
        self.refusal = refusal

    def parameters(self) -> Iterator[Any]:
        class Weight:
            device, dtype = torch.device("cuda"), torch.float16

        yield Weight

    def enable_xformers_memory_efficient_attention(self) -> None:
        if self.refusal:
            raise self.refusal
        self.switched += 1


def notices(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "diffusion_features"]


@pytest.mark.parametrize(("operation", "answer"), [(works, True), (has_no_kernel, False)])
def test_trial_call_decides(install: Any, operation: Callable[..., Tensor], answer: bool) -> None:
    shapes = install(operation)
    for _ in range(3):
        assert attention.xformers_works("cpu", torch.float32) is answer
    assert len(shapes) == 1  # the answer is kept ...
    assert attention.xformers_works("cpu", torch.bfloat16) is answer
    assert len(shapes) == 2  # ... for each dtype


def test_absent_xformers_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert not attention.xformers_works("cpu", torch.float32)


def test_denoiser_on_the_cpu_is_left_alone(install: Any, caplog: pytest.LogCaptureFixture) -> None:
    shapes = install(works)
    unet = sd15_unet()
    before = dict(unet.attn_processors)
    with caplog.at_level(logging.INFO, logger="diffusion_features"):
        assert attention.use_fast_attention(unet) == "sdpa"
    assert unet.attn_processors == before
    assert not shapes
    assert notices(caplog) == [
        "xformers is not used: the model is on cpu, not on CUDA; attention runs through PyTorch's own kernels."
    ]


def trial_as_if_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the trial for CUDA make its tensors on the CPU, the only stretch of the way this machine cannot go."""
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device, dtype: ones(*shape, dtype=torch.float32))


def test_denoiser_on_cuda_is_switched(
    install: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(works)
    trial_as_if_on_the_cpu(monkeypatch)
    denoiser = OnCuda()
    with caplog.at_level(logging.INFO, logger="diffusion_features"):
        assert attention.use_fast_attention(denoiser) == "xformers"
    assert denoiser.switched == 1
    assert not notices(caplog)


def test_one_notice_a_process(install: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    install(has_no_kernel)
    trial_as_if_on_the_cpu(monkeypatch)
    denoiser = OnCuda()
    with caplog.at_level(logging.INFO, logger="diffusion_features"):
        assert {attention.use_fast_attention(denoiser) for _ in range(3)} == {"sdpa"}
    assert denoiser.switched == 0
    assert len(notices(caplog)) == 1
    assert "a trial call on cuda in torch.float16 failed (No operator found" in notices(caplog)[0]
    assert "\n" not in notices(caplog)[0]


def test_absence_is_the_reason_given(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with caplog.at_level(logging.INFO, logger="diffusion_features"):
        assert attention.use_fast_attention(OnCuda()) == "sdpa"
    assert "it is not installed" in notices(caplog)[0]


def test_refusal_by_diffusers_is_no_failure(
    install: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(works)
    trial_as_if_on_the_cpu(monkeypatch)
    with caplog.at_level(logging.INFO, logger="diffusion_features"):
        assert attention.use_fast_attention(OnCuda(NotImplementedError("no float32 kernel"))) == "sdpa"
    assert "diffusers refused it (no float32 kernel)" in notices(caplog)[0]


def test_real_xformers_computes_attention_where_the_trial_says_so() -> None:
    ops = pytest.importorskip("xformers.ops", exc_type=ImportError)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, key, value = torch.randn(3, 1, 16, 2, 40, device=device).unbind()
    if attention.xformers_works(device, torch.float32):
        found = ops.memory_efficient_attention(query, key, value)
        torch.testing.assert_close(found, works(query, key, value), rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises((NotImplementedError, RuntimeError)):
            ops.memory_efficient_attention(query, key, value)
