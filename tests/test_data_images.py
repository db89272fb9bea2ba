"""What an image file becomes: channels, transparency, depth, orientation, size."""

from __future__ import annotations

import numpy as np
import pytest
from image_folders import noise_image
from PIL import Image

from ddpm_fast.training.data import UnreadableImage
from ddpm_fast.training.images import fit, read_image, read_size, to_mode


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"]
)
def test_every_mode_becomes_every_number_of_channels(tmp_path, mode, channels):
    """A flat colour keeps its value, whichever way it was stored."""
    suffix = {"CMYK": "jpg", "YCbCr": "jpg", "PA": "tiff"}.get(mode, "png")
    path = tmp_path / f"image.{suffix}"
    if mode == "I;16":
        image = Image.fromarray(np.full((6, 6), 51 * 257, dtype=np.uint16))
    elif mode == "1":
        image = Image.new("1", (6, 6), 1)
    elif mode == "PA":
        image = Image.new("RGBA", (6, 6), (51, 51, 51, 255)).convert("RGB").convert("P")
    else:
        image = Image.new("RGB", (6, 6), (51, 51, 51)).convert(mode)
    image.save(path, **({"quality": 100} if suffix == "jpg" else {}))
    pixels = read_image(str(path), 6, channels)
    assert pixels.shape == (channels, 6, 6)
    assert pixels.dtype == np.uint8
    level = 255 if mode == "1" else 51
    colours = pixels[:-1] if channels in (2, 4) else pixels
    tolerance = 2 if mode in ("CMYK", "YCbCr") else 0
    assert np.abs(colours.astype(int) - level).max() <= tolerance
    if channels in (2, 4):
        assert (pixels[-1] == 255).all()


def test_what_is_transparent_lies_on_white(tmp_path):
    for mode, colour in (("RGBA", (200, 0, 0, 0)), ("LA", (10, 0))):
        Image.new(mode, (4, 4), colour).save(tmp_path / "clear.png")
        assert (read_image(str(tmp_path / "clear.png"), 4, 3) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([200, 0, 0])
    palette.save(tmp_path / "clear.png", transparency=0)
    assert (read_image(str(tmp_path / "clear.png"), 4, 1) == 255).all()
    Image.new("RGBA", (4, 4), (100, 100, 100, 128)).save(tmp_path / "half.png")
    assert abs(int(read_image(str(tmp_path / "half.png"), 4, 3)[0, 0, 0]) - 177) <= 1
    assert (read_image(str(tmp_path / "half.png"), 4, 4)[:, 0, 0] == [100, 100, 100, 128]).all()


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    levels = np.array([[0, 128, 129], [257, 32896, 65535]], dtype=np.uint16)
    for suffix in ("png", "tiff"):
        path = tmp_path / f"deep.{suffix}"
        Image.fromarray(levels).save(path)
        assert read_image(str(path), None, 1)[0].tolist() == [[0, 0, 1], [1, 128, 255]]


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.full((4, 4), 0.5, dtype=np.float32), "floating point, of unknown range"),
        (np.full((4, 4), 1 << 20, dtype=np.int32), "more than 16 bits"),
    ],
)
def test_pixels_of_unknown_range_are_refused(tmp_path, array, reason):
    path = tmp_path / "image.tiff"
    Image.fromarray(array).save(path)
    with pytest.raises(UnreadableImage, match=reason):
        read_image(str(path), 4, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_respected(tmp_path, orientation):
    """A picture stored turned, with the tag that says how, comes out upright."""
    upright = np.zeros((16, 24), dtype=np.uint8)
    upright[:8, :12] = 255  # the upper left quarter
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # pillow's transpositions, the inverses
    image = Image.fromarray(upright)
    if orientation > 1:
        image = image.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    image.save(path, exif=exif)
    assert read_size(str(path)) == (16, 24)
    assert np.array_equal(read_image(str(path), None, 1)[0], upright)


def test_fit_takes_the_middle_square():
    wide = np.zeros((8, 24), dtype=np.uint8)
    wide[:, 8:16] = 200
    assert (np.asarray(fit(Image.fromarray(wide), 8)) == 200).all()
    assert (np.asarray(fit(Image.fromarray(wide.T), 8)) == 200).all()
    for height, width in ((5, 5), (1, 9), (16, 16), (33, 100), (7, 300), (64, 65)):
        assert fit(noise_image(height, width), 8).size == (8, 8)


def test_fit_averages_when_it_halves():
    """No aliasing: a checkerboard of single pixels is grey at a quarter of its size."""
    board = np.indices((32, 32)).sum(0) % 2 * 254
    grey = np.asarray(fit(Image.fromarray(board.astype(np.uint8)), 8))
    assert (grey == 127).all()
    same = noise_image(8, 8)
    assert np.array_equal(np.asarray(fit(same, 8)), np.asarray(same))


def test_to_mode_leaves_what_is_right():
    image = noise_image(3, 3)
    assert to_mode(image, "RGB") is image
