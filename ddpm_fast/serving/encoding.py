"""Pictures as clients get them: files of finished images, sheets of unfinished ones."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..sessions.threads import release_threads
from ..training.pictures import grid, png, to_uint8
from .offer import Address, Offer

SHEET_PIXELS = 1 << 18  # of a live view's picture: beyond it every second pixel is left out, …


@dataclass(frozen=True)
class Picture:
    """A finished image.

    Attributes:
        pixels: uint8 [C, H, W].
        file: PNG, with the image's address in its text.
    """

    pixels: Tensor
    file: bytes


def picture(offer: Offer, address: Address, x: Tensor) -> Picture:
    """Of a sample, [C, H, W] in [-1, 1]. Its pixels are those that ``ddpm-fast sample`` writes."""
    try:
        pixels = to_uint8(x)
        told = {**offer.told(address), "model": offer.fingerprint}
        return Picture(pixels, png(pixels, json.dumps(told)))
    finally:
        release_threads()  # which are the session's


def listed(offer: Offer, addresses: Sequence[Address], pictures: Sequence[Picture]) -> bytes:
    """Images as JSON: address, URL and file of each."""
    images = [
        {**offer.told(address), "png": base64.b64encode(picture.file).decode()}
        for address, picture in zip(addresses, pictures, strict=True)
    ]
    return json.dumps({"model": offer.fingerprint, "images": images}).encode()


def together(pictures: Sequence[Picture]) -> bytes:
    """Images as one PNG file: the only one's, or a grid of them all."""
    if len(pictures) == 1:
        return pictures[0].file
    try:
        return grid(torch.stack([each.pixels for each in pictures]))
    finally:
        release_threads()


def sheet(states: Sequence[Tensor]) -> tuple[bytes, int]:
    """States side by side, row by row, as a PNG file; how many are in a row.

    Args:
        states: [C, H, W] of one shape, in [-1, 1] or beyond; at least one.

    >>> file, columns = sheet([torch.zeros(1, 8, 8)] * 5)
    >>> file[1:4], columns
    (b'PNG', 3)
    """
    try:
        pixels = to_uint8(torch.stack(list(states))).numpy()
    finally:
        release_threads()
    count, channels, height, width = pixels.shape
    stride = max(1, math.ceil(math.sqrt(count * height * width / SHEET_PIXELS)))
    pixels = pixels[:, :, ::stride, ::stride]
    height, width = pixels.shape[2:]
    columns = math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    laid = np.zeros((rows * columns, channels, height, width), np.uint8)
    laid[:count] = pixels
    laid = laid.reshape(rows, columns, channels, height, width).transpose(2, 0, 3, 1, 4)
    whole = laid.reshape(channels, rows * height, columns * width)
    return png(torch.from_numpy(whole)), columns
