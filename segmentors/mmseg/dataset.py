"""The drawn world that ships with the package, as a dataset of mmsegmentation: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from mmengine.dist import barrier, is_main_process
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from diffusion_features.embedded import CLASSES
from diffusion_features.embedded.dataset import PALETTE, write


@DATASETS.register_module()
class EmbeddedWorldDataset(BaseSegDataset):
    """The first ``count`` scenes of a split, drawn when first asked for. 18 classes; ``prompt`` is a caption."""

    METAINFO: ClassVar = dict(classes=CLASSES, palette=[list(colour) for colour in PALETTE])

    def __init__(
        self,
        data_root: str = "data/embedded",
        split: str = "train",
        count: int = 1000,
        size: int | tuple[int, int] = 128,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            data_root: where the scenes are, or are written to; a folder has one size.
            split: "train", "validation", "test" or "held-out" (styles and combinations that no other split has).
            count: scenes.
            size: side in pixels, or (width, height).
            kwargs: as of ``BaseSegDataset``.

        Raises:
            ValueError: there is no such split, or the folder holds scenes of another size.
        """
        self.count = count
        self.index = Path(data_root) / f"{split}.json"
        if is_main_process() and _written(self.index, size) < count:
            write(data_root, split, count, size)
        barrier()
        super().__init__(
            img_suffix=".png", data_root=data_root,
            data_prefix=dict(img_path=f"img_dir/{split}", seg_map_path=f"ann_dir/{split}"), **kwargs,
        )  # fmt: skip

    def load_data_list(self) -> list[dict[str, Any]]:
        scenes = json.loads(self.index.read_text(encoding="utf-8"))["images"][: self.count]
        captions = {scene["file"]: scene["caption"] for scene in scenes}
        found = {Path(info["img_path"]).name: info for info in super().load_data_list()}
        return [{**found[name], "prompt": caption} for name, caption in captions.items()]


def _written(index: Path, size: int | tuple[int, int]) -> int:
    """Scenes of a split that are there already in this size; the index is written last."""
    if not index.is_file():
        return 0
    split = json.loads(index.read_text(encoding="utf-8"))
    return len(split["images"]) if split["size"] == ([size, size] if isinstance(size, int) else [*size]) else 0
