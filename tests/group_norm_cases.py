"""Problems for group_norm_silu, the result in float64, and what eager PyTorch makes of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers import laid_out
from torch import Tensor

from ddpm_fast import reference

# Channels of a group: 4, 4, 3, 1, all, 12, 4, 3, 2, 16. The last has several chunks in each layout.
CASES = [
    ((2, 32, 8, 8), 8),
    ((3, 12, 5, 7), 3),
    ((1, 9, 17, 9), 3),
    ((2, 20, 3, 3), 20),
    ((2, 10, 6, 5), 1),
    ((2, 48, 7, 9), 4),
    ((4, 16), 4),
    ((2, 6, 41), 2),
    ((2, 8, 2, 3, 5), 4),
    ((1, 64, 33, 35), 4),
]
# Which of the arguments are given, and whether there is a SiLU.
COMBINATIONS = [
    ({"weight", "bias"}, True),
    (set(), False),
    ({"weight", "bias", "emb"}, True),
    ({"weight", "bias", "scale", "shift", "residual"}, True),
    ({"weight", "emb", "scale", "residual"}, True),
    ({"bias", "emb", "scale", "shift"}, False),
]


def problem(
    shape: tuple[int, ...],
    given: set[str],
    dtype: torch.dtype,
    layout: str = "contiguous",
    mean: float = 0.0,
) -> dict[str, Tensor]:
    """x and what else is given; small tensors in x's dtype or float32 by turns, emb one for all,
    scale and shift halves of one tensor."""
    generator = torch.Generator().manual_seed(3)
    n, c = shape[:2]

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    tensors = {"x": laid_out((draw(*shape) + mean).to(dtype), layout)}
    halves = draw(n, 2 * c).to(dtype).chunk(2, 1)
    made = {
        "weight": draw(c),
        "bias": draw(c).to(dtype),
        "emb": draw(1 if n == 2 else n, c),
        "scale": halves[0],
        "shift": halves[1],
        "residual": laid_out(draw(*shape).to(dtype), layout),
    }
    return tensors | {name: tensor for name, tensor in made.items() if name in given}


def exact(tensors: dict[str, Tensor], groups: int, silu: bool) -> Tensor:
    """In float64, of the sum as it is rounded."""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    if "residual" in tensors:
        rounded = (tensors["x"] + tensors["residual"]).double()
        # x + residual as it was rounded, with the gradient of the sum
        wide["residual"] = wide["residual"] + (rounded - wide["x"] - wide["residual"]).detach()
    return reference.group_norm_silu(wide.pop("x"), groups, silu=silu, **wide)[0]


def eager(tensors: dict[str, Tensor], groups: int, silu: bool) -> Tensor:
    """PyTorch's ops in x's dtype."""
    x = tensors["x"].contiguous()
    low = {name: t.to(x.dtype) for name, t in tensors.items()}
    over = {
        name: low[name].reshape(*low[name].shape, *[1] * (x.ndim - 2))
        for name in ("emb", "scale", "shift")
        if name in low
    }
    if "residual" in low:
        x = x + low["residual"].contiguous()
    if "emb" in over:
        x = x + over["emb"]
    # all that it can differentiate by: it fails otherwise where uninitialised memory is filled
    weight, bias = (torch.full(x.shape[1:2], v, dtype=x.dtype).requires_grad_() for v in (1.0, 0.0))
    y = F.group_norm(x, groups, low.get("weight", weight), low.get("bias", bias))
    if "scale" in over:
        y = y * (1 + over["scale"])
    if "shift" in over:
        y = y + over["shift"]
    return F.silu(y) if silu else y
