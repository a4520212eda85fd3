"""Label readers."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffusion_features.embedded import VALIDATION_SEED, render
from diffusion_features.embedded.dataset import write
from segmentors.pixel_classifier import ddpm_labels, drawn_parts


def test_parts_of_the_drawn_world(tmp_path):
    write(tmp_path, "validation", 2, 32)
    labels = drawn_parts(tmp_path, "validation")
    assert [*labels] == ["000000.png", "000001.png"]
    assert (labels["000001.png"] == render(VALIDATION_SEED + 1, 32).parts).all()
    with pytest.raises(FileNotFoundError, match="diffusion-features scenes"):
        drawn_parts(tmp_path, "test")


def ddpm_folder(tmp_path, labels):
    for number, map in enumerate(labels):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        np.save(tmp_path / f"{number}.npy", map)
    return tmp_path


def test_labels_beside_images(tmp_path):
    map = np.zeros((64, 64))
    map[:32, :32] = 5
    map[40:42, 40:42] = 7  # 4 pixels of 64 x 64; 16 of 128 x 128
    Image.new("RGB", (8, 8)).save(tmp_path / "unlabelled.png")
    folder = ddpm_folder(tmp_path, [map])
    found = ddpm_labels(folder, side=128)
    assert [*found] == ["0.png"] and found["0.png"].shape == (128, 128) and found["0.png"].dtype == np.uint8
    assert (found["0.png"][:64, :64] == 5).all() and (found["0.png"][80:84, 80:84] == 255).all()
    assert (ddpm_labels(folder, side=128, training=False)["0.png"][80:84, 80:84] == 7).all()


def test_folders_without_labels(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image 0\.png with labels 0\.npy"):
        ddpm_labels(tmp_path)
    with pytest.raises(ValueError, match="must hold labels"):
        ddpm_labels(ddpm_folder(tmp_path, [np.full((4, 4), 300)]))
