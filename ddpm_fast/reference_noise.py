"""The noise contract (docs/noise.md) in plain PyTorch, to the last bit the kernels' noise: what
:mod:`ddpm_fast.reference` has of noise.

[Salmon] Salmon et al. 2011.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a · b + c. In float32 rounded once, as a fused multiply-add; in float64 as written."""
    if a.dtype != torch.float32:
        return a * b + c
    product, addend = torch.broadcast_tensors(a.double() * b.double(), c.double())  # exact
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)  # TwoSum (Knuth)
    # Round to odd: where float64 had to round, its last bit becomes 1, so that the rounding to
    # float32 that follows sees on which side of a tie the exact sum lies (Boldo & Melquiond 2008).
    bits = total.view(torch.int64)
    towards = torch.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & error.isfinite() & ((bits & 1) == 0)
    return torch.where(inexact, bits + towards, bits).view(torch.float64).float()


_WORD = 0xFFFFFFFF
TIMESTEP_STREAM = 3


def philox4x32_10(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Four random words of a 128-bit counter under a 64-bit key [Salmon, section 3.3].

    Args:
        counter: four int64 tensors of values below 2^32, broadcastable.
        key: two of the same.

    Returns:
        Four int64 tensors of values below 2^32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64: the masks below bring out the right 32 bits.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = (product1 >> 32 & _WORD) ^ c1 ^ k0
        c1 = product1 & _WORD
        c2 = (product0 >> 32 & _WORD) ^ c3 ^ k1
        c3 = product0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return tuple(torch.broadcast_tensors(c0, c1, c2, c3))


def noise_words(
    blocks: Tensor, draw: Tensor, seeds: Tensor, sample_ids: Tensor
) -> tuple[Tensor, ...]:
    """The words at an address: key = seed, counter = (block, draw, sample low, sample high).

    Args:
        blocks: int64, element index >> 2.
        draw: int64, stream << 24 | index.
        seeds: int64, 64-bit patterns (two's complement).
        sample_ids: int64.
    """
    counter = (blocks, draw, sample_ids & _WORD, sample_ids >> 32 & _WORD)
    return philox4x32_10(counter, (seeds & _WORD, seeds >> 32 & _WORD))


def _horner(x: Tensor, *coefficients: str) -> Tensor:
    total = f32(coefficients[0], x).expand_as(x)
    for c in coefficients[1:]:
        total = fma(total, x, f32(c, x))
    return total


def f32(literal: str, like: Tensor) -> Tensor:
    return torch.tensor(float.fromhex(literal), dtype=torch.float32, device=like.device)


def _minus_two_log_uniform(w: Tensor) -> Tensor:
    """-2 ln((w + ½) 2^-32) in float32: csrc/core/normal.h, line by line."""
    flipped = w ^ _WORD
    u = fma(torch.minimum(w, flipped).float(), f32("0x1p-32", w), f32("0x1p-33", w))
    t = torch.where(w < flipped, u, 1 - u)
    bits = t.view(torch.int32)
    k = (bits - 0x3F3504F3) >> 23
    f = (bits - (k << 23)).view(torch.float32)
    s = torch.where(k == 0, -u, f - 1)
    q = _horner(
        s,
        "0x1.a359bcp-3",
        "-0x1.4ec5b2p-2",
        "0x1.615c82p-2",
        "-0x1.9737dcp-2",
        "0x1.ff5b64p-2",
        "-0x1.555b1cp-1",
        "0x1.00007ep+0",
    )
    return fma(k.float(), f32("-0x1.62e430p+0", w), fma(q, s * s, -2 * s))


def box_muller(w_even: Tensor, w_odd: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals of two words (int64, below 2^32), float32: csrc/core/normal.h.

    U = (w_even + ½) 2^-32, r = √(−2 ln U), θ = 2π w_odd 2^-32: (r cos θ, r sin θ).
    """
    # By float64: torch's float32 sqrt is not correctly rounded on every processor.
    r = _minus_two_log_uniform(w_even).double().sqrt().float()
    quarter = ((w_odd << 2 & _WORD) ^ 0x80000000) - 0x80000000  # as a signed 32-bit integer
    y = quarter.float() * f32("0x1p-32", r)
    y2 = y * y
    sin_low = _horner(y2, "-0x1.2cf5d4p-8", "0x1.465a3ep-4", "-0x1.4abba8p-1", "-0x1.18faf8p-24")
    sin_y = fma(y, f32("0x1.921fb6p+0", r), y * sin_low)
    cos_y = _horner(
        y2, "0x1.d9f7bcp-11", "-0x1.55c664p-6", "0x1.03c1dep-2", "-0x1.3bd3ccp+0", "0x1p+0"
    )
    turn = w_odd + 0x20000000
    swap = turn & 0x40000000 != 0
    z_even = r * torch.where(swap, sin_y, cos_y)
    z_odd = r * torch.where(swap, cos_y, sin_y)
    return (
        torch.where(turn + 0x40000000 & 0x80000000 != 0, -z_even, z_even),
        torch.where(turn & 0x80000000 != 0, -z_odd, z_odd),
    )


def randn(shape: Sequence[int], seeds: Tensor, sample_ids: Tensor, draws: Tensor) -> Tensor:
    """Addressable standard normals.

    Args:
        shape: [N, …].
        seeds, sample_ids, draws: int64 [N]; a draw is stream << 24 | index.

    Returns:
        float32, contiguous, on ``sample_ids``' device.
    """
    elements = math.prod(shape[1:])
    blocks = torch.arange((elements + 3) // 4, device=sample_ids.device)
    w = noise_words(blocks, draws[:, None], seeds[:, None], sample_ids[:, None])
    z = torch.stack([*box_muller(w[0], w[1]), *box_muller(w[2], w[3])], -1)
    return z.reshape(shape[0], 4 * len(blocks))[:, :elements].reshape(list(shape)).contiguous()


def random_timesteps(num_steps: int, seeds: Tensor, sample_ids: Tensor) -> Tensor:
    """Training timesteps, uniform on 0 … T−1: (w₀ · T) >> 32 of stream 3; int64 [N].

    Args:
        num_steps: T.
        seeds, sample_ids: int64 [N].
    """
    first = torch.zeros_like(sample_ids)
    words = noise_words(first, first + (TIMESTEP_STREAM << 24), seeds, sample_ids)
    return words[0] * num_steps >> 32


def first_words(stream: int, seeds: Tensor, sample_ids: Tensor) -> Tensor:
    """Word 0 of each sample's draw (stream, index 0): int64 [N], below 2^32."""
    first = torch.zeros_like(sample_ids)
    return noise_words(first, first + (stream << 24), seeds, sample_ids)[0]


def antithetic_timesteps(
    num_steps: int, group_size: int, seeds: Tensor, sample_ids: Tensor
) -> Tensor:
    """Training timesteps that each group of consecutive ids spreads evenly over 0 … T−1, from one
    random start [Kingma et al. 2021, appendix I.1]; int64 [N].

    Args:
        num_steps: T.
        group_size: G, below 2^31; ids g·G … g·G + G − 1 share word 0 of stream 3 of id g·G.
        seeds, sample_ids: int64 [N].
    """
    place = sample_ids % group_size
    start = first_words(TIMESTEP_STREAM, seeds, sample_ids - place)
    return (start + (place << 32) // group_size & _WORD) * num_steps >> 32
