"""Rules that results are held to before anything is timed. What breaks one has no speed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


class WrongResult(AssertionError):
    """Says by how much."""


def within(what: str, error: float | Tensor, allowed: float | Tensor) -> None:
    """NaN is within nothing."""
    error, allowed = float(error), float(allowed)
    if not error <= allowed:
        raise WrongResult(f"{what}: max error {error:.3g}, allowed {allowed:.3g}")


def agree(what: str, found: Any, expected: Any, *, atol: float = 0.0, rtol: float = 0.0) -> None:
    """|found − expected| ≤ atol + rtol · |expected|, of tensors, or of as many of them."""
    if isinstance(expected, Mapping):
        found, expected = [found[key] for key in expected], list(expected.values())
    if not isinstance(expected, Tensor) and isinstance(expected, Iterable):
        for one, other in zip(found, expected, strict=True):
            agree(what, one, other, atol=atol, rtol=rtol)
        return
    found, expected = (torch.as_tensor(value).detach() for value in (found, expected))
    if found.shape != expected.shape:
        raise WrongResult(f"{what}: shape {list(found.shape)}, not {list(expected.shape)}")
    if found.numel() == 0:
        return
    expected = expected.to(found.device)
    error = (found.double() - expected.double()).abs()
    over = error - (atol + rtol * expected.double().abs())
    if not bool((over <= 0).all()):
        worst = int(over.flatten().nan_to_num(nan=float("inf")).argmax())
        allowed = atol + rtol * float(expected.flatten()[worst].abs())
        within(what, error.flatten()[worst], allowed)


def like_randn(what: str, z: Tensor, off: float = 0.0) -> None:
    """Moments of standard normals, to five standard deviations, and none too far out. ``off``: the
    error each may have besides."""
    z = z.double()
    count = z.numel()
    within(f"{what}: mean of its noise", z.mean().abs(), 5 / count**0.5 + off)
    within(f"{what}: variance of its noise", (z.var() - 1).abs(), 5 * (2 / count) ** 0.5 + 2 * off)
    within(f"{what}: largest of its noise", z.abs().max(), 7 + off)  # one in 4 · 10¹¹ beyond 7
