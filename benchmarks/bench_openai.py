"""OpenAI's objects accelerated, against the stock code, for which tests/openai_diffusion.py stands
in, around a model that costs nothing: a step, with what may be asked of it besides, the training
losses with their gradient, and the whole of calc_bpd_loop."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from bench_denoising_loss import noise_in
from comparison import ours
from correctness import agree, like_randn
from openai_diffusion import peer
from redrawn import FORWARD, LIKELIHOOD, REVERSE, drawing, redrawn, seeded
from results import OURS

from ddpm_fast import accelerate, randn

STEPS, KEPT = 1000, 250
DRAWS = "torch.randn_like"  # the stock code, for its noise
BPD_STEPS, BPD_ROUNDS = {16: 250, 128: 50}, 3  # of calc_bpd_loop, by batch
CHOICES_SIZE = (16, 3, 32, 32)
OF = peer("guided")
VARIANCES = ["LEARNED_RANGE", pytest.param("FIXED_LARGE", marks=pytest.mark.full)]


def diffusion_of(variance, loss="RESCALED_MSE", kept=KEPT):
    return OF.SpacedDiffusion(
        OF.space_timesteps(STEPS, [kept]),
        betas=np.linspace(1e-4, 0.02, STEPS),
        model_mean_type=OF.ModelMeanType.EPSILON,
        model_var_type=OF.ModelVarType[variance],
        loss_type=OF.LossType[loss],
        rescale_timesteps=True,
    )


def model_of(output):
    return lambda x, t, **kwargs: output


def tensors(size, variance, device):
    """x and what a model says of it."""
    n, channels, *rest = size
    halves = 2 if variance.startswith("LEARNED") else 1
    output = randn((n, halves * channels, *rest), seed=2, device=device).tanh()
    return randn(size, seed=1, device=device), output


def rule_of_steps(stock_step, like, t, rtol):
    """What the stock code makes of the noise that was drawn: ours by its address, the others by
    torch's seed."""

    def rule(name, call):
        seed = seeded()
        found = call()
        torch.manual_seed(0)
        if name.startswith(OURS):
            with drawing(DRAWS, [redrawn(like, seed, REVERSE, t)]):
                expected = stock_step()
        else:
            expected = stock_step()
        agree(name, found, expected, rtol=rtol, atol=1e-4)

    return rule


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("method", ["p_sample", "ddim_sample"])
def bench_step(compare, size, method, variance, device):
    """One call with a timestep for each sample. "torch's noise" draws what the stock code draws."""
    x, output = tensors(size, variance, device)
    t = torch.full((size[0],), KEPT // 2, device=device)
    stock, fast = diffusion_of(variance), accelerate(diffusion_of(variance))
    torch_noise, model = accelerate(diffusion_of(variance), noise="torch"), model_of(output)

    candidates = ours(lambda: getattr(fast, method)(model, x, t), device)
    candidates["OpenAI"] = lambda: getattr(stock, method)(model, x, t)
    candidates["our kernel, torch's noise"] = lambda: getattr(torch_noise, method)(model, x, t)
    name = f"OpenAI {method} {variance.lower()}"
    rule = rule_of_steps(candidates["OpenAI"], x, t, 1e-4)
    compare(name, x, 4 * (3 * x.numel() + output.numel()), candidates, rule=rule)


@pytest.mark.full
@pytest.mark.parametrize("choice", ["cond_fn", "denoised_fn", "gradients", "float64"])
def bench_step_choices(compare, choice, device):
    """p_sample with a function of the user's own (which costs nothing, too), in float64, or as
    guided methods differentiate it: by x_t and by the model's output."""
    variance, size = "LEARNED_RANGE", CHOICES_SIZE
    x, output = tensors(size, variance, device)
    t = torch.arange(size[0], device=device) * 7 + 1
    if choice == "float64":
        x, output = x.double(), output.double()
    slope, options = 0.1 * x, {}
    if choice == "cond_fn":
        options = {"cond_fn": lambda x, t: slope, "model_kwargs": {}}
    elif choice == "denoised_fn":
        options = {"denoised_fn": lambda x0: x0}
    stock, fast = diffusion_of(variance), accelerate(diffusion_of(variance))
    torch_noise = accelerate(diffusion_of(variance), noise="torch")

    def step(diffusion):
        if choice != "gradients":
            return diffusion.p_sample(model_of(output), x, t, **options)
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [tensor.clone().requires_grad_() for tensor in (x, output)]
            out = diffusion.p_sample(model_of(leaves[1]), leaves[0], t)
            total = out["sample"].square().sum() + out["pred_xstart"].square().sum()
            return torch.autograd.grad(total, leaves)

    candidates = ours(lambda: step(fast), device)
    candidates["OpenAI"] = lambda: step(stock)
    candidates["our kernel, torch's noise"] = lambda: step(torch_noise)
    nbytes = x.element_size() * (3 * x.numel() + output.numel())
    rule = rule_of_steps(candidates["OpenAI"], x, t, 1e-3)
    compare(f"OpenAI p_sample {choice}", x, nbytes, candidates, rule=rule)


@pytest.mark.parametrize("variance", VARIANCES)
def bench_training_losses(compare, size, variance, device):
    """Noise, x_t, losses and the gradient of the model's output."""
    x0, output = tensors(size, variance, device)
    x0 = x0.clamp(-1, 1)
    t = torch.arange(size[0], device=device) % (KEPT - 1) + 1  # float32's decoder is another matter
    stock, fast = diffusion_of(variance), accelerate(diffusion_of(variance))

    def step(diffusion):
        with torch.inference_mode(False), torch.enable_grad():
            leaf = output.clone().requires_grad_()
            terms = diffusion.training_losses(model_of(leaf), x0, t)
            terms["loss"].mean().backward()
        return terms["loss"].detach(), leaf.grad

    def rule(name, call):
        seed = seeded()
        loss, gradient = call()
        eps = noise_in(gradient[:, : x0.shape[1]], output)
        if name.startswith(OURS):
            agree(f"{name}, noise", eps, redrawn(x0, seed, FORWARD), atol=1e-5)
        else:
            like_randn(name, eps, 1e-5)
        with drawing(DRAWS, [eps.float()]):
            agree(name, (loss, gradient), step(stock), rtol=1e-3, atol=1e-5)

    candidates = ours(lambda: step(fast), device)
    candidates["OpenAI"] = lambda: step(stock)
    nbytes = 4 * (2 * x0.numel() + 3 * output.numel())
    name = f"OpenAI training_losses {variance.lower()}"
    compare(name, x0, nbytes, candidates, rule=rule)


@pytest.mark.full
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("batch", list(BPD_STEPS))
def bench_calc_bpd_loop(record, batch, variance, device):
    """Whole loops in turn: theirs takes seconds."""
    x0, output = tensors((batch, 3, 32, 32), variance, device)
    x0 = x0.clamp(-1, 1).mul(127.5).round().div(127.5)
    steps = BPD_STEPS[batch]
    candidates = {"OpenAI": diffusion_of(variance, kept=steps)}
    candidates[OURS] = accelerate(diffusion_of(variance, kept=steps))
    few, seed = slice(0, 16), seeded()
    found = candidates[OURS].calc_bpd_loop(model_of(output), x0)
    draws = (redrawn(x0[few], seed, LIKELIHOOD, t) for t in reversed(range(steps)))
    with drawing(DRAWS, draws):
        expected = candidates["OpenAI"].calc_bpd_loop(model_of(output[few]), x0[few])
    name, state = f"OpenAI calc_bpd_loop {variance.lower()}", x0
    with record.checking(name, state, steps):
        for term in ("vb", "xstart_mse", "mse"):  # float32's decoder is another matter
            agree(term, found[term][few, :-1], expected[term][few, :-1], rtol=1e-2, atol=1e-3)
        agree("prior", found["prior_bpd"][few], expected["prior_bpd"], rtol=1e-4, atol=1e-6)
        total = found["vb"].sum(1) + found["prior_bpd"]
        agree("total", found["total_bpd"], total, rtol=1e-5)

    def seconds(diffusion):
        begin = time.perf_counter()
        total = diffusion.calc_bpd_loop(model_of(output), x0)["total_bpd"]
        assert total.sum().item() > 0  # waits for a GPU
        return time.perf_counter() - begin

    rounds = [{name: seconds(d) for name, d in candidates.items()} for _ in range(BPD_ROUNDS)]
    record(name, state, rounds, steps)
