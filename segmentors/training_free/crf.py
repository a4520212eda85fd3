"""A fully connected CRF over the pixels of an image (arXiv 1210.5644), by a Python interface to its authors' code."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

ITERATIONS = 10
SMOOTHNESS, SMOOTHNESS_DEVIATION = 3, 1
APPEARANCE, APPEARANCE_DEVIATION, COLOUR_DEVIATION = 4, 67, 3
"""The settings that training-free segmentors before arXiv 2603.06178 use."""


def dense_crf(scores: Tensor, image: Tensor) -> Tensor:
    """The marginals ``Q`` of the labels after 10 steps of mean field.

    ``E(x) = Σ_i -ln u_i(x_i) + Σ_{i<j} [x_i ≠ x_j] k(i, j)`` (arXiv 1210.5644, equations 1 to 3), with
    ``u = scores / Σ_k scores``, positions p in pixels and colours I in 0…255:
    ``k = 4 N(exp(-‖p_i - p_j‖² / 2·67² - ‖I_i - I_j‖² / 2·3²)) + 3 N(exp(-‖p_i - p_j‖² / 2·1²))``. The library divides
    each kernel by the roots of its row sums, ``N(K) = D^-½ K D^-½``, and approximates it on a lattice.

    Args:
        scores: (K, H, W) in [0, 1].
        image: (3, H, W) in [-1, 1].

    Returns:
        float32 (K, H, W); sums to 1 over K.

    Raises:
        ImportError: pydensecrf is not installed.
    """
    classes, height, width = scores.shape
    share = scores.float().clamp(min=1e-6)
    energy = -(share / share.sum(dim=0)).log().flatten(1).cpu().numpy()
    colours = ((image.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    field = densecrf().DenseCRF2D(width, height, classes)
    field.setUnaryEnergy(np.ascontiguousarray(energy))
    field.addPairwiseGaussian(sxy=SMOOTHNESS_DEVIATION, compat=SMOOTHNESS)
    field.addPairwiseBilateral(
        sxy=APPEARANCE_DEVIATION, srgb=COLOUR_DEVIATION, rgbim=np.ascontiguousarray(colours), compat=APPEARANCE
    )
    found = np.array(field.inference(ITERATIONS), dtype=np.float32).reshape(classes, height, width)
    return torch.from_numpy(found).to(scores.device)


def densecrf() -> ModuleType:
    """The library.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return import_module("pydensecrf.densecrf")
    except ImportError as error:
        raise ImportError(
            "a dense CRF needs pydensecrf, which is not installed: pip install pydensecrf2 (it is compiled on the "
            "spot, so a C++ compiler must be there)"
        ) from error
