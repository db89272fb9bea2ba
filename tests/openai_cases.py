"""Diffusions of OpenAI's classes, models for them, and noise that does not depend on the dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from openai_diffusion import peer

# The stand-ins, and the real ones where they can be imported.
PEERS = ["guided", "improved", "guided_diffusion", "improved_diffusion"]
MEANS = ["EPSILON", "START_X", "PREVIOUS_X"]
VARIANCES = ["FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"]
LOSSES = ["MSE", "RESCALED_MSE", "KL", "RESCALED_KL"]
SHAPE = (4, 2, 3, 5)


def loaded(name):
    if name.endswith("_diffusion"):
        pytest.importorskip(name)
    return peer(name)


def diffusion_of(
    name="guided",
    mean="EPSILON",
    variance="FIXED_SMALL",
    loss="MSE",
    *,
    steps=20,
    spacing=None,
    rescale=False,
    coefficients=None,
):
    """A GaussianDiffusion, or a SpacedDiffusion where there is a spacing; a new one at each call.

    coefficients: torch.float64 for a stand-in's tables with all their digits."""
    of = loaded(name)
    arguments = {
        "betas": np.linspace(1e-3, 4 / steps, steps),
        "model_mean_type": of.ModelMeanType[mean],
        "model_var_type": of.ModelVarType[variance],
        "loss_type": of.LossType[loss],
        "rescale_timesteps": rescale,
    }
    if spacing is None:
        diffusion = of.GaussianDiffusion(**arguments)
    else:
        diffusion = of.SpacedDiffusion(of.space_timesteps(steps, spacing), **arguments)
    if coefficients is not None:
        diffusion.coefficients = coefficients
    return diffusion


def model_of(mean="EPSILON", variance="FIXED_SMALL", seen=None):
    """Smooth, and for a learned variance with one that a model may have come to."""

    def model(x, t, shift=0.0):
        if seen is not None:
            seen.append((t.dtype, t.tolist()))
        position = t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) / 20
        gain = {"EPSILON": 0.5, "START_X": 0.7, "PREVIOUS_X": 0.95}[mean]
        m = gain * x + 0.05 * torch.sin(3 * x) + 0.01 * position + shift
        if variance == "LEARNED":
            return torch.cat([m, -3 + 0.3 * torch.cos(x)], 1)
        return torch.cat([m, torch.sin(x + position)], 1) if variance == "LEARNED_RANGE" else m

    return model


def images(dtype=torch.float32, shape=SHAPE):
    levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    levels[:1, :, 0], levels[:1, :, 1] = 0, 255  # both open bins
    return (levels.double() / 127.5 - 1).to(dtype)


def start(dtype=torch.float32, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def same_noise(monkeypatch):
    """torch.randn_like's numbers are the same in every dtype."""

    def randn_like(x):
        return torch.randn(x.shape, dtype=torch.float32).to(x.dtype)

    monkeypatch.setattr(torch, "randn_like", randn_like)


def assert_close_in_units(found, eager, exact, factor=2.0, ulps=4.0):
    """As good as the stock code in the same dtype, by their errors against float64."""
    assert found.dtype == eager.dtype
    assert found.shape == exact.shape
    error = (found.double() - exact).abs().max().item()
    allowed = factor * (eager.double() - exact).abs().max().item()
    allowed += ulps * torch.finfo(found.dtype).eps * max(1.0, exact.abs().max().item())
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
