"""Steps of a data pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS


@TRANSFORMS.register_module()
class CheckLabels(BaseTransform):
    """Refuse a mask with ids outside the classes, which a loss would answer with an index error or not at all."""

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        """
        Args:
            num_classes: ids 0 to ``num_classes - 1`` are allowed.
            ignore_index: is allowed too.
        """
        self.num_classes, self.ignore_index = num_classes, ignore_index

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            ValueError: there are other ids; the message names the file and the ids.
        """
        found = np.unique(results["gt_seg_map"])
        wrong = found[((found < 0) | (found >= self.num_classes)) & (found != self.ignore_index)]
        if wrong.size:
            hint = ""
            if found.min() > 0 and wrong.tolist() == [self.num_classes]:
                hint = "; classes numbered from 1 need reduce_zero_label=True"
            raise ValueError(
                f"{results.get('seg_map_path', 'a mask')} has the ids {wrong[:8].tolist()}; allowed are 0 to "
                f"{self.num_classes - 1}, and {self.ignore_index} for pixels without a label{hint}"
            )
        return results


@TRANSFORMS.register_module()
class LoadPrompt(BaseTransform):
    """Give each image its prompt: ``results["prompt"]``, from a JSON file of file name → prompt."""

    def __init__(self, file: str) -> None:
        """
        Args:
            file: JSON such as ``{"0001.jpg": "a cat on grass"}``.

        Raises:
            ValueError: it holds something else.
        """
        prompts = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
            raise ValueError(f'{file} must hold one JSON object of file names and prompts: {{"0001.jpg": "a cat"}}')
        self.file, self.prompts = file, prompts

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            ValueError: the image has no prompt.
        """
        name = Path(results["img_path"]).name
        if name not in self.prompts:
            raise ValueError(f"{self.file} has no prompt for {name}")
        results["prompt"] = self.prompts[name]
        return results
