"""A run that is cancelled ends before its next layer, and leaves the model as it was."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest
import torch
from torch import nn

from segmentors.demo.stopping import Stopped, check, in_thread, stoppable


class Chain(nn.Module):
    """Layers that tell when they run, and wait in the first one until they are let go."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(depth)])
        self.begun, self.go, self.ran = threading.Event(), threading.Event(), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            self.ran += 1
            self.begun.set()
            assert self.go.wait(30)
        return x


@pytest.fixture
def thread() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as one:
        yield one


@pytest.fixture
def chain() -> Chain:
    model = Chain(4)
    stoppable(model)
    return model


async def cancelled(chain: Chain, thread: Executor) -> None:
    """Cancel a run while it is in the first layer, and let it go on."""
    task = asyncio.ensure_future(in_thread(chain, thread)(torch.ones(1, 2)))
    assert await asyncio.to_thread(chain.begun.wait, 30)
    task.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # by now the run knows
    assert not task.done(), "it ended before the run had"
    chain.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_cancelled_run_ends_before_its_next_layer(chain: Chain, thread: Executor) -> None:
    asyncio.run(cancelled(chain, thread))
    assert chain.ran == 1
    chain.ran = 0
    assert asyncio.run(in_thread(chain, thread)(torch.ones(1, 2))).shape == (1, 2) and chain.ran == 4


def test_one_cancelled_run_stops_no_other(chain: Chain, thread: Executor) -> None:
    async def both() -> torch.Tensor:
        other = Chain(4)
        stoppable(other)
        other.go.set()
        result, _ = await asyncio.gather(
            in_thread(other, ThreadPoolExecutor(1))(torch.ones(1, 2)), cancelled(chain, thread)
        )
        assert other.ran == 4
        return result

    assert asyncio.run(both()).shape == (1, 2)


def test_what_is_cancelled_before_it_begins_never_runs(chain: Chain, thread: Executor) -> None:
    async def behind() -> None:
        first = asyncio.ensure_future(in_thread(chain, thread)(torch.ones(1, 2)))
        second = asyncio.ensure_future(in_thread(chain, thread)(torch.ones(1, 2)))
        assert await asyncio.to_thread(chain.begun.wait, 30)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert not first.done(), "it waited for the run before it"
        chain.go.set()
        assert (await first).shape == (1, 2)

    asyncio.run(behind())
    thread.submit(int).result()
    assert chain.ran == 4


def test_outside_of_a_run_nothing_stops(chain: Chain) -> None:
    check()
    chain.go.set()
    assert chain(torch.ones(1, 2)).shape == (1, 2)


def test_errors_and_results_come_through(thread: Executor) -> None:
    def fails() -> None:
        raise ValueError("as it is")

    with pytest.raises(ValueError, match="as it is"):
        asyncio.run(in_thread(fails, thread)())
    assert asyncio.run(in_thread(lambda a, b: a + b, thread)(1, b=2)) == 3
    assert not issubclass(Stopped, ValueError)  # which is shown to visitors
