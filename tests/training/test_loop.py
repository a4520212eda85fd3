"""The training loop on a tiny problem: resumed equals unbroken, averages and annealing are what they say."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
loop = pytest.importorskip("loop", reason="the training scripts are not part of an installed package")


class Line(torch.nn.Module):
    """Fits a line through noisy points."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x, y):
        return {"loss": (self.layer(x)[:, 0] - y).square().mean()}


TRUE = torch.tensor([1.0, -2.0, 0.5])


def task(module, exported, seen=None, die_at=None):
    def batches(step, share, generator):
        if step == die_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=generator)
        if seen is not None:
            seen.append((step, x))
        return [{"x": x, "y": x @ TRUE + 1}, {"x": x[:4], "y": x[:4] @ TRUE + 1}][: 1 + step % 2]

    return loop.Task(
        "line", module, batches, lambda: {"validation": module.layer.weight.norm().item()},
        lambda: exported.append(module.layer.weight.detach().clone()), seed=7, rate=0.05, warmup=5, decay=0.9,
    )  # fmt: skip


def options(folder, steps=40, again=None, precision="no"):
    return argparse.Namespace(steps=steps, until=0.0, again=again, precision=precision, runs=folder, log_folder=folder)


def test_a_resumed_training_equals_an_unbroken_one(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "EVERY", 0.0)  # a checkpoint each step
    unbroken, resumed, whole, broken = Line(), Line(), [], []
    loop.train(task(unbroken, whole), options(tmp_path / "a"))
    with pytest.raises(KeyboardInterrupt):
        loop.train(task(Line(), broken, die_at=17), options(tmp_path / "b"))
    assert not broken
    seen = []
    loop.train(task(resumed, broken, seen), options(tmp_path / "b"))
    assert seen[0][0] == 17
    assert torch.equal(unbroken.layer.weight, resumed.layer.weight)
    assert torch.equal(whole[0], broken[0])


def test_the_export_is_the_average_of_the_steps(tmp_path, monkeypatch):
    """Against an average taken by hand after every step."""
    module, exported, weights = Line(), [], []
    advance = loop.Loop.advance

    def noting(self, done):
        found = advance(self, done)
        weights.append(module.layer.weight.detach().clone())
        return found

    monkeypatch.setattr(loop.Loop, "advance", noting)
    first = module.layer.weight.detach().clone()
    loop.train(task(module, exported), options(tmp_path))
    average = first
    for i, weight in enumerate(weights):
        decay = 0.0 if i == 0 else min(0.9, (1 + i) / (10 + i))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(exported[0], average)
    assert torch.equal(module.layer.weight, weights[-1])  # and the training went on from its own weights


def test_the_rate_rises_and_falls_to_zero(tmp_path):
    loop.train(task(Line(), []), options(tmp_path, steps=100))
    lines = [json.loads(line) for line in (tmp_path / "line.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.05 * (1 - 99 / 100))
    assert lines[-1]["finished"] == 1 and "validation" in lines[-1]


def test_another_pass_starts_from_finished_weights(tmp_path):
    first, second, seen, exported = Line(), Line(), [], []
    loop.train(task(first, []), options(tmp_path / "a"))
    loop.train(task(second, exported, seen), options(tmp_path / "b", steps=1, again=tmp_path / "a" / "line.pt"))
    assert seen[0][0] == 0
    difference = (second.layer.weight - first.layer.weight).abs().max()
    assert 0 < difference < 0.02  # one warm-up step away
    torch.testing.assert_close(exported[0], second.layer.weight)  # the average starts anew: one step, one summand


def test_what_only_some_steps_have_is_in_the_log(tmp_path):
    both = task(Line(), [])

    def rarely(step, share, generator):
        return both.batches(step, share, generator)[: 2 if step % 4 == 1 else 1]

    loop.train(dataclasses.replace(both, batches=rarely), options(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "line.jsonl").read_text().splitlines()]
    told = [line for line in lines if "loss" in line]
    assert len(told) == 2 and all("loss1" in line for line in told)


@pytest.fixture
def forget_precision():
    """Forgets the precision of this process, which has one for good otherwise; and once more at the end."""

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)

    yield forget
    forget()


def test_mixed_precision_computes_in_half_keeps_whole_weights_and_learns_the_same(tmp_path, forget_precision):
    trained, computed = [], []
    for precision in ("no", "bf16"):
        forget_precision()
        module, exported, seen = Line(), [], []
        module.layer.register_forward_hook(lambda layer, given, found, seen=seen: seen.append(found.dtype))
        loop.train(task(module, exported), options(tmp_path / precision, precision=precision))
        assert module.layer.weight.dtype == exported[0].dtype == torch.float32
        trained.append(exported[0])
        computed.append({*seen})
    assert computed == [{torch.float32}, {torch.bfloat16}]
    assert not torch.equal(*trained)
    torch.testing.assert_close(*trained, rtol=0.02, atol=0.01)
