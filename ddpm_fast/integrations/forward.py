"""The forward process of another library, for add_noise and the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ..schedule import NoiseSchedule


class ForwardWeights(NoiseSchedule):
    """Stands for a schedule where a kernel asks for √ᾱ and √(1−ᾱ) alone: it has nothing else.

    The tables are the other library's own, with its roundings, and may hold what a NoiseSchedule
    refuses: betas above 1 and the NaNs that follow.

    Args:
        signal, sigma: √ᾱ and √(1−ᾱ), [T] by ascending timestep.
    """

    @torch.inference_mode(False)  # so that autograd may save them
    def __init__(self, signal: Tensor, sigma: Tensor) -> None:
        columns = torch.stack([signal.detach(), sigma.detach()], 1)
        self._weights = columns.to(torch.float32, copy=True).contiguous()
        self._by_device: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return self._weights.shape[0]

    def __repr__(self) -> str:
        return f"ForwardWeights(num_steps={len(self)})"

    def forward_weights(self, device: torch.device) -> Tensor:
        """float32 [T, 2] on ``device``."""
        if device == self._weights.device:
            return self._weights
        if device not in self._by_device:
            with torch.inference_mode(False):
                self._by_device[device] = self._weights.to(device)
        return self._by_device[device]
