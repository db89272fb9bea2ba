"""What a plan does otherwise than its model, by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..ops.checks import FLOAT_DTYPES

REWRITES: tuple[str, ...] = (
    "time_table",
    "group_norm_silu",
    "phase_upsample",
    "fused_qkv",
    "channels_last",
    "native_conv",
    "winograd",
    "native_attention",
    "joined_skips",
)
"""The rewrites by name; the last four are of the CPU in float32.

time_table: the timesteps' embedding and its projections of all residual blocks are computed at once
    for a trajectory, of which a step reads a row; otherwise at each step as the model does.
group_norm_silu: GroupNorm, what a residual block adds before or applies between, and SiLU are one
    operation.
phase_upsample: the convolution of an image of doubled sides is one of the image itself, by sums of
    its weights: 4 products in place of 9.
fused_qkv: one product gives an attention's queries, keys and values.
channels_last: images and weights lie in this layout.
native_conv: convolutions by the package's own kernels, from packed weights; needs channels_last.
winograd: 3×3 convolutions by F(2×2, 3×3), 16 products in place of 36; with phase_upsample 9 for
    those of doubled images.
native_attention: scores, softmax and weighted values by one kernel of the package's own; otherwise
    PyTorch's scaled_dot_product_attention.
joined_skips: what a residual block gives is written where the concatenation will be read.
"""


def names(rewrites: str | Iterable[str]) -> frozenset[str]:
    """Names of rewrites, or "all" of them.

    Raises:
        TypeError, ValueError: not names, or others.
    """
    if rewrites == "all":
        return frozenset(REWRITES)
    if not isinstance(rewrites, Iterable):
        raise TypeError(f"rewrites must be names; got {type(rewrites).__name__}")
    found = [rewrites] if isinstance(rewrites, str) else list(rewrites)
    if unknown := [name for name in found if name not in REWRITES]:
        raise ValueError(f"rewrites must be among {', '.join(REWRITES)}; got {unknown}")
    return frozenset(found)


def check_dtype(dtype: torch.dtype) -> None:
    """Raises ValueError unless a plan can be of it."""
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"a plan's dtype must be float32, bfloat16 or float16; got {dtype}")
