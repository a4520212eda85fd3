"""What makes a resumed run the same as one that was never stopped."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmseg.registry import HOOKS


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Keep the state of the random generators in checkpoints, and go on from there.

    mmengine brings the order of the images back to where it stopped, but augmentation and dropout would draw other
    numbers. Validation, which a resumed run does not repeat, leaves the generators as they were. The augmentation of
    data loader workers has generators of its own, which begin anew: only with ``num_workers=0`` is a resumed run the
    same to the last bit.
    """

    priority = "VERY_LOW"

    def __init__(self) -> None:
        self._saved: dict[str, Any] | None = None
        self._before_val: dict[str, Any] | None = None

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        name, keys, *rest = np.random.get_state(legacy=True)
        # As a tensor: a checkpoint with arrays of numpy is not loaded as safe.
        numpy_state = (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest)
        checkpoint["random_state"] = {**_torch_state(), "numpy": numpy_state, "python": random.getstate()}

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        if runner._resume:
            self._saved = checkpoint.get("random_state")

    def before_train_epoch(self, runner: Any) -> None:
        """What augmentation draws from, before the first image is loaded."""
        if self._saved is not None:
            name, keys, *rest = self._saved["numpy"]
            np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
            random.setstate(self._saved["python"])

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """What dropout draws from, after the data loader has begun, which draws too."""
        if self._saved is not None:
            saved, self._saved = self._saved, None
            _restore_torch(saved)

    def before_val(self, runner: Any) -> None:
        self._before_val = _torch_state()

    def after_val(self, runner: Any) -> None:
        if self._before_val is not None:
            _restore_torch(self._before_val)


def _torch_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def _restore_torch(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
