"""Sampling of an accelerated GaussianDiffusion beside the stock one, from the same torch seed."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch
from helpers import ulp
from lucidrains_models import SIZE, TinyNet, both, images, seeded, stock_diffusion
from lucidrains_package import package_or_skip

from ddpm_fast import accelerate

package = package_or_skip()
pytestmark = pytest.mark.usefixtures("one_thread")

OBJECTIVES = ["pred_noise", "pred_x0", "pred_v"]
SCHEDULES = ["linear", "cosine", "sigmoid"]
SHAPE = (2, 3, SIZE, SIZE)


def allowed(steps, dtype=torch.float32):
    """Eight roundings a step, none of which the later steps let grow."""
    return 8 * ulp(dtype) * steps


@contextlib.contextmanager
def default_dtype(dtype):
    """The stock code draws its noise in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddpm(schedule, objective, self_condition):
    stock, fast = both(
        package,
        timesteps=30,
        beta_schedule=schedule,
        objective=objective,
        self_condition=self_condition,
    )
    theirs, state = seeded(lambda: stock.sample(2, return_all_timesteps=True))
    ours, our_state = seeded(lambda: fast.sample(2, return_all_timesteps=True))
    assert theirs.shape == ours.shape == (2, 31, 3, SIZE, SIZE)
    assert (theirs - ours).abs().max() < allowed(30)
    assert torch.equal(state, our_state)  # as many numbers drawn
    alone, _ = seeded(lambda: fast.sample(2))
    assert torch.equal(alone, ours[:, -1])
    assert alone.is_inference()  # as theirs are


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim(schedule, objective, eta, self_condition):
    stock, fast = both(
        package,
        timesteps=50,
        sampling_timesteps=13,
        beta_schedule=schedule,
        objective=objective,
        ddim_sampling_eta=eta,
        self_condition=self_condition,
    )
    theirs, state = seeded(lambda: stock.sample(2, return_all_timesteps=True))
    ours, our_state = seeded(lambda: fast.sample(2, return_all_timesteps=True))
    assert theirs.shape == ours.shape == (2, 14, 3, SIZE, SIZE)
    # Their ε from x̂₀ divides by √(1/ᾱ − 1).
    division = 1 + 1 / stock.sqrt_recipm1_alphas_cumprod[0].item()
    assert (theirs - ours).abs().max() < allowed(13) * division
    assert torch.equal(state, our_state)
    alone, _ = seeded(lambda: fast.sample(2))
    assert torch.equal(alone, ours[:, -1])


@pytest.mark.slow
@pytest.mark.parametrize("sampling_timesteps", [None, 250])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_thousand_steps(schedule, objective, sampling_timesteps):
    stock, fast = both(
        package,
        beta_schedule=schedule,
        objective=objective,
        sampling_timesteps=sampling_timesteps,
        ddim_sampling_eta=0.5,
        self_condition=True,
    )
    theirs, _ = seeded(lambda: stock.sample(2))
    ours, _ = seeded(lambda: fast.sample(2))
    assert (theirs - ours).abs().max() < 1e-5  # a hundredth of a grey level is 4e-5


@pytest.mark.parametrize("sampling_timesteps", [None, 9])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("self_condition", [False, True])
def test_float64(self_condition, objective, sampling_timesteps):
    with default_dtype(torch.float64):
        stock, fast = both(
            package,
            timesteps=25,
            sampling_timesteps=sampling_timesteps,
            objective=objective,
            ddim_sampling_eta=0.5,
            self_condition=self_condition,
        )
        stock, fast = stock.double(), fast.double()
        theirs, _ = seeded(lambda: stock.sample(2, return_all_timesteps=True))
        with pytest.warns(UserWarning, match="plain PyTorch: its tensors are float64") as caught:
            ours, _ = seeded(lambda: fast.sample(2, return_all_timesteps=True))
    assert len(caught) == 1
    assert ours.dtype == theirs.dtype == torch.float64
    assert (theirs - ours).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step(schedule, objective):
    """p_sample by itself, to roundings of the step's terms, along a trajectory of 1000 steps."""
    stock, fast = both(package, beta_schedule=schedule, objective=objective)
    x = torch.randn(SHAPE)
    for t in [*range(999, 0, -37), 2, 1, 0]:
        (theirs, their_x0), _ = seeded(lambda x=x, t=t: stock.p_sample(x, t))
        (ours, our_x0), _ = seeded(lambda x=x, t=t: fast.p_sample(x, t))
        m = stock.model(x, torch.full((2,), t))
        size = max(x.abs().max(), m.abs().max(), 1).item()
        of_x0 = {
            "pred_noise": 2 * stock.sqrt_recip_alphas_cumprod[t].item(),
            "pred_x0": 1,
            "pred_v": 2,
        }[objective] * size
        terms = stock.posterior_mean_coef1[t] * of_x0 + 2 * size
        assert (theirs - ours).abs().max() < 6 * ulp(torch.float32) * terms, t
        assert (their_x0 - our_x0).abs().max() < 4 * ulp(torch.float32) * of_x0, t
        x = theirs


