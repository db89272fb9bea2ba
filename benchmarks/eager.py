"""The method in plain PyTorch, as the field writes it: tables gathered a sample and broadcast."""

from __future__ import annotations

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
