"""The method in plain PyTorch, as the field writes it: tables gathered a sample and broadcast."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_fast import NoiseSchedule


def extract(table: Tensor, t: Tensor, shape: torch.Size) -> Tensor:
    return table.gather(-1, t).reshape(shape[0], *[1] * (len(shape) - 1))


class EagerStep:
    """One DDPM step, ε prediction, fixed_small: nine full-size ops and randn."""

    def __init__(
        self,
        schedule: NoiseSchedule,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.sqrt_recip = schedule.sqrt_recip_alphas_cumprod.to(device, dtype)
        self.sqrt_recipm1 = schedule.sqrt_recipm1_alphas_cumprod.to(device, dtype)
        self.coef1 = schedule.posterior_mean_coef1.to(device, dtype)
        self.coef2 = schedule.posterior_mean_coef2.to(device, dtype)
        self.log_variance = schedule.posterior_log_variance_clipped.to(device, dtype)

    def mean(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        x0 = extract(self.sqrt_recip, t, x.shape) * x - extract(self.sqrt_recipm1, t, x.shape) * eps
        x0 = x0.clamp(-1, 1)
        return extract(self.coef1, t, x.shape) * x0 + extract(self.coef2, t, x.shape) * x

    def __call__(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        scale = (0.5 * extract(self.log_variance, t, x.shape)).exp()
        return self.mean(x, eps, t) + scale * noise


def tuned_step(schedule: NoiseSchedule, t: int, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The same step by hand: numbers instead of tables, everything in place, buffers kept."""
    r = schedule.sqrt_recip_alphas_cumprod[t].item()
    rm1 = schedule.sqrt_recipm1_alphas_cumprod[t].item()
    coef1 = schedule.posterior_mean_coef1[t].item()
    coef2 = schedule.posterior_mean_coef2[t].item()
    sigma = schedule.posterior_variance[t].sqrt().item()
    x0, noise = torch.empty_like(x), torch.empty_like(x)

    def step(x: Tensor, eps: Tensor) -> Tensor:
        torch.mul(x, r, out=x0).add_(eps, alpha=-rm1).clamp_(-1, 1)
        noise.normal_()
        return x.mul_(coef2).add_(x0, alpha=coef1).add_(noise, alpha=sigma)

    return step


class EagerAddNoise:
    """√ᾱ x_0 + √(1−ᾱ) ε with ε from randn; pixels scaled first."""

    def __init__(self, schedule: NoiseSchedule, device: torch.device) -> None:
        self.signal = schedule.sqrt_alphas_cumprod.to(device, torch.float32)
        self.sigma = schedule.sqrt_one_minus_alphas_cumprod.to(device, torch.float32)

    def __call__(self, x0: Tensor, t: Tensor) -> Tensor:
        if x0.dtype == torch.uint8:
            x0 = x0.float() / 127.5 - 1
        signal = extract(self.signal, t, x0.shape)
        return signal * x0 + extract(self.sigma, t, x0.shape) * torch.randn_like(x0)


class EagerTraining:
    """One training step's own work: randn, q_sample, the mean squared error, its gradient."""

    def __init__(self, schedule: NoiseSchedule, device: torch.device) -> None:
        self.signal = schedule.sqrt_alphas_cumprod.to(device, torch.float32)
        self.sigma = schedule.sqrt_one_minus_alphas_cumprod.to(device, torch.float32)

    def noised(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        eps = torch.randn_like(x0)
        signal = extract(self.signal, t, x0.shape)
        return signal * x0 + extract(self.sigma, t, x0.shape) * eps, eps

    def __call__(self, output: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, the loss and the output's gradient; ``output`` stands for the model's."""
        x_t, eps = self.noised(x0, t)
        output = output.detach().requires_grad_()
        loss = torch.nn.functional.mse_loss(output, eps)
        loss.backward()
        assert output.grad is not None
        return x_t, loss.detach(), output.grad


class EagerVlb:
    """A term of the bound as OpenAI's code computes it, both its cases for every element."""

    def __init__(self, schedule: NoiseSchedule, device: torch.device) -> None:
        def table(values: Tensor) -> Tensor:
            return values.to(device, torch.float32)

        self.sqrt_recip = table(schedule.sqrt_recip_alphas_cumprod)
        self.sqrt_recipm1 = table(schedule.sqrt_recipm1_alphas_cumprod)
        self.coef1 = table(schedule.posterior_mean_coef1)
        self.coef2 = table(schedule.posterior_mean_coef2)
        self.min_log = table(schedule.posterior_log_variance_clipped)
        self.max_log = table(schedule.betas.log())

    def __call__(self, x0: Tensor, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        def at(values: Tensor) -> Tensor:
            return extract(values, t, x0.shape)

        min_log, max_log = at(self.min_log), at(self.max_log)
        if output.shape == x0.shape:
            log_variance = min_log.expand(x0.shape)
        else:
            output, v = output.chunk(2, 1)
            fraction = (v + 1) / 2
            log_variance = fraction * max_log + (1 - fraction) * min_log
        x0_hat = (at(self.sqrt_recip) * x_t - at(self.sqrt_recipm1) * output).clamp(-1, 1)
        mean = at(self.coef1) * x0_hat + at(self.coef2) * x_t
        true_mean = at(self.coef1) * x0 + at(self.coef2) * x_t
        kl = 0.5 * (
            -1.0
            + log_variance
            - min_log
            + torch.exp(min_log - log_variance)
            + (true_mean - mean) ** 2 * torch.exp(-log_variance)
        )
        kl = kl.flatten(1).mean(1) / math.log(2)
        centred, inverse_std = x0 - mean, torch.exp(-0.5 * log_variance)
        below_plus = self._cdf(inverse_std * (centred + 1 / 255))
        below_min = self._cdf(inverse_std * (centred - 1 / 255))
        inside = torch.where(x0 > 0.999, 1 - below_min, below_plus - below_min)
        log_probs = torch.where(x0 < -0.999, below_plus, inside).clamp(min=1e-12).log()
        nll = -log_probs.flatten(1).mean(1) / math.log(2)
        return torch.where(t == 0, nll, kl)

    @staticmethod
    def _cdf(x: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
