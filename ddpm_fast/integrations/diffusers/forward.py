"""The forward process of diffusers' schedulers in one pass: add_noise and get_velocity."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ...backends import _chosen, select
from ...ops import checks
from ...ops.add_noise import _add_noise as add_noise_now

_Tables = tuple[Tensor, int, Tensor]  # ᾱ on a device, its version, the same on the host
_Weights = tuple[Tensor, int, dict[tuple[torch.dtype, bool], Tensor]]


class ForwardProcess:
    """Stands before a stock scheduler; ``super()`` is its formula."""

    alphas_cumprod: Tensor
    _on_host: _Tables | None = None
    _forward: _Weights | None = None
    _told: str = ""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ_t x_0 + √(1−ᾱ_t) ε in one pass, differentiable as the stock scheduler's."""
        fused = self._mixed(original_samples, noise, original_samples, timesteps, False)
        if fused is not None:
            return fused
        noisy: Tensor = super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc]
        return noisy

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ_t ε − √(1−ᾱ_t) x_0 in one pass, differentiable as the stock scheduler's."""
        fused = self._mixed(noise, sample, sample, timesteps, True)
        if fused is not None:
            return fused
        velocity: Tensor = super().get_velocity(sample, noise, timesteps)  # type: ignore[misc]
        return velocity

    def _mixed(
        self, first: Tensor, second: Tensor, sample: Tensor, timesteps: Tensor, negate: bool
    ) -> Tensor | None:
        """√ᾱ_t first ± √(1−ᾱ_t) second, weights in the sample's dtype as the stock code has them;
        None where that takes more than the kernel does, or where derivatives are asked for: an op's
        backward in Python takes longer than the whole of the stock formula."""
        if torch.compiler.is_compiling():
            return None  # inductor fuses the stock formula
        if (
            (first.requires_grad or second.requires_grad) and torch.is_grad_enabled()
        ) or first.dtype not in checks.FLOAT_DTYPES:
            alphas = self.alphas_cumprod
            if not (sample.is_cpu and alphas.is_cpu) or alphas.is_inference():
                self._place_tables(sample)
            return None
        device = self._place_tables(sample)
        shape = first.shape
        if (
            shape != second.shape
            or second.dtype not in checks.FLOAT_DTYPES
            or first.device != second.device
            or not len(shape)
            or not isinstance(timesteps, Tensor)
            or timesteps.ndim > 1
            or timesteps.dtype not in _INTEGERS
            or not (timesteps.numel() == shape[0] or timesteps.numel() == 1)
            or torch._C._are_functorch_transforms_active()
            or not self._serves(first)
        ):
            return None
        t, ts = 0, None
        if timesteps.numel() == 1 and timesteps.is_cpu:
            t = int(timesteps)
        else:
            ts = timesteps.to(device, torch.int64).expand(shape[0]).contiguous()
        weights = self._weights(sample.dtype, negate)
        run_now = checks.runs_now(first, second)
        run = add_noise_now if run_now else torch.ops.ddpm_fast.add_noise.default
        dtype = torch.promote_types(first.dtype, second.dtype)
        mixed: Tensor = run(first, t, ts, weights, 0, None, None, 0, 0, None, second, dtype)
        return mixed

    def _place_tables(self, sample: Tensor) -> torch.device:
        """ᾱ is where the sample is, whose device this returns."""
        device, alphas = sample.device, self.alphas_cumprod
        if alphas.device != device or alphas.is_inference():
            self._move_tables(device)
        return device

    def _serves(self, sample: Tensor) -> bool:
        return sample.is_cpu or self._runs_on(sample)

    def _runs_on(self, sample: Tensor) -> bool:
        """Whether there are kernels for the sample's device; those that were asked for by name
        raise when they are called."""
        if _chosen.get() != "auto":
            return True
        try:
            select(sample.device)
        except RuntimeError as problem:
            self._warn(str(problem))
            return False
        return True

    def _warn(self, why: str) -> None:
        if why and why != self._told:
            self._told = why
            message = f"this scheduler takes the stock steps, with torch's noise: {why}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)

    def _move_tables(self, device: torch.device) -> None:
        """ᾱ goes where the samples are, as in the stock code, which training scripts rely on; its
        values stay at hand, so that no step has to read them back."""
        alphas = self.alphas_cumprod
        host = alphas if alphas.is_cpu else self._alphas_on_host()
        with torch.inference_mode(False):
            if alphas.is_inference():  # those do not tell of changes in place
                alphas = alphas.clone()
            self.alphas_cumprod = moved = alphas.to(device)
        if host is not None and not moved.is_cpu:
            self._on_host = moved, moved._version, host

    def _alphas_on_host(self) -> Tensor | None:
        """ᾱ on the host, where it lies on a device that add_noise has moved it to."""
        if self._on_host is None:
            return None
        moved, version, host = self._on_host
        same = moved is self.alphas_cumprod and moved._version == version
        return host if same else None

    def _weights(self, dtype: torch.dtype, negate: bool) -> Tensor:
        """float32 [T, 2] on ᾱ's device: √ᾱ and ±√(1−ᾱ), rounded to ``dtype`` as they are made."""
        alphas = self.alphas_cumprod
        kept = self._forward
        if kept is None or kept[0] is not alphas or kept[1] != alphas._version:
            kept = self._forward = alphas, alphas._version, {}
        found = kept[2].get((dtype, negate))
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                rounded = alphas.to(dtype)
                noise = (1 - rounded) ** 0.5
                columns = rounded**0.5, -noise if negate else noise
                found = kept[2][dtype, negate] = torch.stack(columns, 1).float()
        return found


_INTEGERS = (torch.int64, torch.int32)
