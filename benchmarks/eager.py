"""The method in plain PyTorch, as the field writes it: tables gathered a sample and broadcast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddpm_fast import NoiseSchedule


def extract(table: Tensor, t: Tensor, shape: torch.Size) -> Tensor:
    return table.gather(-1, t).reshape(shape[0], *[1] * (len(shape) - 1))


class EagerStep:
    """One DDPM step, ε prediction: nine full-size ops and randn; fixed_small, or learned_range."""

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
        self.max_log_variance = schedule.betas.log().to(device, dtype)

    def x0(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        x0 = extract(self.sqrt_recip, t, x.shape) * x - extract(self.sqrt_recipm1, t, x.shape) * eps
        return x0.clamp(-1, 1)

    def mean(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        x0 = self.x0(x, eps, t)
        return extract(self.coef1, t, x.shape) * x0 + extract(self.coef2, t, x.shape) * x

    def std(self, x: Tensor, t: Tensor, v: Tensor | None = None) -> Tensor:
        log_variance = extract(self.log_variance, t, x.shape)
        if v is not None:
            fraction = (v + 1) / 2
            largest = extract(self.max_log_variance, t, x.shape)
            log_variance = fraction * largest + (1 - fraction) * log_variance
        return (0.5 * log_variance).exp()

    def __call__(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        return self.mean(x, eps, t) + self.std(x, t) * noise

    def guided(self, x: Tensor, eps: Tensor, uncond: Tensor, scale: float, t: Tensor) -> Tensor:
        return self(x, uncond + scale * (eps - uncond), t)

    def learned(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        eps, v = output.chunk(2, 1)
        return self.mean(x, eps, t) + self.std(x, t, v) * torch.randn_like(x)

    def with_x0(self, x: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x0, noise = self.x0(x, eps, t), torch.randn_like(x)
        mean = extract(self.coef1, t, x.shape) * x0 + extract(self.coef2, t, x.shape) * x
        return mean + self.std(x, t) * noise, x0

    def with_model_input(self, x: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Of a model in lower precision: its next input beside the state."""
        x = self(x, eps.to(x.dtype), t)
        return x, x.to(eps.dtype)


class EagerDdim:
    """Whole trajectories of DDIM, η = 0, x_0 prediction, from x_T through a list of timesteps."""

    def __init__(
        self,
        schedule: NoiseSchedule,
        timesteps: Sequence[int],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.timesteps = list(timesteps)
        alphas_cumprod = schedule.alphas_cumprod[self.timesteps]
        after = torch.cat([alphas_cumprod[1:], torch.ones(1, dtype=alphas_cumprod.dtype)])
        tables = [alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), after.sqrt()]
        tables.append((1 - after).sqrt())
        self.rows = torch.stack(tables, 1).to(device, dtype)

    def __call__(self, network: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        for t, row in zip(self.timesteps, self.rows, strict=True):
            signal, sigma, signal_after, sigma_after = row
            x0 = network(x, torch.full((len(x),), t, device=x.device)).clamp(-1, 1)
            eps = (x - signal * x0) / sigma
            x = signal_after * x0 + sigma_after * eps
        return x


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


class EagerHybrid(EagerTraining):
    """One training step's own work with a learned variance: L_simple + L_vlb, the bound's mean held
    fast, and the gradient of both halves of the model's output."""

    def __init__(self, schedule: NoiseSchedule, device: torch.device) -> None:
        super().__init__(schedule, device)
        self.vlb = EagerVlb(schedule, device, clip=False)

    def loss(self, output: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x_t, eps = self.noised(x0, t)
        m, v = output.chunk(2, 1)
        vlb = self.vlb(x0, x_t, torch.cat([m.detach(), v], 1), t)
        return x_t, (torch.nn.functional.mse_loss(m, eps) + vlb.mean())

    def __call__(self, output: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = output.detach().requires_grad_()
        x_t, loss = self.loss(output, x0, t)
        loss.backward()
        assert output.grad is not None
        return x_t, loss.detach(), output.grad


class EagerVlb:
    """A term of the bound as OpenAI's code computes it, both its cases for every element."""

    def __init__(self, schedule: NoiseSchedule, device: torch.device, clip: bool = True) -> None:
        self.clip = clip

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
        x0_hat = at(self.sqrt_recip) * x_t - at(self.sqrt_recipm1) * output
        x0_hat = x0_hat.clamp(-1, 1) if self.clip else x0_hat
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