def test_not_a_number():
    """ᾱ is 0 at the end of this schedule: their x̂₀ is ∞ − ∞ there, and so is ours."""
    stock, fast = both(package, timesteps=20, beta_schedule="linear", objective="pred_noise")
    assert stock.alphas_cumprod[-1] == 0
    x = torch.randn(SHAPE)
    (theirs, _), _ = seeded(lambda: stock.p_sample(x, 19))
    (ours, _), _ = seeded(lambda: fast.p_sample(x, 19))
    assert 0 < theirs.isnan().sum() < theirs.numel()
    torch.testing.assert_close(theirs, ours, equal_nan=True)


@pytest.mark.parametrize("t", [None, 12, 0])
@pytest.mark.parametrize("self_condition", [False, True])
def test_interpolate(self_condition, t):
    stock, fast = both(package, timesteps=25, self_condition=self_condition)
    first, second = images(2) * 2 - 1, images(2, seed=1) * 2 - 1
    theirs, state = seeded(lambda: stock.interpolate(first, second, t, lam=0.3))
    ours, our_state = seeded(lambda: fast.interpolate(first, second, t, lam=0.3))
    assert (theirs - ours).abs().max() < allowed(25)
    assert torch.equal(state, our_state)


def test_without_normalisation():
    stock, fast = both(package, timesteps=20, auto_normalize=False)
    theirs, _ = seeded(lambda: stock.sample(2))
    ours, _ = seeded(lambda: fast.sample(2))
    assert ours.min() < 0
    assert (theirs - ours).abs().max() < allowed(20)


@pytest.mark.parametrize("sampling_timesteps", [None, 9])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_bfloat16_model(objective, sampling_timesteps):
    """The state stays float32; x̂₀ of an x̂₀ model, and with it DDIM's last image, is the model's."""
    stock, fast = both(
        package,
        model=TinyNet().bfloat16(),
        timesteps=25,
        sampling_timesteps=sampling_timesteps,
        objective=objective,
    )
    theirs, _ = seeded(lambda: stock.sample(2))
    ours, _ = seeded(lambda: fast.sample(2))
    assert ours.dtype == theirs.dtype
    # A state that differs by a rounding may turn one of bfloat16's in the model.
    assert (theirs.float() - ours.float()).abs().max() < 4 * ulp(torch.bfloat16)


def test_autocast():
    stock, fast = both(package, timesteps=25, sampling_timesteps=7)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, _ = seeded(lambda: stock.sample(2))
        ours, _ = seeded(lambda: fast.sample(2))
    assert ours.dtype == theirs.dtype == torch.float32
    assert (theirs - ours).abs().max() < 4 * ulp(torch.bfloat16)


def test_the_package_s_own_unet():
    torch.manual_seed(0)
    model = package.Unet(dim=8, dim_mults=(1, 2), flash_attn=False, self_condition=True)
    stock, fast = both(package, model=model, timesteps=20, sampling_timesteps=5)
    theirs, _ = seeded(lambda: stock.sample(2))
    ours, _ = seeded(lambda: fast.sample(2))
    assert (theirs - ours).abs().max() < 1e-4  # of the network's own roundings


def test_settings_changed_later():
    """What users set on the object after it is accelerated counts from then on."""
    stock, fast = both(package, timesteps=40)
    for diffusion in (stock, fast):
        diffusion.sample(1)
        diffusion.sampling_timesteps, diffusion.is_ddim_sampling = 6, True
    for eta in (0.0, 1.0):
        stock.ddim_sampling_eta = fast.ddim_sampling_eta = eta
        theirs, _ = seeded(lambda: stock.sample(2))
        ours, _ = seeded(lambda: fast.sample(2))
        assert (theirs - ours).abs().max() < 1e-5


class Watching(TinyNet):
    """Counts how many of the states that it was given are still alive."""

    def __init__(self):
        super().__init__()
        self.seen, self.most = [], 0

    def forward(self, x, t, x_self_cond=None):
        self.seen.append(weakref.ref(x))
        self.most = max(self.most, sum(state() is not None for state in self.seen))
        return super().forward(x, t, x_self_cond)


@pytest.mark.parametrize("sampling_timesteps", [None, 20])
def test_memory_is_bounded(sampling_timesteps):
    model = Watching()
    config = {"model": model, "timesteps": 30, "sampling_timesteps": sampling_timesteps}
    stock_diffusion(package, **config).sample(1)
    assert model.most == len(model.seen)  # all of them, in the stock loop
    model.seen, model.most = [], 0
    fast = accelerate(stock_diffusion(package, **config))
    fast.sample(1)
    assert len(model.seen) == (sampling_timesteps or 30)
    assert model.most == 1
    fast.sample(1, return_all_timesteps=True)
    assert model.most >= 20
