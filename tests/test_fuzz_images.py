"""Damaged images, folders of drawn images and logs."""

from __future__ import annotations

import json
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from fuzzing import ROUNDS, bounded, damage, fuzz

from ddpm_fast.training.data import open_data
from ddpm_fast.training.drawn_folder import DrawnFolder, Share, name_of
from ddpm_fast.training.images import UnreadableImage, read_image, read_size
from ddpm_fast.training.journal import last_step
from ddpm_fast.training.pictures import png_text

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
FORMATS = ["png", "jpg", "gif", "bmp", "tiff", "webp", "ppm", "ico", "tga", "jp2"]


@pytest.fixture
def images(tmp_path):
    """One of each format, and of each mode that a PNG file may have."""
    folder = tmp_path / "whole"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    for name in FORMATS:
        try:
            picture.save(folder / f"image.{name}")
        except (KeyError, OSError):  # this pillow has no such codec
            (folder / f"image.{name}").unlink(missing_ok=True)
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16", "CMYK"):
        kind = "tiff" if mode == "CMYK" else "png"
        source = picture.convert("I").convert(mode) if mode == "I;16" else picture.convert(mode)
        source.save(folder / f"{mode.replace(';', '')}.{kind}")
    return folder


def test_images(images, tmp_path):
    names = sorted(path.name for path in images.iterdir())
    for channels in (1, 3, 4):

        def read(folder, channels=channels):
            found = []
            for name in names:
                size = or_unreadable(read_size, folder / name)
                assert size is None or min(size) >= 0
                image = or_unreadable(lambda path: read_image(path, 8, channels), folder / name)
                if image is not None:
                    found.append(image)
            return found

        def check(found, name, channels=channels):
            assert len(found) >= len(names) - 1
            assert all(image.shape == (channels, 8, 8) for image in found)

        fuzz(images, tmp_path, read, 40, check=check, seed=channels)


def or_unreadable(read, path):
    """What is read, or None; the error has the file's name."""
    try:
        return read(str(path))
    except UnreadableImage as error:
        if str(path) not in str(error):
            raise AssertionError(f"an error without a name: {error}") from error
        return None


def png_of(width, height, rows=b""):
    """A PNG file that says it has so many pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height"), [(2**31 - 1, 2**31 - 1), (10**6, 10**6), (0, 0), (1, 2**31 - 1)]
)
def test_more_pixels_than_memory(tmp_path, width, height):
    path = tmp_path / "huge.png"
    path.write_bytes(png_of(width, height, bytes(1000)))
    with bounded(), pytest.raises(UnreadableImage, match=r"huge\.png"):
        read_image(str(path), 8, 3)


def test_data_set(images, tmp_path):
    """Whatever one of its images is: the others are read, or the error names a file."""

    def read(folder):
        data = open_data(folder, image_size=8, channels=3, on_bad_image="skip")
        return data.batch(range(len(data)))[0]

    def check(found, name):
        assert found.shape[1:] == (3, 8, 8)

    fuzz(images, tmp_path, read, 40, check=check)


def test_drawn_folder(tmp_path):
    share = Share(6, 2)
    (tmp_path / "whole").mkdir()
    whole = DrawnFolder(tmp_path / "whole", share, "ours")
    for i in range(6):
        whole.write(i, torch.full((3, 8, 8), 10 * i, dtype=torch.uint8))
    whole.write_grid()

    def read(folder):
        drawn = DrawnFolder(folder, share, "ours")
        missing = [i for ids in drawn.to_draw() for i in ids]
        for path in folder.glob("*.png"):
            if path.is_file():
                png_text(path)
        try:
            drawn.write_grid()
        except RuntimeError as error:
            if "is damaged" not in str(error):
                raise
        return missing

    fuzz(tmp_path / "whole", tmp_path, read, 200, files=[name_of(i) for i in range(6)])


def test_log(tmp_path):
    lines = [json.dumps({"step": 10 * i, "loss": 0.5, "samples": i}) for i in range(9)]
    for i in range(300 * ROUNDS):
        log = tmp_path / f"{i}.jsonl"
        log.write_text("\n".join(lines) + "\n")
        rng = random.Random(i)
        if rng.random() < 0.5:
            log.write_bytes(b"".join(rng.choice([b"[" * 100_000, b"9" * 5000]) for _ in range(2)))
        else:
            damage(log, rng)
        if log.is_file():
            with bounded():
                found = last_step(log)
            assert found is None or type(found) is int
