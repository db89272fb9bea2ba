"""Accelerated pipelines on a GPU: they compute what they do on the CPU, and nothing waits. What
needs a package that is not there is skipped."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers import no_gpu
from openai_diffusion import peer

import ddpm_fast
from ddpm_fast import NoiseSchedule, Sampler, randn, use_backend

pytestmark = pytest.mark.gpu

SHAPE = (4, 3, 16, 16)


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def on(request: pytest.FixtureRequest):
    status = ddpm_fast.backends()[request.param]
    if no_gpu() or not status.available:
        pytest.skip(f"{request.param}: {status.detail}")
    return request.param


@contextlib.contextmanager
def nothing_waits():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def openai_diffusion(variance: str = "LEARNED_RANGE", loss: str = "RESCALED_MSE"):
    stand_in = peer("guided")
    return stand_in.SpacedDiffusion(
        use_timesteps=stand_in.space_timesteps(100, "10"),
        betas=NoiseSchedule.cosine(100).betas.numpy(),
        model_mean_type=stand_in.ModelMeanType.EPSILON,
        model_var_type=stand_in.ModelVarType[variance],
        loss_type=stand_in.LossType[loss],
        rescale_timesteps=True,
    )


def learned(x, t, **kwargs):
    share = (t.float() / 1000).reshape(-1, 1, 1, 1)
    return torch.cat([0.7 * x, share * x.clamp(-1, 1)], 1)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.is_cuda
    assert torch.allclose(found.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["p_sample_loop", "ddim_sample_loop"])
def test_openai_samples_are_the_cpus(method, on):
    diffusion = ddpm_fast.accelerate(openai_diffusion(), seed=7, sample_ids=[3, 1, 4, 1])
    expected = getattr(diffusion, method)(learned, SHAPE, device="cpu")
    with use_backend(on):
        close(getattr(diffusion, method)(learned, SHAPE, device="cuda"), expected)


def test_openai_losses_and_bound_are_the_cpus(on):
    diffusion = ddpm_fast.accelerate(openai_diffusion(), seed=7)
    x0, t = randn(SHAPE, seed=1).clamp(-1, 1), torch.tensor([0, 3, 9, 5])
    bound = diffusion.calc_bpd_loop(learned, x0)
    losses = diffusion.training_losses(learned, x0, t)
    diffusion.set_noise(seed=7)
    with use_backend(on):
        for expected, found in (
            (bound, diffusion.calc_bpd_loop(learned, x0.cuda())),
            (losses, diffusion.training_losses(learned, x0.cuda(), t.cuda())),
        ):
            assert expected.keys() == found.keys()
            for key, values in expected.items():
                close(found[key], values)


def test_no_step_of_openais_waits(on):
    diffusion = ddpm_fast.accelerate(openai_diffusion(), seed=7)
    x, t = randn(SHAPE, seed=1, device="cuda"), torch.tensor([0, 3, 9, 5]).cuda()
    with use_backend(on):
        diffusion.p_sample_loop(learned, SHAPE, device="cuda")  # makes the tables
        diffusion.ddim_sample_loop(learned, SHAPE, device="cuda")
        diffusion.training_losses(learned, x.clamp(-1, 1), t)
        with nothing_waits():
            diffusion.p_sample(learned, x, t)
            diffusion.ddim_sample(learned, x, t)
            diffusion.p_sample_loop(learned, SHAPE, device="cuda")
            diffusion.training_losses(learned, x.clamp(-1, 1), t)


# The schedulers of diffusers ------------------------------------------------------------------


def schedulers():
    module = pytest.importorskip("diffusers") and pytest.importorskip(
        "ddpm_fast.integrations.diffusers.schedulers"
    )
    return module.FastDDPMScheduler(variance_type="fixed_large"), module.FastDDIMScheduler()


@pytest.mark.parametrize("where", ["cpu", "cuda"], ids=["on-host", "on-device"])
@pytest.mark.parametrize("which", [0, 1], ids=["ddpm", "ddim"])
def test_no_step_of_a_scheduler_waits(which, where, on):
    scheduler = schedulers()[which]
    scheduler.set_timesteps(10, device=where)
    scheduler.set_noise(seed=7)
    x, m = randn(SHAPE, seed=1, device="cuda"), randn(SHAPE, seed=2, device="cuda")
    foreign = torch.tensor(500, device="cuda"), torch.tensor([900, 500, 100, 0], device="cuda")
    t = list(scheduler.timesteps)
    with use_backend(on):
        scheduler.step(m, t[0], x)  # makes the tables
        with nothing_waits():
            for timestep in (*t, *foreign):
                scheduler.step(m, timestep, x)


@pytest.mark.parametrize("which", [0, 1], ids=["ddpm", "ddim"])
def test_a_schedulers_steps_are_the_cpus(which, on):
    scheduler = schedulers()[which]
    scheduler.set_timesteps(10)
    scheduler.set_noise(seed=7)
    x = y = randn(SHAPE, seed=1)
    y = y.cuda()
    for t in scheduler.timesteps:
        x = scheduler.step(0.7 * x, t, x).prev_sample
        with use_backend(on):
            y = scheduler.step(0.7 * y, t, y).prev_sample
    close(y, x)


def test_a_generator_of_the_cpu_serves_a_sample_on_the_gpu(on):
    scheduler = schedulers()[0]
    x, m = randn(SHAPE, seed=1), randn(SHAPE, seed=2)
    expected = scheduler.step(m, 500, x, generator=torch.Generator().manual_seed(3)).prev_sample
    with use_backend(on):
        generator = torch.Generator().manual_seed(3)
        close(scheduler.step(m.cuda(), 500, x.cuda(), generator=generator).prev_sample, expected)
    with pytest.raises(ValueError, match="cuda"):
        scheduler.step(m, 500, x, generator=torch.Generator("cuda"))


def test_a_sampler_of_a_pipeline(on):
    arguments = {"model": learned, "num_steps": 5}
    sampler = Sampler.from_pipeline(openai_diffusion(), **arguments, backend=on)
    found = sampler.sample(SHAPE, seed=3, x_T=randn(SHAPE, seed=3).cuda())
    expected = Sampler.from_pipeline(openai_diffusion(), **arguments)
    close(found, expected.sample(SHAPE, seed=3, x_T=randn(SHAPE, seed=3)))
