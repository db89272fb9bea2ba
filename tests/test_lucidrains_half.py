"""Losses of models in float16, whose range large weights and small residuals leave."""

from __future__ import annotations

import pytest
import torch
from helpers import ulp
from lucidrains_models import SIZE, TinyNet, both, images, seeded
from lucidrains_package import package_or_skip

from ddpm_fast.integrations.forward import ForwardWeights
from ddpm_fast.integrations.regression import regression_loss

package = package_or_skip()
pytestmark = pytest.mark.usefixtures("one_thread")

HALF = ulp(torch.float16)
ONE = ForwardWeights(torch.ones(1), torch.zeros(1))


def gradient_of(m, x0, weights, upstream, total=True):
    """Of upstream · Σ w mean((x_0 − m)²), where m is float16."""
    m = m.half().requires_grad_()
    t = torch.zeros(len(m), dtype=torch.int64)
    loss = regression_loss(m, t, ONE, "sample", x0, None, (0, None), weights, total)
    (gradient,) = torch.autograd.grad(loss.sum() * upstream, m)
    assert gradient.dtype == torch.float16
    return m.detach().double(), loss.detach(), gradient


@pytest.mark.parametrize("total", [True, False])
def test_large_weights(total):
    """SNRs of one batch, 1e5 beside 1e-4: each sample's gradient has all of float16's digits."""
    weights = torch.tensor([1e5, 1e2, 1.0, 1e-4]) / 4
    x0 = images() * 2 - 1
    upstream = 0.01
    m, loss, found = gradient_of(torch.zeros_like(x0) + 0.3, x0, weights, upstream, total)
    k = x0[0].numel()
    expected = 2 * upstream / k * weights.double()[:, None, None, None] * (m - x0.double())
    assert expected.abs().max() > 1
    tolerance = 2 * HALF * expected.abs() + 2**-24  # the smallest float16
    assert ((found.double() - expected).abs() <= tolerance).all()
    losses = weights.double() * ((m - x0.double()) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss.double(), losses.sum() if total else losses, rtol=1e-6, atol=0)


def test_small_residuals():
    """A mean over many elements divides them: by themselves they would be float16's zeros."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    upstream = 2.0**14  # a gradient scaler's
    m, _, found = gradient_of(x0, x0, torch.full((2,), 0.5), upstream)  # roundings of m alone
    expected = upstream * (m - x0.double()) / x0[0].numel()
    difference = (found.double() - expected).norm()
    assert 0 < difference < HALF * expected.norm()


def test_gradients_beyond_float16():
    """Are infinite, as the stock code's, so that a gradient scaler sees them."""
    x0 = images() * 2 - 1
    weights = torch.tensor([1e5, 1.0, 1.0, 1.0])
    _, loss, found = gradient_of(x0 + 0.5, x0, weights, 65536.0)
    assert loss.isfinite()
    assert found[0].isinf().all()
    assert found[1:].isfinite().all()


@pytest.mark.parametrize("timesteps", [1000, 4000])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_gradient_scaler(objective, timesteps):
    """The scale settles where the stock code's does, at the timesteps with the largest weights."""
    scales, weights = [], []
    for diffusion in both(
        package, objective=objective, beta_schedule="cosine", timesteps=timesteps, model=Scaled()
    ):
        generator = torch.Generator().manual_seed(1)
        optimiser = torch.optim.SGD(diffusion.parameters(), lr=1e-6)
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
        for step in range(24):
            x = torch.rand(16, 3, SIZE, SIZE, generator=generator)
            t = torch.randint(0, 10, (16,), generator=generator)
            with torch.autocast("cpu", torch.float16):
                loss, _ = seeded(lambda d=diffusion, x=x, t=t: d(x, times=t), step)
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad()
        scales.append(scaler.get_scale())
        weights.append(diffusion.model.conv.weight.detach())
    assert scales[0] == scales[1] >= 1
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)


class Scaled(TinyNet):
    """float16 under autocast, with outputs beyond the data's range; of any number of timesteps."""

    def forward(self, x, t, x_self_cond=None):
        return 4 * self.conv(x)


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_gradients_of_gradients(objective):
    stock, fast = both(package, objective=objective, beta_schedule="cosine", model=Scaled())
    found = []
    for diffusion in (stock, fast):
        with torch.autocast("cpu", torch.float16):
            loss, _ = seeded(
                lambda d=diffusion: d(images(), times=torch.tensor([400, 600, 800, 990]))
            )
        first = torch.autograd.grad(loss, diffusion.model.conv.weight, create_graph=True)[0]
        found += torch.autograd.grad((first**2).sum(), diffusion.model.conv.weight)
    assert (found[0] - found[1]).norm() <= 8 * HALF * found[0].norm()
