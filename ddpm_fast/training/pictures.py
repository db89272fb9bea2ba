"""Samples as PNG files, by pillow."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .images import MODES

GRID_COLUMNS, GRID_GAP = 10, 2
TEXT_KEY = "ddpm_fast"


def to_uint8(x: Tensor) -> Tensor:
    """Pixels 0 … 255 of samples in [-1, 1]: the nearest of (x + 1) · 127.5; uint8, on the CPU.

    >>> to_uint8(torch.tensor([-1.0, 0.0, 0.999, 1.5]))
    tensor([  0, 128, 255, 255], dtype=torch.uint8)
    """
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def png(image: Tensor, text: str | None = None) -> bytes:
    """A PNG file of one image.

    Args:
        image: uint8 [C, H, W], C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
        text: kept in the file, under the key "ddpm_fast".

    Raises:
        ValueError: another number of channels.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if image.ndim != 3 or image.shape[0] not in MODES:
        raise ValueError(f"image must be [C, H, W] with 1 to 4 channels; got {list(image.shape)}")
    pixels: np.ndarray[Any, Any] = image.permute(1, 2, 0).contiguous().cpu().numpy()
    info = PngInfo()
    if text is not None:
        info.add_text(TEXT_KEY, text)
    file = io.BytesIO()
    picture = Image.fromarray(pixels[..., 0] if image.shape[0] == 1 else pixels)
    picture.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def png_text(path: Path) -> str | None:
    """The text that :func:`png` put into a file, by its header; None where there is none.

    Raises:
        OSError: no such file.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            text = image.info.get(TEXT_KEY)
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file, pillow's readers raise any kind
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return None
    return text if isinstance(text, str) else None


def read_png(path: Path) -> Tensor:
    """The pixels of a PNG file of this package, uint8 [C, H, W]."""
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.array(image)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def grid(images: Tensor, columns: int = GRID_COLUMNS) -> bytes:
    """A PNG file of images side by side, row by row, black lines of two pixels around each.

    Args:
        images: uint8 [N, C, H, W], N at least 1.
        columns: in each row, or N if that is less.

    >>> grid(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))[1:4]
    b'PNG'
    """
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    cell_h, cell_w = height + GRID_GAP, width + GRID_GAP
    sheet = torch.zeros(channels, rows * cell_h + GRID_GAP, columns * cell_w + GRID_GAP)
    sheet = sheet.to(torch.uint8)
    if channels in (2, 4):
        sheet[-1] = 255
    for i, image in enumerate(images):
        top, left = (i // columns) * cell_h + GRID_GAP, (i % columns) * cell_w + GRID_GAP
        sheet[:, top : top + height, left : left + width] = image
    return png(sheet)
