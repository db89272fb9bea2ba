"""Folders of images to read, some of which cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image


def noise_image(height, width, mode="RGB", seed=0):
    bands = len(mode)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if bands == 1 else pixels, mode if bands == 2 else None)


@pytest.fixture(name="folder")
def two_classes(tmp_path):
    """Two classes of six images each, of many sizes."""
    for k, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(6):
            noise_image(20 + i, 30 - 2 * i, seed=10 * k + i).save(tmp_path / name / f"{i}.png")
    return tmp_path


def spoil(folder):
    """Three files that are no images any more, each in another way."""
    whole = (folder / "cat" / "5.png").read_bytes()
    (folder / "cat" / "5.png").write_bytes(whole[: len(whole) // 2])
    (folder / "dog" / "0.png").write_bytes(b"")
    (folder / "dog" / "5.png").write_text("not an image")
