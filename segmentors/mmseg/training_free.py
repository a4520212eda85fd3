"""The training-free segmentor as a model of mmsegmentation, so that its test loop and metrics score it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmseg.models.segmentors import BaseSegmentor
from mmseg.registry import DATASETS, MODELS
from torch import Tensor

from diffusion_features import FeatureExtractor
from segmentors.evaluation.mmseg_datasets import in_words
from segmentors.training_free import Method, Segmentation
from segmentors.training_free import TrainingFreeSegmentor as Segmentor


@MODELS.register_module()
class TrainingFreeSegmentor(BaseSegmentor):
    """Label pixels by the attention of a diffusion model (arXiv 2603.06178). Nothing is trained, nothing is loaded.

    >>> model = dict(type="TrainingFreeSegmentor", model="embedded", classes=["cat", "grass"])

    Every image is told all classes. The published figures tell each image only the classes that are in it, which
    is more than a segmentor is usually given; they are not comparable with this one's.
    """

    def __init__(
        self,
        model: str,
        classes: str | Sequence[str] | Mapping[str, Sequence[str]],
        *,
        background: Sequence[str] | None = None,
        method: Mapping[str, Any] | None = None,
        size: int | tuple[int, int] | None = None,
        seed: int = 0,
        dtype: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        data_preprocessor: Any = None,
        test_cfg: Any = None,
        init_cfg: Any = None,
    ) -> None:
        """
        Args:
            model: as ``FeatureExtractor.from_pretrained`` takes it.
            classes: names in the order of the dataset's ids; or name → words that stand for it; or the name of a
                registered dataset, whose names are taken, written in words.
            background: things that are none of the classes: id 0 is "background", and the classes begin behind it.
            method: how the maps are put together, ``dict(heads="average", background="threshold", threshold=0.4)``:
                fields of ``segmentors.Method``; those not given are as in the paper.
            size, seed: as of ``segmentors.TrainingFreeSegmentor``.
            dtype: "float32", "float16" or "bfloat16"; by default float16 where there is CUDA.
            revision, variant: as in diffusers.
            data_preprocessor: must bring images to RGB in [-1, 1].
            test_cfg: of mmsegmentation; images are always taken whole.

        Raises:
            ValueError: no such dataset, no class, a single one without background, a name that the model cannot read,
                or a field that a method does not have.
        """
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.classes = _names(classes, background is not None)
        self.background, self.size, self.seed = background, size, seed
        self.num_classes = self.out_channels = len(self.classes) + (background is not None)
        self.test_cfg, self.align_corners = test_cfg, False
        how = _method(method or {})  # what is wrong with the arguments is said before a model is loaded
        half = torch.float16 if torch.cuda.is_available() else torch.float32
        chosen = half if dtype is None else getattr(torch, dtype)
        # The whole model: which layers are needed is known only once it is loaded.
        self.fx = FeatureExtractor.from_pretrained(
            model, "*", revision=revision, variant=variant, dtype=chosen, device="cpu"
        )
        self.segmentor = Segmentor(self.fx, method=how)
        self.segmentor.wanted(self.classes, background)  # so that a wrong name is an error now, not at the first image

    def encode_decode(self, inputs: Tensor, batch_img_metas: Any = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → scores (B, classes, H, W) in [0, 1]."""
        return torch.stack([self._one(image).scores for image in inputs])

    def _one(self, image: Tensor) -> Segmentation:
        found = self.segmentor(image, self.classes, self.background, size=self.size, seed=self.seed)
        assert isinstance(found, Segmentation)
        return found

    def predict(self, inputs: Tensor, data_samples: Any = None) -> Any:
        """Data samples with ``seg_logits`` (scores in [0, 1]) and ``pred_sem_seg``, at the size of the file."""
        return self.postprocess_result(self.encode_decode(inputs), data_samples)

    def _forward(self, inputs: Tensor, data_samples: Any = None) -> Tensor:
        return self.encode_decode(inputs)

    def extract_feat(self, inputs: Tensor) -> Tensor:
        return self.encode_decode(inputs)

    def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Tensor]:
        raise NotImplementedError("a training-free segmentor has nothing to train; test it instead")


def _names(
    classes: str | Sequence[str] | Mapping[str, Sequence[str]], with_background: bool
) -> Sequence[str] | Mapping[str, Sequence[str]]:
    """The classes that the model is told.

    Raises:
        ValueError: a dataset's name is not known, "background" would be told to the model, or there is nothing to
            choose between.
    """
    if isinstance(classes, str):
        dataset = DATASETS.get(classes)
        if dataset is None:
            raise ValueError(f"there is no registered dataset {classes!r}; give its name, or a list of classes")
        classes = [in_words(name) for name in dataset.METAINFO["classes"]]
        classes = classes[1:] if with_background and classes[0] == "background" else classes
    if "background" in classes:
        raise ValueError('"background" is nothing a model can look for: leave it out, and give background=[...]')
    if len(classes) == 1 and not with_background:
        raise ValueError(
            f"every pixel would be {next(iter(classes))!r}, the only class: give background=[...], the names of other "
            "things that may be there, or a second class"
        )
    return classes


def _method(fields: Mapping[str, Any]) -> Method:
    """Raises ValueError if a method has no such field."""
    known = [field.name for field in dataclasses.fields(Method)]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"a method is made of {', '.join(known)}, not of {name!r}{hint}")
    return Method(**fields)
