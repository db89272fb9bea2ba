"""Random weights that hide nothing, and how far two networks' outputs lie apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random: zeros, and norms that are the identity, would hide what is wrong."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # biases, and the scales of norms
                parameter.copy_(parameter + 0.3 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
    return model.eval()


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest value expected."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert expected.std() > 1e-3
    return ((found - expected).abs().max() / expected.abs().max()).item()


def assert_same_function(float32: tuple[Tensor, Tensor], float64: tuple[Tensor, Tensor]) -> None:
    """Of two networks' outputs in both precisions, (found, expected): in float64 nothing but
    roundings lies between them. Norms of groups that hardly vary make more of these in float32, so
    there they may lie as far apart as the expected network's own error, three times."""
    assert gap(*float64) < 1e-12
    assert gap(*float32) < 3e-6 + 3 * gap(float32[1].double(), float64[1])


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    """Bit for bit, of the same names and dtypes."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
