"""What group_norm_silu is given for each channel, and its three kernels as formulas in PyTorch: the
backend "reference"."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import checks


class Affine(NamedTuple):
    """weight and bias [C]; emb, scale and shift [N, C] or [1, C]."""

    weight: Tensor | None
    bias: Tensor | None
    emb: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    def as_read(self) -> Affine:
        """In float32, channels side by side."""
        if all(t is None or (t.dtype == torch.float32 and t.stride(-1) == 1) for t in self):
            return self
        return Affine(*[None if t is None else _side_by_side(t.float()) for t in self])

    def addresses(self) -> tuple[int, ...]:
        """Of what as_read() gave: group_norm_affine's arguments in csrc/arguments.h."""
        found = [checks.address(self.weight), checks.address(self.bias)]
        for tensor in self[2:]:
            if tensor is None:
                found += (0, 0)
            else:
                found += (tensor.data_ptr(), 0 if tensor.shape[0] == 1 else tensor.stride(0))
        return tuple(found)


def _side_by_side(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def forward(
    x: Tensor,
    num_groups: int,
    affine: Affine,
    eps: float,
    residual: Tensor | None,
    silu: bool,
    y: Tensor,
    sum_out: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    """As run_forward."""
    s = x if residual is None else x + residual
    weight, bias, emb, scale, shift = affine
    result, _ = reference.group_norm_silu(
        s.float(), num_groups, weight, bias, eps=eps, emb=emb, scale=scale, shift=shift, silu=silu
    )
    if mean is not None and rstd is not None:
        u = s.float() if emb is None else s.float() + _over_pixels(emb, s)
        found, variance = reference.group_moments(u, num_groups)
        mean.copy_(found)
        rstd.copy_((variance + eps).rsqrt())
    y.copy_(result)
    if sum_out is not None:
        sum_out.copy_(s)


def plain(
    x: Tensor,
    num_groups: int,
    affine: Affine,
    eps: float,
    residual: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """y and x + residual by PyTorch's own operations throughout."""
    s = x if residual is None else x + residual
    weight, bias, emb, scale, shift = (None if t is None else t.float() for t in affine)
    y, _ = reference.group_norm_silu(
        s.float(), num_groups, weight, bias, eps=eps, emb=emb, scale=scale, shift=shift, silu=silu
    )
    return y.to(x.dtype), s


def sums(
    dy: Tensor, s: Tensor, mean: Tensor, rstd: Tensor, affine: Affine, silu: bool, out: Tensor
) -> None:
    """Σ dz, Σ dz·x̂ and Σ x̂ of each channel of a sample, [3, N, C]."""
    dz, x_hat = _dz_and_x_hat(dy, s, mean, rstd, affine, silu)
    out.copy_(torch.stack([t.reshape(*t.shape[:2], -1).sum(2) for t in (dz, dz * x_hat, x_hat)]))


def bwd(
    dy: Tensor,
    dsum: Tensor | None,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    affine: Affine,
    silu: bool,
    group_means: Tensor,
    dx: Tensor,
) -> None:
    """rstd (dz·A − m1 − x̂ m2) + dsum."""
    dz, x_hat = _dz_and_x_hat(dy, s, mean, rstd, affine, silu)
    m1, m2, by_group = (_of_channels(m, s) for m in (*group_means, rstd))
    ds = by_group * (dz * _slope(affine, s) - m1 - x_hat * m2)
    dx.copy_(ds if dsum is None else ds + dsum.float())


def _dz_and_x_hat(
    dy: Tensor, s: Tensor, mean: Tensor, rstd: Tensor, affine: Affine, silu: bool
) -> tuple[Tensor, Tensor]:
    u = s.float() if affine.emb is None else s.float() + _over_pixels(affine.emb, s)
    x_hat = (u - _of_channels(mean, s)) * _of_channels(rstd, s)
    dz = dy.float()
    if silu:
        z = x_hat * _slope(affine, s)
        if affine.bias is not None:
            bias = affine.bias[None]
            bias = bias if affine.scale is None else bias * (1 + affine.scale)
            z = z + _over_pixels(bias, s)
        if affine.shift is not None:
            z = z + _over_pixels(affine.shift, s)
        sigmoid = torch.sigmoid(z)
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    return dz, x_hat


def _slope(affine: Affine, s: Tensor) -> Tensor:
    """A = weight (1 + scale)."""
    slope = s.new_ones(1, s.shape[1], dtype=torch.float32)
    if affine.weight is not None:
        slope = slope * affine.weight
    if affine.scale is not None:
        slope = slope * (1 + affine.scale)
    return _over_pixels(slope, s)


def _of_channels(of_groups: Tensor, s: Tensor) -> Tensor:
    return _over_pixels(of_groups.repeat_interleave(s.shape[1] // of_groups.shape[1], 1), s)


def _over_pixels(values: Tensor, s: Tensor) -> Tensor:
    return values.reshape(*values.shape, *[1] * (s.ndim - 2))
