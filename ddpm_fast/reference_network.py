"""What of a network's formulas the kernels compute, in plain PyTorch: that part of
:mod:`ddpm_fast.reference`.

[WH] Wu & He 2018; [Ho] Ho, Jain & Abbeel 2020; [DN] Dhariwal & Nichol 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_moments(u: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each sample's groups of channels, [N, groups] [WH, eq. 7]."""
    grouped = u.reshape(u.shape[0], num_groups, -1)
    mean = grouped.mean(2)
    return mean, (grouped - mean[:, :, None]).square().mean(2)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    emb: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """y = z σ(z) with z = norm(s + emb) · (1 + scale) + shift, s = x + residual; and s.

    Group normalisation [WH], its affine map per channel, then per sample and channel [DN, section
    4], and the SiLU that follows each norm [Ho, appendix B].

    Args:
        x: [N, C, …]; residual: of the same shape.
        num_groups: how many groups the channels make.
        weight, bias: [C].
        eps: added to the variance.
        emb, scale, shift: [N, C] or [1, C].
        silu: False for y = z.
    """
    s = x if residual is None else x + residual
    u = s if emb is None else s + _over_pixels(emb, s)
    mean, variance = group_moments(u, num_groups)
    rstd = (variance + eps).rsqrt()
    each = u.shape[1] // num_groups  # channels of a group
    mean, rstd = (m.repeat_interleave(each, 1) for m in (mean, rstd))
    z = (u - _over_pixels(mean, u)) * _over_pixels(rstd, u)
    if weight is not None:
        z = z * _over_pixels(weight[None], z)
    if bias is not None:
        z = z + _over_pixels(bias[None], z)
    if scale is not None:
        z = z * (1 + _over_pixels(scale, z))
    if shift is not None:
        z = z + _over_pixels(shift, z)
    return z * torch.sigmoid(z) if silu else z, s


def _over_pixels(values: Tensor, like: Tensor) -> Tensor:
    """[N, C] as [N, C, 1, …]."""
    return values.reshape(*values.shape, *[1] * (like.ndim - 2))
