"""Runs that are stopped, in whichever way, end as if they had not been."""

import os
import signal
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from segmentors.mmseg import train as training
from tests.segmentors_mmseg.tiny import config, weights, written


@HOOKS.register_module(force=True)
class StopHook(Hook):
    """A run that ends badly after eight iterations: by an interrupt, or killed without a chance to do anything."""

    def __init__(self, kill=False):
        self.kill = kill

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 8:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def through(sd15, scenes, tmp_path_factory):
    """Weights of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("through")
    training.main([written(config(sd15, scenes, folder / "run"), folder)])
    return weights(folder / "run")


def go_on(stopped, folder):
    """Weights of the run that goes on where it stopped, in a process with other random numbers."""
    assert (Path(stopped.work_dir) / "iter_6.pth").is_file()
    stopped.custom_hooks.pop()
    torch.manual_seed(1234)
    training.main([written(stopped, folder), "--resume"])
    return weights(stopped.work_dir)


def assert_same(found, expected):
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(sd15, scenes, through, tmp_path):
    stopped = config(sd15, scenes, tmp_path / "stopped")
    stopped.custom_hooks.append(dict(type="StopHook", priority="LOWEST"))
    with pytest.raises(KeyboardInterrupt):
        training.main([written(stopped, tmp_path / "a")])
    assert not (tmp_path / "stopped" / "iter_12.pth").exists()
    assert_same(go_on(stopped, tmp_path / "b"), through)


def train(path):
    torch.set_num_threads(1)
    training.main([path])


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_stopped(sd15, scenes, through, tmp_path):
    stopped = config(sd15, scenes, tmp_path / "stopped")
    stopped.custom_hooks.append(dict(type="StopHook", kill=True, priority="LOWEST"))
    process = torch.multiprocessing.get_context("spawn").Process(target=train, args=[written(stopped, tmp_path / "a")])
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    # What a process leaves that is killed while it writes the next checkpoint.
    (tmp_path / "stopped" / "iter_12.pth").write_bytes((tmp_path / "stopped" / "iter_6.pth").read_bytes()[:1000])
    assert_same(go_on(stopped, tmp_path / "b"), through)
