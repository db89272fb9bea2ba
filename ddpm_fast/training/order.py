"""Which image a training run sees when, and which way round: functions of (seed, position).

A position counts the samples consumed before, over all epochs and processes. It is the sample id of
the noise contract, so that order, flips, noise and timesteps need nothing but the count to go on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..ops.checks import as_int, noise_address
from ..reference import noise_words
from ..schedule import integer

FLIP_STREAM, ORDER_STREAM = 6, 8
MAX_IMAGES = 1 << 33  # two words each, of 2^34 elements
_FLIP_BLOCK = 4096


def data_order(num_images: int, position: int, count: int, seed: int) -> Tensor:
    """Which image each of the positions ``position`` … ``position + count − 1`` is.

    Every epoch, num_images positions long, is a permutation of its own: the order of the 64-bit
    numbers (w_2i, w_2i+1) of stream 8, i the image and the epoch the sample id. The permutation of
    the latest epochs is kept, so that a call costs a look-up.

    Args:
        num_images: 1 … 2^33.
        position: at least 0.
        count: at least 0.
        seed: in [0, 2^64).

    Returns:
        int64 [count] of 0 … num_images − 1.

    Raises:
        TypeError, ValueError: an argument out of its range.

    >>> data_order(4, 0, 8, seed=0).tolist()
    [1, 0, 3, 2, 0, 1, 3, 2]
    >>> data_order(4, 6, 2, seed=0).tolist()
    [3, 2]
    """
    num_images = integer("num_images", num_images)
    if not 1 <= num_images <= MAX_IMAGES:
        raise ValueError(f"num_images must lie in 1 … 2^33; got {num_images}")
    position = as_int("position", position, 1 << 63)
    count = as_int("count", count, 1 << 63)
    seed = as_int("seed", seed, 1 << 64)
    return images_at(num_images, torch.arange(position, position + count), seed)


def images_at(num_images: int, positions: Tensor, seed: int) -> Tensor:
    """:func:`data_order` at any positions, int64 [N]; arguments are not checked."""
    return _looked_up(positions, num_images, lambda epoch: _permutation(num_images, epoch, seed))


@lru_cache(maxsize=2)  # a batch may begin in one epoch and end in the next
def _permutation(num_images: int, epoch: int, seed: int) -> Tensor:
    def word(value: int) -> Tensor:
        return torch.tensor(value if value < 1 << 63 else value - (1 << 64))

    blocks = torch.arange((num_images + 1) // 2)
    w0, w1, w2, w3 = noise_words(blocks, word(ORDER_STREAM << 24), word(seed), word(epoch))
    # Ordered as unsigned numbers: the top bit flipped, they are signed ones.
    high, low = torch.stack([w0, w2], 1), torch.stack([w1, w3], 1)
    keys = ((high ^ 0x80000000) << 32 | low).flatten()[:num_images]
    return keys.argsort(stable=True)


def flips(seed: int, sample_ids: Tensor) -> Tensor:
    """Which samples are mirrored left to right: the top bit of word 0 of stream 6.

    Args:
        seed: in [0, 2^64).
        sample_ids: int64 [N], the positions.

    Returns:
        bool [N].

    >>> flips(0, torch.arange(6)).tolist()
    [False, False, False, True, True, False]
    """
    seed, _, ids = noise_address(seed, sample_ids, len(sample_ids), sample_ids.device)
    assert ids is not None
    first = torch.zeros_like(ids)
    seeds = torch.full_like(ids, seed)
    return noise_words(first, first + (FLIP_STREAM << 24), seeds, ids)[0] >> 31 != 0


def flips_at(seed: int, positions: Tensor) -> Tensor:
    """:func:`flips` of positions that mostly follow each other, drawn many at a time."""
    return _looked_up(positions, _FLIP_BLOCK, lambda block: _flip_block(seed, block))


@lru_cache(maxsize=2)
def _flip_block(seed: int, block: int) -> Tensor:
    return flips(seed, torch.arange(block * _FLIP_BLOCK, (block + 1) * _FLIP_BLOCK))


def _looked_up(positions: Tensor, size: int, table: Callable[[int], Tensor]) -> Tensor:
    """Position p's entry p mod size of table(p // size)."""
    if not len(positions):
        return table(0)[:0].clone()
    rows, columns = positions // size, positions % size
    values = table(int(rows[0]))[columns]
    for row in rows.unique().tolist():
        if row != rows[0]:
            here = rows == row
            values[here] = table(row)[columns[here]]
    return values
