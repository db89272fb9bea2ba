"""Image files as arrays of one size and number of channels, by pillow."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMATS = "apng avif bmp dib gif ico jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
EXTENSIONS = frozenset(f".{name}" for name in _FORMATS.split())
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_ORIENTATION = 0x0112  # Exif's tag; 5 … 8 are turned by a quarter


class UnreadableImage(ValueError):
    """An image file that cannot be read: which, and why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both, so that it survives a worker's pickle
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"cannot read image {shown(self.path)}: {self.reason}"


class NoReadableImageError(ValueError):
    """Of a data set whose images were all to be skipped."""


def shown(path: str | os.PathLike[str]) -> str:
    """A path as it can be printed, whatever bytes it is made of."""
    return os.fsencode(path).decode("utf-8", "replace")


def read_image(
    path: str, size: int | tuple[int, int] | None, channels: int
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image file's pixels, uint8 [channels, H, W].

    The first frame, turned as its Exif orientation says. 16-bit grey levels are scaled to 8; what
    is transparent lies on white, unless ``channels`` has room for the transparency.

    Args:
        path: of the file.
        size: side of the square that it is fitted to (:func:`fit`); or the (height, width) that it
            must have; or None, any.
        channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.

    Raises:
        UnreadableImage: no such file, cut short, not an image, or not of the size.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            picture = to_mode(_upright(image), MODES[channels])
            if isinstance(size, int):
                picture = fit(picture, size)
            elif size is not None and picture.size != size[::-1]:
                raise ValueError(
                    f"its size is {picture.height}×{picture.width}, not {_times(size)}"
                )
            pixels = np.asarray(picture, dtype=np.uint8)
    except MemoryError:
        raise
    except Exception as error:  # pillow's decoders raise SyntaxError, struct.error, EOFError, …
        raise UnreadableImage(path, _reason(error, path)) from error
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def read_size(path: str) -> tuple[int, int]:
    """Height and width by an image file's header, upright.

    Raises:
        UnreadableImage: no such file, or not an image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = False
            with contextlib.suppress(Exception):
                turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableImage(path, _reason(error, path)) from error
    return (width, height) if turned else (height, width)


def to_mode(image: Image, mode: str) -> Image:
    """``image`` in mode L, LA, RGB or RGBA, of any mode pillow opens files in.

    Raises:
        ValueError: pixels whose range is unknown: floating point, or integers beyond 16 bits.
    """
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floating point, of unknown range")
    if image.mode.startswith("I"):  # 16 bits, which pillow may keep in 32
        levels = np.asarray(image).astype(np.int64)
        if levels.size and (levels.min() < 0 or levels.max() > 65535):
            raise ValueError("its pixels are integers of more than 16 bits, of unknown range")
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if mode in ("L", "RGB"):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")  # P, CMYK, YCbCr, HSV: not every mode leads to every other
    return image if image.mode == mode else image.convert(mode)


def fit(image: Image, side: int) -> Image:
    """The middle square of ``image``, its shorter side brought to ``side`` pixels.

    Halved by averaging as long as it is twice as large, then resampled by a cubic: the
    preprocessing of Dhariwal & Nichol 2021.
    """
    from PIL.Image import Resampling

    width, height = image.size
    while min(width, height) >= 2 * side:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Resampling.BOX)
    shorter = min(width, height)
    if shorter != side:
        width, height = (max(side, round(edge * side / shorter)) for edge in (width, height))
        image = image.resize((width, height), Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    with contextlib.suppress(Exception):  # damaged Exif data, which viewers disregard as well
        return ImageOps.exif_transpose(image)
    return image


def _reason(error: Exception, path: str) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error).__name__ == "UnidentifiedImageError":
        empty = os.path.exists(path) and os.path.getsize(path) == 0
        return "the file is empty" if empty else "it is not an image that pillow knows"
    return str(error) or type(error).__name__


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"
