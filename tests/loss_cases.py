"""A schedule, a batch and models to try DenoisingLoss on."""

from __future__ import annotations

import torch

from ddpm_fast import NoiseSchedule, randn, reference

SCHEDULE = NoiseSchedule.cosine(1000)
SHAPE = (6, 3, 5, 4)
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
IDS = torch.tensor([0, 3, 2**40, 17, 5, 1])
T = torch.tensor([0, 1, 250, 500, 998, 700])
SAMPLINGS = ["uniform", "antithetic", "loss_second_moment"]


def images(shape=SHAPE, dtype=torch.float32):
    levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    pixels = levels.to(torch.uint8)
    return pixels if dtype == torch.uint8 else reference.unit_from_pixel(pixels).to(dtype)


class Model(torch.nn.Module):
    """A little of everything that a gradient can go through."""

    def __init__(self, channels=3, out_channels=3):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(channels, 8, 3, padding=1)
        self.out = torch.nn.Conv2d(8, out_channels, 3, padding=1)

    def forward(self, x, t):
        scale = 1 + t.to(x.dtype).reshape(-1, 1, 1, 1) / 1000
        return self.out(torch.tanh(scale * self.conv(x)))


def zero(x, t, **kwargs):
    return torch.zeros_like(x)


def elementwise(x, t):
    return 0.5 * x


def noise(ids=IDS, seed=7, shape=SHAPE):
    return randn(shape, seed=seed, sample_ids=ids, stream=2)
